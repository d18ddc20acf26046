"""Prompts as they may have been meant: `spelling_variants` undoes the usual tricks of spelling.

Undone are: letters of other alphabets that look like Latin ones (U+0435 for e), full-width, bold or circled letters,
accents on anything, invisible characters, words spread out with blanks, dots, dashes or stars, letters repeated many
times, and digits or signs for letters (1 for i or l, @ for a). Not undone are: wrong letters, words cut in two, words
run together, other languages' slang, rhymes.

Nothing is replaced for good: each reading is a guess, and the rules look at all of them.
"""

from __future__ import annotations

import re
import unicodedata

# Small letters of Cyrillic, Greek, Armenian and extended Latin that pass for Latin ones in most typefaces: the part of
# Unicode's confusables (UTS 39) that people use.
_LOOKALIKES = str.maketrans(
    "авекмнорстухіјѕԁԛԝһӏьгпиүαβεικνορτυχωγηημϲϳօսոհցզքɑɡıɩʏʀɴɪꜱᴀᴄᴅᴇᴋᴍᴏᴘᴛᴜᴠᴡᴢłøđħŧƅ",
    "abekmhopctyxijsdqwhlbrnuyabeiknoptuxwynnucjounhgqpagiiyrnisacdekmoptuvwzlodhtb",
)
_DIGITS = str.maketrans("0345789@$€+", "oeastbgaset")
_SIGNED = re.compile(r"[\w@$€!+|]+")  # a word and the signs that pass for letters
_SPREAD = re.compile(r"(?<!\w)[^\W\d_](?:[ .\-_*~/|][^\W\d_](?!\w)){2,}")  # "n u d e"; not "a man", not "U.S."
_INNER = re.compile(r"(?<=[^\W\d_])[.\-_*~/|](?=[^\W\d_])")  # "nu.de"
_REPEATED = re.compile(r"([^\W\d_])\1{2,}")
_OTHER_ALPHABET = re.compile(r"[^\W\d_a-zß-ÿ]")


def fold_accents(text: str) -> str:
    """`text` in small letters, without accents (but for ñ) and invisible characters; other scripts stay themselves.

    The words that rules look for are folded too, so that the two agree.
    """
    text = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text).casefold()).replace("n\u0303", "ñ")
    kept = (c for c in text if not "\u0300" <= c <= "\u036f" and unicodedata.category(c) not in ("Cf", "Co", "Cn"))
    return unicodedata.normalize("NFC", "".join(kept))


def spelling_variants(text: str) -> list[str]:
    """The folded `text`, and what it becomes when tricks of spelling are undone. No two are the same."""
    plain = re.sub(r"[^\S\n]{2,}", "  ", fold_accents(text))  # two blanks are where "n u d e  c a t" has its gap
    closed = _SPREAD.sub(lambda match: re.sub(r"[\W_]", "", match[0]), plain)
    letters = re.sub(r"\w+", lambda match: _latin(match[0]), closed)
    joined = _INNER.sub("", letters)
    guesses = [plain, letters, joined]
    for one in "il":
        guesses += [_SIGNED.sub(lambda match: _digits_read(match[0], one), guess) for guess in (letters, joined)]  # noqa: B023
    # Two letters and one: "nuuude" is nude, "boooobs" is not bobs.
    guesses += [_REPEATED.sub(by, guess) for guess in guesses for by in (r"\1", r"\1\1")]
    return list(dict.fromkeys(guesses))


def _latin(word: str) -> str:
    """`word` with its lookalikes replaced where that makes all of it Latin: a word of another language stays."""
    if not _OTHER_ALPHABET.search(word):
        return word
    latin = word.translate(_LOOKALIKES)
    return word if _OTHER_ALPHABET.search(latin) else latin


def _digits_read(word: str, one: str) -> str:
    """`word` with its digits and signs read as letters, if it has letters too: a number stays."""
    if word.isalpha() or not any(c.isalpha() for c in word):
        return word
    return word.translate(_DIGITS).translate(str.maketrans("1!|", one * 3))
