"""The page in a browser that prefers another language: everything fixed on it, and what a run says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.browser.pages.languages import TABS, WORDS, expect_a_page_and_a_run_in, tabs
from tests.browser.steps import EXAMPLES, run, settings, upload, write

# What is the same everywhere: shapes, formats, names of checkpoints and models; and what is said once the page is open.
NAMES = re.compile(
    r"\d+:\d+|PNG|JPEG|WebP|(FLUX\.2|Gemini|Mistral|Pixtral|Qwen).*|\W*|Download [\d.]+ [MG]B|Up to \d+ pictures: .*"
)


@pytest.mark.parametrize("locale", [locale for locale in WORDS if locale != "de-DE"])
def test_a_page_and_a_run_in_another_language(opened_in: Callable[..., Page], locale: str) -> None:
    expect_a_page_and_a_run_in(opened_in, locale)


def test_choices_mean_the_same_in_another_language(opened_in: Callable[..., Page]) -> None:
    page = opened_in("de-DE")
    form = page.locator("#generate")
    form.locator(".aspect label", has_text="Frei").click()
    form.get_by_label("Breite").fill("161")
    form.get_by_label("Breite").press("Tab")
    expect(form.locator(".prose.note", has_text="gerundet")).to_have_text(
        "Breite von 161 auf 160 gerundet: FLUX.2 zeichnet in Vielfachen von 16."
    )
    write(page, "generate", "a red apple")
    run(page, "generate")
    expect(page.locator("#progress")).to_contain_text("1 Bild in")
    assert settings(page)["Größe"] == "160 x 128"
    page.get_by_role("tab", name="Bearbeiten").click()
    run(page, "edit")
    expect(page.locator("#message .problem")).to_have_text(re.compile("^Zuerst ein"))
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(page.locator("#edit .prose.note", has_text="Wie Bild 1: 128 x 128 Pixel (1:1).")).to_be_visible()
    write(page, "edit", "paint it blue")
    run(page, "edit")
    expect(page.locator("#comparison")).to_contain_text("Vorher und nachher")
    expect(page.locator("#hold .hold")).to_have_text("Halten, um das Original zu sehen")


def test_an_unknown_language_is_english(opened_in: Callable[..., Page]) -> None:
    page = opened_in("fr-FR")
    expect(page.locator("html")).to_have_attribute("lang", "en")
    assert tabs(page) == TABS["en-US"]
    expect(page.locator("#preview .lead")).to_have_text("Your picture will appear here.")
    write(page, "generate", "a red apple")
    run(page, "generate")
    expect(page.locator("#progress")).to_contain_text("1 picture in")


def test_everything_fixed_is_in_the_catalogue(page: Page) -> None:
    config = page.evaluate("window.gradio_config")
    known = config["i18n_translations"]["en"]
    loose = {text for component in config["components"] for text in fixed(component) if not marked(text, known)}
    assert not loose, "write t(...) around it, and add it to each file in assets/languages/"


def fixed(component: dict[str, Any]) -> Iterator[str]:
    """The texts that somebody reads on a component as it was laid out."""
    props = component["props"]
    if component["type"] in ("state", "timer", "column", "row", "form", "html") or props.get("visible") == "hidden":
        return
    button = component["type"] in ("button", "uploadbutton", "downloadbutton")
    for name in ("label", "info", "placeholder", *(("value",) if button else ())):
        if isinstance(props.get(name), str):
            yield props[name]
    for choice in props.get("choices") or ():
        yield choice[0]


def marked(text: str, known: dict[str, str]) -> bool:
    if not text.startswith("__i18n__"):
        return bool(NAMES.fullmatch(text))
    return json.loads(text.removeprefix("__i18n__"))["key"] in known
