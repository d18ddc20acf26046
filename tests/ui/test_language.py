"""The page's words: the four catalogues agree with each other and with the code, and the right one is taken."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from gradio.context import LocalContext

from flux2_studio.errors import StudioError
from flux2_studio.events import Preview, Queued, Result, Status
from flux2_studio.request import Request
from flux2_studio.ui.gradio_compat import language, shortcuts
from flux2_studio.ui.gradio_compat.language import (
    I18N_KEY_PREFIX,
    LANGUAGES,
    TranslationCatalogue,
    i18n,
    language_of,
    translate,
    translate_message,
)
from flux2_studio.ui.stage import render
from tests.ui.wording import called, constants, in_html, in_scripts

FOLDER = Path(__file__).resolve().parent.parent.parent / "assets" / "languages"
SYMBOL = re.compile(r"[^A-Za-z]*|f|\{\}")  # an arrow, a key of the keyboard, or what is filled in whole


@pytest.fixture(scope="module")
def words() -> TranslationCatalogue:
    return TranslationCatalogue.load(FOLDER)


@pytest.fixture
def asked_in(words: TranslationCatalogue) -> Iterator[Any]:
    """Has what follows be an event of a browser with this Accept-Language."""
    page, request = LocalContext.blocks, LocalContext.request
    before = page.get(None), request.get(None)

    def asked(accepted: str) -> None:
        page.set(SimpleNamespace(i18n_instance=words))  # type: ignore[arg-type]
        request.set(SimpleNamespace(headers={"accept-language": accepted}))  # type: ignore[arg-type]

    yield asked
    page.set(before[0])
    request.set(before[1])


# --- the catalogue ----------------------------------------------------------------------------------------------


def test_every_text_of_the_code_is_in_the_catalogue(words: TranslationCatalogue) -> None:
    used = {text for text in (*called("i18n", "translate"), *in_scripts(), *in_html()) if not SYMBOL.fullmatch(text)}
    assert len(used) > 200, "the sources are not read as they are written"
    missing = used - words.tables["en"].keys()
    assert not missing, f"add to each file in assets/languages/: {sorted(missing)}"


def test_every_text_of_the_catalogue_is_used(words: TranslationCatalogue) -> None:
    def outline(text: str) -> str:
        return re.sub(r"(?:\{\w*\})+", "{}", text)

    used = {outline(text) for text in (*constants(), *in_scripts(), *in_html())}
    unused = [text for text in words.tables["en"] if outline(text) not in used]
    assert not unused, f"nothing on the page says so any more: {unused}"


def test_english_is_its_own_translation(words: TranslationCatalogue) -> None:
    assert all(key == text for key, text in words.tables["en"].items())


@pytest.mark.parametrize("name", LANGUAGES[1:])
def test_translated_for_good(words: TranslationCatalogue, name: str) -> None:
    table = words.tables[name]
    same = [key for key, text in table.items() if key == text and re.search("[a-z]{4}", re.sub(r"\{\w+\}", "", key))]
    names = {"de": {"Prompt", "Seeds", "Name", "Tokens", "Guidance", "LoRAs", "LoRAs ({chosen})", "transformer"}}
    left = set(same) - names.get(name, set()) - {"Top p"}
    assert len(left) < 6, left


@pytest.mark.parametrize("name", LANGUAGES)
def test_no_text_is_html(words: TranslationCatalogue, name: str) -> None:
    # Some stand in HTML as they are.
    assert not [text for text in words.tables[name].values() if set(text) & set("<>&")]


def changed(folder: Path, name: str, change: Any) -> None:
    path = folder / f"{name}.json"
    both = json.loads(path.read_text(encoding="utf-8"))
    change(both)
    path.write_text(json.dumps(both), encoding="utf-8")


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda both: both["page"].pop("Seed"), "'Seed'"),
        (lambda both: both["page"].update(Sead="Seed"), "'Sead'"),
        (lambda both: both["studio"].update({"Loading {label}": "Lädt"}), "'Loading {label}'"),
        (lambda both: both["page"].update(Seed=""), "'Seed'"),
        (lambda both: both["page"].update(Seed=["Seed"]), "'Seed'"),
        (lambda both: both.pop("studio"), "page and studio"),
        (lambda both: both.update(more={}), "page and studio"),
    ],
)
def test_a_file_that_does_not_agree_is_refused(tmp_path: Path, change: Any, says: str) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "languages"))
    changed(folder, "de", change)
    with pytest.raises(StudioError, match=re.escape(says)):
        TranslationCatalogue.load(folder)


def test_a_file_that_is_missing_or_broken_is_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER, tmp_path / "languages"))
    (folder / "ja.json").write_text("{", encoding="utf-8")
    with pytest.raises(StudioError, match=r"ja\.json"):
        TranslationCatalogue.load(folder)
    (folder / "ja.json").unlink()
    with pytest.raises(StudioError, match=r"ja\.json"):
        TranslationCatalogue.load(folder)


# --- which language ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "accepted, expected",
    [
        ("de", "de"),
        ("de-AT,de;q=0.9,en;q=0.8", "de"),
        ("ja-JP,en;q=0.5", "ja"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh-CN"),
        ("zh-TW,zh;q=0.9", "en"),  # Gradio's page has a Chinese of its own for it, and we have none
        ("fr-FR,de;q=0.9", "en"),  # only the first choice counts, as in the browser
        ("en;q=0.5,ja;q=0.8", "ja"),
        ("de;q=0", "en"),
        ("", "en"),
        ("*", "en"),
        ("de;q=x,<script>,;;,,", "en"),
        ("x" * 100_000, "en"),
    ],
)
def test_the_language_of_a_browser(accepted: str, expected: str) -> None:
    assert language_of(accepted) == expected


def test_without_an_event_it_is_english() -> None:
    assert translate("Step {step} of {steps}", step=2, steps=4) == "Step 2 of 4"
    assert translate_message("Reading the prompt") == "Reading the prompt"


def test_status_lines_are_in_the_language_of_who_follows(asked_in: Any) -> None:
    preview = Preview(step=2, steps=4, images=(), first_index=0, count=1, seconds_left=3.0)
    lines: Mapping[str, tuple[str, str]] = {
        "de-DE": ("Schritt 2 von 4 · noch 3.0 s", "Wartet: 2 Läufe davor"),
        "zh-CN": ("第 2/4 步 · 剩余 3.0 秒", "前面还有 2 个任务"),
        "ja": ("ステップ 2/4 · 残り 3.0 秒", "前に 2 件"),
        "fr": ("Step 2 of 4 · 3.0 s left", "Waiting: 2 runs before yours"),
    }
    for accepted, (step, queued) in lines.items():
        asked_in(accepted)
        assert f">{step}<" in render.step(preview)
        assert f"{queued}<" in render.queued(Queued(runs_ahead=2))
    asked_in("de")
    done = Result(request=Request(prompt="x"), images=(Path("a"),), seeds=(1,), seconds=0.94)
    assert ">1 Bild in 0.9 s<" in render.done(done)


def test_sentences_from_below_are_translated_where_they_are_known(asked_in: Any) -> None:
    asked_in("de")
    assert "Prompt wird gelesen" in render.status(Status(text="Reading the prompt"))
    assert translate_message("Drawing pictures 1-2 of 4") == "Zeichnet Bilder 1-2 von 4"
    assert translate_message("Loading FLUX.2 dev: text encoder") == "Lädt FLUX.2 dev: Text-Encoder"
    assert translate_message("Nothing that anybody knows 3 s left") == "Nothing that anybody knows 3 s left"
    hostile = "Loading <b>{label}</b>"
    assert translate_message(hostile) == "Lädt <b>{label}</b>"
    assert "<b>" not in render.status(Status(text=hostile))
    assert translate_message("Loading " + "x" * 100_000).startswith("Loading ")


def test_a_text_that_is_in_no_catalogue_is_a_mistake(asked_in: Any) -> None:
    asked_in("en")
    with pytest.raises(KeyError):
        translate("No such text")


def test_values_are_filled_in_once(asked_in: Any) -> None:
    asked_in("de")
    assert translate("Weight of {name}", name="{name} & {0}") == "Gewicht von {name} & {0}"


def test_a_mark_holds_any_text() -> None:
    text = 'Write {subject} in the "prompt"…'
    marked = i18n(text)
    # As Gradio's page reads it: from the mark to the first brace that closes.
    inside = marked.removeprefix("__i18n__")
    assert inside.index("}") == len(inside) - 1
    assert json.loads(inside) == {"__type__": "translation_metadata", "key": I18N_KEY_PREFIX + text}


def test_gradio_has_a_table_for_each_language(words: TranslationCatalogue) -> None:
    assert set(words.translations) == set(LANGUAGES)
    assert words.translations["de"][I18N_KEY_PREFIX + "Generate"] == "Erzeugen"
    assert "<script>" in language.language_script_tag(FOLDER.parent)


def test_the_list_of_keys_is_in_the_catalogue(words: TranslationCatalogue) -> None:
    listed = {title for title, _ in shortcuts.SHORTCUTS} | {text for _, rows in shortcuts.SHORTCUTS for _, text in rows}
    assert not listed - words.tables["en"].keys()
