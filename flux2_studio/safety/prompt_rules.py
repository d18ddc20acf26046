"""Rules for prompts: combinations of meanings, checked in every reading from `spelling`.

Refused are:
- sexual content with minors: a minor, by word or by age, and explicit or nude terms anywhere in the prompt, or
  suggestive terms in the same sentence; under every policy;
- sexual violence: acts that are sexual violence, or force, drugs or secrecy together with explicit or nude terms;
- undressing somebody: "remove her clothes", "make him naked", as in edit instructions;
- real people: an existing person (a first name with a surname, "my neighbour", "the woman in image 1") and explicit or
  nude terms;
- pornography: explicit terms.

Words for nudity alone are not refused: they more often mean art, make-up or a figure of speech, and the picture itself
is checked. Harmless phrases ("chicken breast", "nude lipstick") are removed first.

Limits: word rules do not understand. They miss paraphrase, innuendo, stories, languages other than the dozen in
`lexicon`, and tricks that `spelling` does not know; they refuse a report on a subject like the subject itself. They
know no celebrities beyond a first name with a surname, and nothing of violence, hatred, fraud, brands or protected
characters. They are a first filter that takes a few milliseconds, before the GPU starts; whoever shares a studio with
strangers remains responsible for it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import cache

from flux2_studio.safety import lexicon
from flux2_studio.safety.policy import Verdict
from flux2_studio.safety.spelling import fold_accents, spelling_variants

ADULT_AGE = 18
_NUMBERS = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
]
_AGE = re.compile(
    rf"(?<![\w.,])(?P<age>\d{{1,2}}|{'|'.join(_NUMBERS[1:])})[\W_]{{0,3}}"
    r"(?:(?:years?|yrs?|y)[\W_]{0,3}(?:olds?|o)\b(?!\W{0,3}(?:whisk|scotch|wine|rum|port|brandy|cognac|tree|oak|house|car))"
    r"|jahrig|jahre alt|ans\b|anni\b|años|anos\b|jaar\b|лет\b|летн|岁|歲|歳|才|살|세)"
    r"|\b(?:aged?|aged? of|she is|he is|who is|girl of|boy of|looks)[\W_]{1,2}(?P<at>\d{1,2})\b"
    r"(?!\W{0,2}(?:cm|m\b|met|feet|foot|ft|inch|min|percent|%|\d))"
)
_SENTENCE = re.compile(r"[.!?;\n。]+")

_CLOTHES = (
    r"(?:clothes|clothing|outfit|dress|shirt|blouse|skirt|underwear|bra|panties|bikini|swimsuit|garments?|lingerie)"
)
_PERSON = (
    r"(?:her|him|them|his|their|everyone|this person|(?:the|this|that|a) (?:\w+ )?(?:woman|women|girl|man|men|boy|"
    r"person|people|lady|model|guy|actress|teacher|student)(?: s)?)"
)
_INSTEAD = r"(?!.{0,40}\b(?:replace|put|dress|change|swap|wear|instead|with|and add|and give))"
# For folded text with punctuation replaced by blanks.
_UNDRESSING = re.compile(
    rf"\b(?:nudify|unclothe|undress|strip) {_PERSON}\b(?! (?:of power|of his|of her|of their|armou?r))"
    rf"|\b(?:remove|delete|erase|take off|strip off) (?:all )?(?:of )?{_PERSON} (?:\w+ )?{_CLOTHES}\b{_INSTEAD}"
    rf"|\b(?:make|turn|show|render|depict) {_PERSON} (?:\w+ ){{0,2}}(?:nude|naked|topless)\b"
    rf"|\bsee through {_PERSON} {_CLOTHES}\b"
)

_SURNAME = r"[A-Z][a-z'\u00c0-\u024f-]+"
_NAME = rf"(?:{'|'.join(lexicon.FIRST_NAMES.split())}) {_SURNAME}"
_BARE = r"(?i:nude|naked|topless|nsfw|porn\w*|having sex|sex tape|undressed|without clothes)"
_NAMED = re.compile(
    rf"\b{_BARE}\b(?:,? (?i:photos?|pictures?|images?|selfies?|portraits?|videos?|scenes?|deepfakes?|of|with|featuring|"
    rf"starring|showing|and|posing|leaked))*,? {_NAME}"
    rf"|(?<!by )(?<!after )(?<!style of )(?<!like )\b{_NAME}(?:,? (?i:is|being|posing|posed|standing|lying|completely|"
    rf"fully|totally|and|in|the|a|on|bed|fake|leaked))*,? {_BARE}\b(?! (?i:style|painting|photography|study|drawing))"
)


def apply_prompt_rules(text: str) -> Verdict:
    """Check the prompt `text` against all rules."""
    scores: dict[str, float] = {}
    for reading in spelling_variants(text):
        for reason in _reasons(reading):
            scores[reason] = 1.0
    if _NAMED.search(" ".join(unicodedata.normalize("NFKC", text).split())):
        scores[REAL_PERSON_REASON] = 1.0
    reasons = (MINORS_REASON,) if MINORS_REASON in scores else tuple(scores)
    return Verdict(allowed=not scores, reasons=reasons, scores=scores, under_every_policy=MINORS_REASON in scores)


MINORS_REASON = "combines sexual content with minors"
VIOLENCE_REASON = "asks for sexual violence, or for what somebody did not agree to"
UNDRESS_REASON = "asks for a person to be undressed"
REAL_PERSON_REASON = "asks for sexual content with somebody who may exist"
PORN_REASON = "asks for pornography"


def _reasons(reading: str) -> Iterable[str]:
    """The reasons why one folded reading of a prompt is refused."""
    text = _term_list_pattern("HARMLESS").sub(" _ ", reading)
    explicit, bare = (bool(_term_list_pattern(name).search(text)) for name in ("EXPLICIT", "NUDE"))
    if ((explicit or bare) and _minor(text)) or any(
        _term_list_pattern("SUGGESTIVE").search(sentence) and _minor(sentence) for sentence in _SENTENCE.split(text)
    ):
        yield MINORS_REASON
    if _term_list_pattern("VIOLENT").search(text) or ((explicit or bare) and _term_list_pattern("FORCED").search(text)):
        yield VIOLENCE_REASON
    if _UNDRESSING.search(re.sub(r"[\W_]+", " ", text)):
        yield UNDRESS_REASON
    if (explicit or bare) and _term_list_pattern("SOMEBODY").search(text):
        yield REAL_PERSON_REASON
    if explicit:
        yield PORN_REASON


def _minor(text: str) -> bool:
    return bool(_term_list_pattern("MINOR").search(text)) or any(
        _age(match) < ADULT_AGE for match in _AGE.finditer(text)
    )


def _age(match: re.Match[str]) -> int:
    age = match["age"] or match["at"]
    return _NUMBERS.index(age) if age in _NUMBERS else int(age)


@cache
def _term_list_pattern(name: str) -> re.Pattern[str]:
    """Compile one of the lexicon's lists into a pattern for folded text."""
    terms = [fold_accents(term.strip()) for term in re.split(r"[,\n]", getattr(lexicon, name)) if term.strip()]
    spaced = [term for term in terms if re.match(r"[(a-zß-ÿа-я]", term)]
    anywhere = [re.escape(term) for term in terms if term not in spaced]  # scripts without blanks
    # A common lookbehind for all terms: it rejects positions inside a word, most of the text, at once.
    return re.compile("|".join([rf"(?<![^\W_])(?:{'|'.join(map(_pattern, spaced))})", *anywhere]))


def _pattern(term: str) -> str:
    body = term.replace("*", r"\w*").replace(" ", r"[\W_]+").replace("(", "(?:")
    return body if term.endswith("*") else rf"{body}(?![^\W_])"
