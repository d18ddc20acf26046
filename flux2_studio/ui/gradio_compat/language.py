"""Translation of the page's texts. The code contains English, which is the key for the other languages.

One catalogue, assets/languages/, is used in three ways:
- `i18n` marks a component's text (label, info, placeholder, choice): Gradio's page translates it;
- `translate` is for texts that a handler sends, in the language of the browser whose event it handles;
  `translate_message` does the same for English sentences from lower layers, which do not translate;
- fixed HTML has elements with `data-i18n`, and scripts call `studioSay`: see assets/language.js.

In the catalogue's files, "page" has the texts of ui/ and of scripts, and "studio" sentences with placeholders from
lower layers. Languages without a catalogue get English.
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
LANGUAGES = (ENGLISH, "zh-CN", "de", "ja")  # by the names of Gradio's page
CATALOGUE_PARTS = ("page", "studio")  # keys in each file
# Prefix of keys in Gradio's table: without it, Gradio would translate a prompt that equals one of our texts.
I18N_KEY_PREFIX = "flux2-studio: "
MAX_MATCHED_CHARS = 600  # longer sentences are not matched against those with placeholders
_PLACEHOLDER = re.compile(r"\{(\w+)\}")
_CHOICE = re.compile(r"\s*([A-Za-z0-9-]{1,35})\s*(?:;\s*q=([01](?:\.\d{0,3})?)\s*)?")

Translations = Mapping[str, str]  # English -> translation


class TranslationCatalogue(gr.I18n):
    """The catalogue, passed to Gradio's page. page, studio: by language, with the same keys in each."""

    def __init__(self, page: Mapping[str, Translations], studio: Mapping[str, Translations]) -> None:
        self.tables = {language: {**page[language], **studio[language]} for language in LANGUAGES}
        # Longest first: if a sentence matches several, the longest pattern is the most specific.
        self._sentences = [(_pattern(key), key) for key in sorted(studio[ENGLISH], key=len, reverse=True)]
        marked = {
            language: {I18N_KEY_PREFIX + key: text for key, text in table.items()} for language, table in page.items()
        }
        super().__init__(**marked)

    @classmethod
    def load(cls, folder: Path) -> TranslationCatalogue:
        """Load one file per language from `folder`. Raises `StudioError` if their keys differ."""
        tables: dict[str, Mapping[str, Translations]] = {}
        for language in LANGUAGES:
            path = folder / f"{language}.json"
            try:
                tables[language] = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise StudioError(f"The page's words cannot be read from {path}: get that file again.") from error
            _check(language, tables[language], tables[ENGLISH])
        page, studio = ({language: table[part] for language, table in tables.items()} for part in CATALOGUE_PARTS)
        return cls(page, studio)

    def translate_sentence(self, sentence: str, language: str) -> str:
        """Translate a sentence from a lower layer; returns `sentence` itself if the catalogue lacks it."""
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
    """A marker for `text` (English) that Gradio's page translates. It must not be part of a longer text."""
    # For the page, the first brace ends the marker.
    return str(I18nData(I18N_KEY_PREFIX + text.replace("}", "\0"))).replace(r"\u0000", r"\u007d")


def translate(text: str, /, **values: object) -> str:
    """Translate `text` (English) for the browser of the current event, and fill its placeholders.

    The values are not translated. Raises `KeyError` for a text that the catalogue lacks.
    """
    if (current := _current_catalogue()) is not None:
        catalogue, language = current
        text = catalogue.tables[language][text]
    return _filled(text, values)


def translate_message(sentence: str) -> str:
    """Translate an English sentence from a lower layer; returns it unchanged if the catalogue lacks it."""
    if (current := _current_catalogue()) is None:
        return sentence
    catalogue, language = current
    return catalogue.translate_sentence(sentence, language)


def language_script_tag(assets: Path) -> str:
    """The head script that translates HTML and scripts."""
    return f"<script>\n{(assets / 'language.js').read_text(encoding='utf-8')}</script>"


def language_of(accepted: str) -> str:
    """Choose the language for an Accept-Language header.

    Like Gradio's page, which knows only the browser's first preference, it takes that one, in full or its first part,
    or English.
    """
    preferred, weight = ENGLISH, 0.0
    for entry in accepted[:1000].split(","):
        choice = _CHOICE.fullmatch(entry)
        if choice and (quality := float(choice[2] or 1)) > weight:
            preferred, weight = choice[1], quality
    return next((name for name in (preferred, preferred.split("-")[0]) if name in LANGUAGES), ENGLISH)


def placeholders(text: str) -> list[str]:
    """The names in braces, sorted."""
    return sorted(_PLACEHOLDER.findall(text))


def _filled(text: str, values: Mapping[str, object]) -> str:
    return _PLACEHOLDER.sub(lambda found: str(values.get(found[1], found[0])), text)


def _current_catalogue() -> tuple[TranslationCatalogue, str] | None:
    """The catalogue of the current event's page, and its browser's language; None outside of an event."""
    request, page = LocalContext.request.get(None), LocalContext.blocks.get(None)
    catalogue = getattr(page, "i18n_instance", None)
    if request is None or not isinstance(catalogue, TranslationCatalogue):
        return None
    return catalogue, language_of(request.headers.get("accept-language", ""))


def _check(language: str, read: Any, english: Mapping[str, Translations]) -> None:
    """Raise `StudioError` for the first invalid text in the file of `language`."""
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
        if differing := english[part].keys() ^ read[part].keys():
            raise StudioError(f"The page's words in {language} and {ENGLISH} differ in {min(differing)!r}: {again}")
        for key, text in read[part].items():
            if not isinstance(text, str) or not text or placeholders(text) != placeholders(key):
                raise StudioError(f"In {language}, {key!r} must be a text with the same placeholders: {again}")


def _pattern(key: str) -> re.Pattern[str]:
    """A pattern for every sentence that `key` with filled placeholders can be."""
    literals = [re.escape(part) for part in _PLACEHOLDER.split(key)[::2]]
    return re.compile("(.*?)".join(literals), re.DOTALL)
