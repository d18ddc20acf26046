"""The page in a browser that prefers another language: everything fixed on it, and what a run says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect

from tests.browser.conftest import PATIENCE, App, open_studio
from tests.browser.steps import EXAMPLES, run, settings, upload, write

TABS = {
    "en-US": ["Generate", "Edit", "Multi-reference", "Explore", "History", "Inspect", "Models"],
    "zh-CN": ["生成", "编辑", "多图参考", "探索", "历史", "检查", "模型"],
    "de-DE": ["Erzeugen", "Bearbeiten", "Multi-Referenz", "Erkunden", "Verlauf", "Prüfen", "Modelle"],
    "ja-JP": ["生成", "編集", "複数参照", "探索", "履歴", "検査", "モデル"],
}
# Of a page in each: the prompt's label and placeholder, the run button, what stands where the picture will be, how many
# pictures there are when one is done, and what steps are called.
WORDS = {
    "zh-CN": ("提示词", "图片要表现什么？", "生成", "图片将显示在这里。", "1 张图片，用时", "步数"),  # noqa: RUF001
    "de-DE": ("Prompt", "Was soll das Bild zeigen?", "Erzeugen", "Hier erscheint das Bild.", "1 Bild in", "Schritte"),
    "ja-JP": ("プロンプト", "どんな画像にしますか？", "生成", "ここに画像が表示されます。", "1 枚、", "ステップ数"),  # noqa: RUF001
}
# What is the same everywhere: shapes, formats, names of checkpoints and models; and what is said once the page is open.
NAMES = re.compile(
    r"\d+:\d+|PNG|JPEG|WebP|(FLUX\.2|Gemini|Mistral|Pixtral|Qwen).*|\W*|Download [\d.]+ [MG]B|Up to \d+ pictures: .*"
)


@pytest.fixture
def opened_in(browser: Browser, app: App) -> Iterator[Callable[..., Page]]:
    contexts: list[BrowserContext] = []

    def opened(locale: str) -> Page:
        context = browser.new_context(viewport={"width": 1440, "height": 900}, locale=locale)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        open_studio(page, app.url)
        return page

    yield opened
    for context in contexts:
        context.close()


def tabs(page: Page) -> list[str]:
    return [tab.inner_text() for tab in page.get_by_role("tab").all()]


def expect_nothing_cut_or_left_as_a_mark(page: Page) -> None:
    page.wait_for_timeout(1000)  # whatever is sent when the page is opened
    rows = page.get_by_role("tab").evaluate_all("(them) => new Set(them.map((it) => it.offsetTop)).size")
    assert rows == 1
    for number in range(page.get_by_role("tab").count()):
        page.get_by_role("tab").nth(number).click()
        page.wait_for_timeout(400)
        seen = page.locator("body").inner_text()
        assert "__i18n__" not in seen and "flux2-studio: " not in seen
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            cut = page.evaluate(
                """() => [...document.querySelectorAll('button:not(.label-wrap), label, h3, .chip')]
                    .filter((it) => it.offsetParent && it.scrollWidth > it.clientWidth + 2 && it.clientWidth)
                    .map((it) => it.textContent)"""
            )
            assert not cut
    page.get_by_role("tab").first.click()


@pytest.mark.parametrize("locale", WORDS)
def test_a_page_and_a_run_in_another_language(opened_in: Callable[..., Page], locale: str) -> None:
    label, placeholder, button, empty, done, steps = WORDS[locale]
    page = opened_in(locale)
    expect(page.locator("html")).to_have_attribute("lang", locale if locale == "zh-CN" else locale[:2])
    assert tabs(page) == TABS[locale]
    prompt = page.locator("#generate").get_by_label(label, exact=True)
    expect(prompt).to_have_attribute("placeholder", placeholder)
    expect(page.locator("#generate .run")).to_have_text(button)
    expect(page.locator("#preview .lead")).to_have_text(empty)
    expect_nothing_cut_or_left_as_a_mark(page)
    prompt.fill("a red apple")
    run(page, "generate")
    expect(page.locator("#progress")).to_contain_text(done)
    expect(page.locator("#gallery img").first).to_be_visible()
    assert settings(page)[label] == "a red apple"
    # The history is drawn by a script, and its rows come from a route of our own.
    page.get_by_role("tab", name=TABS[locale][4]).click()
    page.locator("#history .open").first.click()
    rows = page.locator("#history .viewer th")
    expect(rows.filter(has_text=re.compile(f"^{steps}$"))).to_be_visible()


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
