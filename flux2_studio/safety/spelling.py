"""Undo spelling tricks in prompts: `spelling_variants` returns the possible readings.

Handled: letters of other alphabets that look like Latin ones (U+0435 for e), full-width, bold or circled letters,
accents on anything, invisible characters, words spread out with blanks, dots, dashes or stars, letters repeated many
times, and digits or signs for letters (1 for i or l, @ for a). Not handled: wrong letters, words cut in two, words run
together, slang of other languages, rhymes.

Each reading is a guess, and the rules check all of them.
"""

from __future__ import annotations

import re
import unicodedata

# Lower-case Cyrillic, Greek, Armenian and extended Latin letters that look Latin in most typefaces: the part of
# Unicode's confusables (UTS 39) that people use.
_LOOKALIKES = str.maketrans(
    "авекмнорстухіјѕԁԛԝһӏьгпиүαβεικνορτυχωγηημϲϳօսոհցզքɑɡıɩʏʀɴɪꜱᴀᴄᴅᴇᴋᴍᴏᴘᴛᴜᴠᴡᴢłøđħŧƅ",
    "abekmhopctyxijsdqwhlbrnuyabeiknoptuxwynnucjounhgqpagiiyrnisacdekmoptuvwzlodhtb",
)
_DIGITS = str.maketrans("0345789@$€+", "oeastbgaset")
_SIGNED = re.compile(r"[\w@$€!+|]+")  # a word with signs used as letters
_SPREAD = re.compile(r"(?<!\w)[^\W\d_](?:[ .\-_*~/|][^\W\d_](?!\w)){2,}")  # "n u d e"; not "a man", not "U.S."
_INNER = re.compile(r"(?<=[^\W\d_])[.\-_*~/|](?=[^\W\d_])")  # "nu.de"
_REPEATED = re.compile(r"([^\W\d_])\1{2,}")
_OTHER_ALPHABET = re.compile(r"[^\W\d_a-zß-ÿ]")


def fold_accents(text: str) -> str:
    """Convert `text` to lower case without accents (except ñ) and invisible characters; other scripts are kept.

    The rules' word lists are folded in the same way.
    """
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold()).replace("n\u0303", "ñ")
    characters = (
        c for c in text if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) not in ("Cf", "Co", "Cn")
    )
    return unicodedata.normalize("NFC", "".join(characters))


def spelling_variants(text: str) -> list[str]:
    """The folded `text`, and its readings with spelling tricks undone, without duplicates."""
    plain = re.sub(r"[^\S\n]{2,}", "  ", fold_accents(text))  # two blanks mark the gap in "n u d e  c a t"
    closed = _SPREAD.sub(lambda match: re.sub(r"[\W_]", "", match[0]), plain)
    letters = re.sub(r"\w+", lambda match: _replace_lookalikes(match[0]), closed)
    joined = _INNER.sub("", letters)
    guesses = [plain, letters, joined]
    for one in "il":
        guesses += [_SIGNED.sub(lambda match: _digits_to_letters(match[0], one), guess) for guess in (letters, joined)]  # noqa: B023
    # Reduce to one letter and to two: "nuuude" is nude, but "boooobs" is not bobs.
    guesses += [_REPEATED.sub(by, guess) for guess in guesses for by in (r"\1", r"\1\1")]
    return list(dict.fromkeys(guesses))


def _replace_lookalikes(word: str) -> str:
    """Replace lookalikes in `word` if that makes it all Latin; a word of another language stays."""
    if not _OTHER_ALPHABET.search(word):
        return word
    latin = word.translate(_LOOKALIKES)
    return word if _OTHER_ALPHABET.search(latin) else latin


def _digits_to_letters(word: str, one: str) -> str:
    """Read digits and signs in `word` as letters if it has letters too; a number stays."""
    if word.isalpha() or not any(c.isalpha() for c in word):
        return word
    return word.translate(_DIGITS).translate(str.maketrans("1!|", one * 3))
