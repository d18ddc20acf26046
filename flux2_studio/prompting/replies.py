"""Parse a language model's reply into a prompt, or reject it.

Models chat, refuse, think aloud and ramble. An unambiguous wrapping (a code fence or a pair of quotation marks around
everything, a closed block of thoughts before it) is removed, with a note to the user. Everything else that is not
plainly a prompt raises `UpsampleError`: a wrong prompt costs the user more than an error message.
"""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass

from flux2_studio.errors import UpsampleError
from flux2_studio.request import MAX_PROMPT

# Characters of an enhanced prompt: about twice what the text encoders read (512 tokens).
MAX_PROMPT_REPLY_CHARACTERS = 4000
OR_WITHOUT_ENHANCING = "or generate without enhancing"  # ends every error message

_QUOTES = ('""', "“”", "„“", "«»", "»«", "「」", "''", "\u2018\u2019")
_FENCE = re.compile(r"```[\w-]*[ \t]*\n(.*?)\n?[ \t]*```", re.DOTALL)
_THOUGHTS = re.compile(r"\s*<(think|thinking|thought|reasoning)>(.*?)</\1>\s*", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"</?(?:think|thinking|thought|reasoning|answer|assistant)>|<\|\w+\|>|\[/?INST\]", re.IGNORECASE)
_PAGE = re.compile(r"<(?:!doctype|html|head|body|\?xml)\b", re.IGNORECASE)

# How replies begin that are not prompts. Each pattern needs more than one word, or punctuation after the word, so that
# "Sure-footed goats", "Great waves" and a sign that says "Sorry" are accepted.
_REFUSAL = re.compile(
    r"(?:i'?m|i am) (?:very |so |really |truly )?sorry\b"
    r"|(?:i'?m|i am) (?:not able|unable|not comfortable|not permitted|not allowed)\b"
    r"|(?:i|we) (?:cannot|can ?not|can'?t|could not|couldn'?t|won'?t|will not|must decline|have to decline)\b"
    r"|(?:i|we) apologi[sz]e\b|my apologies\b|unfortunately,? (?:i|we|this|that|your)\b"
    r"|sorry,? (?:but )?(?:i|we|this|that|your)\b|as an? (?:ai|language model|assistant)\b"
    r"|this request (?:violates|goes against)|your request (?:violates|goes against)"
    r"|(?:es )?tut mir (?:sehr )?leid\b|ich kann (?:dir |ihnen |dabei |das )|je suis désolée?\b|je ne peux pas\b"
    r"|lo siento\b|no puedo\b|mi dispiace\b|non posso\b|sinto muito\b|desculpe\b|对不起|抱歉|很抱歉|申し訳|すみません",
    re.IGNORECASE,
)
_PREAMBLE = re.compile(
    r"(?:sure|certainly|of course|absolutely|okay|ok|alright|great|got it|gladly|happy to help|no problem)[!.,:]"
    r"|(?:sure|certainly|of course|okay|ok) (?:thing|here|i)\b"
    r"|here(?:'?s| is| are| you go)\b|below (?:is|are)\b|i(?:'ve| have) (?:written|rewritten|enhanced|expanded)\b"
    r"|(?:hello|hi|hey)(?: there)?[!,]"
    r"|(?:natürlich|gerne|klar|selbstverständlich)[!,.:]|hier ist\b|voici\b|bien sûr|aquí (?:está|tienes)\b|ecco\b",
    re.IGNORECASE,
)
_LABEL = re.compile(
    r"[*_#\s]*(?:(?:the|your|my|an?|final|new) )?(?:[\w.'-]+ ){0,3}(?:prompt|instruction|description)s?\s*"
    r"(?:\([^)\n]*\)|\d+)?[*_\s]*:"
    r"|[*_#\s]*(?:option|version|variant|alternative) (?:\d+|[a-c])\b[^\n]{0,40}[:*)\n]"
    r"|#{1,6} \S",
    re.IGNORECASE,
)
_QUESTION = re.compile(
    r"(?:could|can|would|will) you (?:please )?(?:provide|share|tell|clarify|describe|upload|give|specify)\b"
    r"|please (?:provide|share|upload|clarify|specify|tell me)\b"
    r"|(?:i (?:do not|don't|cannot|can't) see|i need more|what (?:kind|sort|would you)) ",
    re.IGNORECASE,
)
_CLOSING_REMARK = re.compile(
    r"(?:let me know\b|feel free\b|would you like\b|do you want\b|i hope (?:this|that)\b|hope this\b"
    r"|if you(?:'d| would) like\b|i can also\b|[*_]*(?:note|explanation|changes|why this works|key changes)[*_]*\s*:)",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class ParsedReply:
    """An enhanced prompt, and notes for the user about what was removed from the reply."""

    prompt: str
    notes: tuple[str, ...] = ()


def max_reply_characters(original_prompt: str) -> int:
    """Return the longest reply accepted for `original_prompt`: long prompts may stay long, up to a request's limit."""
    return min(MAX_PROMPT, max(MAX_PROMPT_REPLY_CHARACTERS, 2 * len(original_prompt)))


def reply_too_long_error(count: int, original_prompt: str) -> UpsampleError:
    """Return the error for a reply of `count` characters that may not be complete."""
    return UpsampleError(
        f"The language model wrote {count:,} characters and more, where a prompt has "
        f"{max_reply_characters(original_prompt):,} at "
        f"most. Try again, choose another model, {OR_WITHOUT_ENHANCING}."
    )


def parse_reply(text: str, original_prompt: str) -> ParsedReply:
    """Return the prompt in `text`, a model's reply to `original_prompt`. Raises `UpsampleError`."""
    prompt, notes = text.strip(), []
    if thoughts := _THOUGHTS.match(prompt):
        prompt = prompt[thoughts.end() :]
        if thoughts[2].strip():
            notes.append("The language model thought aloud before the prompt: its thoughts were left out.")
    if fence := _FENCE.fullmatch(prompt):
        if "```" not in fence[1]:
            prompt = fence[1].strip()
            notes.append("A code fence around the prompt was taken off.")
    elif len(prompt) > 2 and _is_quoted(prompt):
        prompt = prompt[1:-1].strip()
        notes.append("Quotation marks around the prompt were taken off.")
    if len(prompt) > max_reply_characters(original_prompt):
        raise reply_too_long_error(max_reply_characters(original_prompt), original_prompt)
    if reason := _rejection_reason(prompt, original_prompt):
        raise UpsampleError(f"{reason} Try again, choose another model, {OR_WITHOUT_ENHANCING}.")
    return ParsedReply(prompt=prompt, notes=tuple(notes))


def _is_quoted(text: str) -> bool:
    """Return whether a single pair of quotation marks encloses the text: "a" and "b" is not quoted."""
    for pair in _QUOTES:
        opening, closing = pair[0], pair[1]
        if text.startswith(opening) and text.endswith(closing):
            inside = text[1:-1]
            if opening in "'\u2018":
                inside = re.sub(r"(?<=\w)['\u2019](?=\w)", "", inside)  # apostrophes
            return opening not in inside and closing not in inside
    return False


def _rejection_reason(text: str, original_prompt: str) -> str:
    """Return a sentence about why `text` is not a prompt; an empty string if it is one."""
    plain = text.replace("\u2019", "'")
    if not text:
        return "The language model gave an empty answer."
    if any(_is_broken_character(character) for character in text) or not any(character.isalpha() for character in text):
        return "The language model answered with something that is not text."
    if _PAGE.match(text):
        return "The language model's server gave a web page instead of a prompt."
    if _REFUSAL.match(plain):
        return f"The language model refused: {_quote_start(text)}."
    if _QUESTION.match(plain):
        return f"The language model asked back instead of writing a prompt: {_quote_start(text)}."
    if _PREAMBLE.match(plain) or (_LABEL.match(plain) and not _LABEL.match(original_prompt.strip())):
        return f"The language model talked about the prompt instead of only writing it: {_quote_start(text)}."
    if _TAG.search(text):
        return "The language model thought aloud, and it cannot be told where its prompt begins."
    if "```" in text and "```" not in original_prompt:
        return "The language model wrote more than a prompt, with code fences in it."
    last = plain.rpartition("\n")[2].strip()
    if last != plain and _CLOSING_REMARK.match(last):
        return f"The language model talked on after the prompt: {_quote_start(last)}."
    if _is_json(text) and not original_prompt.lstrip().startswith(("{", "[")):
        return "The language model answered with JSON, where sentences were asked for."
    return ""


def _is_broken_character(character: str) -> bool:
    """Return whether `character` is a control character, a surrogate, unassigned or U+FFFD."""
    return character == "\ufffd" or (
        unicodedata.category(character) in ("Cc", "Cs", "Cn") and character not in "\n\r\t"
    )


def _quote_start(text: str) -> str:
    """Return the first words of a reply, quoted for a message."""
    words = " ".join(text.split())
    return f'"{words if len(words) <= 80 else words[:77] + "..."}"'


def _is_json(text: str) -> bool:
    if not text.startswith(("{", "[")):
        return False
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
