"""The page's words in the language of whoever reads them. English stands in the code, and is the key to the others.

There are three ways, by what puts the words on the screen, and one catalogue, assets/languages/:
- `i18n` marks what a component holds (a label, an info, a placeholder, a choice): Gradio's page translates it;
- `translate` is for what a handler sends, in the language of the browser whose event it answers; `translate_message` is
the same for
  sentences from the layers below, which know no language and write English;
- fixed HTML has elements with `data-i18n`, and scripts call `studioSay`: see assets/language.js.
In the catalogue's files, "page" are the texts of ui/ and of scripts, and "studio" sentences with placeholders that come
from below. A text in a language that there is no catalogue for is English.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import LocalContext
from gradio.i18n import I18nData

from flux2_studio.errors import StudioError

ENGLISH = "en"
LANGUAGES = (ENGLISH, "zh-CN", "de", "ja")  # as Gradio's page names them
CATALOGUE_PARTS = ("page", "studio")  # of each file
# Of a key in Gradio's table: without it, a prompt that reads like one of our texts would be taken for it.
I18N_KEY_PREFIX = "flux2-studio: "
MAX_MATCHED_CHARS = 600  # characters of a sentence that is looked for among those with placeholders
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\s*([A-Za-z0-9-]{1,35})\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?")

Translations = Mapping[str, str]  # English -> the same in another language


class TranslationCatalogue(gr.I18n):
    """The catalogue, given to Gradio's page. page, studio: by language, the same keys in each."""

    def __init__(self, page: Mapping[str, Translations], studio: Mapping[str, Translations]) -> None:
        self.tables = {language: {**page[language], **studio[language]} for language in LANGUAGES}
        # The longest first: of two that a sentence can be read as, that one says more.
        self._sentences = [(_pattern(key), key) for key in sorted(studio[ENGLISH], key=len, reverse=True)]
        marked = {
            language: {I18N_KEY_PREFIX + key: text for key, text in table.items()} for language, table in page.items()
        }
        super().__init__(**marked)

    @classmethod
    def load(cls, folder: Path) -> TranslationCatalogue:
        """The catalogue in `folder`, a file for each of LANGUAGES. Raises `StudioError` where they do not agree."""
        read: dict[str, Mapping[str, Translations]] = {}
        for language in LANGUAGES:
            path = folder / f"{language}.json"
            try:
                read[language] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StudioError(f"The page's words cannot be read from {path}: get that file again.") from error
            _check(language, read[language], read[ENGLISH])
        page, studio = ({language: both[part] for language, both in read.items()} for part in CATALOGUE_PARTS)
        return cls(page, studio)

    def translate_sentence(self, sentence: str, language: str) -> str:
        """What a layer below wrote, as far as the catalogue knows it; else `sentence` itself."""
        table = self.tables[language]
        if language == ENGLISH or sentence in table:
            return table.get(sentence, sentence)
        if len(sentence) <= MAX_MATCHED_CHARS:
            for pattern, key in self._sentences:
                if found := pattern.fullmatch(sentence):
                    values = [self.translate_sentence(value, language) for value in found.groups()]
                    return _filled(table[key], dict(zip(_PLACEHOLDER.findall(key), values, strict=True)))
        return sentence


def i18n(text: str) -> str:
    """A mark in the place of `text` (English), for what a component holds. It stands alone, never within other text."""
    # The page looks for the mark's end at the first brace.
    return str(I18nData(I18N_KEY_PREFIX + text.replace("}", "\0"))).replace(r"\u0000", r"\u007d")


def translate(text: str, /, **values: object) -> str:
    """`text` (English) with its placeholders filled, in the language of who made the event under way.

    A placeholder's value is not translated. Raises `KeyError` for a text that the catalogue does not have.
    """
    if (asking := _current_catalogue()) is not None:
        words, language = asking
        text = words.tables[language][text]
    return _filled(text, values)


def translate_message(sentence: str) -> str:
    """An English `sentence` that was written below the page, like `translate` where the catalogue has it, else as it
    is."""
    if (asking := _current_catalogue()) is None:
        return sentence
    words, language = asking
    return words.translate_sentence(sentence, language)


def language_script_tag(assets: Path) -> str:
    """What the page's head needs for HTML and scripts to be translated."""
    return f"<script>\n{(assets / 'language.js').read_text(encoding='utf-8')}</script>"


def language_of(accepted: str) -> str:
    """The language for a browser that sends `accepted` as its Accept-Language. Like Gradio's page, which knows only
    what the browser would like best, it takes that one, whole or by its first part, or English."""
    best, weight = ENGLISH, 0.0
    for entry in accepted[:1000].split(","):
        choice = _CHOICE.fullmatch(entry)
        if choice and (wish := float(choice[2] or 1)) > weight:
            best, weight = choice[1], wish
    return next((name for name in (best, best.split("-")[0]) if name in LANGUAGES), ENGLISH)


def placeholders(text: str) -> list[str]:
    """The names in braces, in alphabetical order."""
    return sorted(_PLACEHOLDER.findall(text))


def _filled(text: str, values: Mapping[str, object]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(values.get(found[1], found[0])), text)


def _current_catalogue() -> tuple[TranslationCatalogue, str] | None:
    """The catalogue of the page that an event is handled for, and the language of its browser; None outside of one."""
    request, page = LocalContext.request.get(None), LocalContext.blocks.get(None)
    words = getattr(page, "i18n_instance", None)
    if request is None or not isinstance(words, TranslationCatalogue):
        return None
    return words, language_of(request.headers.get("accept-language", ""))


def _check(language: str, read: Any, english: Mapping[str, Translations]) -> None:
    """Raises `StudioError`, with the first text that is wrong in what was read for `language`."""
    again = f"get {language}.json again."
    if (
        not isinstance(read, dict)
        or read.keys() != set(CATALOGUE_PARTS)
        or not all(isinstance(it, dict) for it in read.values())
    ):
        raise StudioError(
            f"The page's words in {language} must be texts under {' and '.join(CATALOGUE_PARTS)}: {again}"
        )
    for part in CATALOGUE_PARTS:
        if unlike := english[part].keys() ^ read[part].keys():
            raise StudioError(f"The page's words in {language} and {ENGLISH} differ in {min(unlike)!r}: {again}")
        for key, text in read[part].items():
            if not isinstance(text, str) or not text or placeholders(text) != placeholders(key):
                raise StudioError(f"In {language}, {key!r} must be a text with the same placeholders: {again}")


def _pattern(key: str) -> re.Pattern[str]:
    """Any sentence that `key` with its placeholders filled can be."""
    literals = [re.escape(part) for part in _PLACEHOLDER.split(key)[::2]]
    return re.compile("(.*?)".join(literals), re.DOTALL)
