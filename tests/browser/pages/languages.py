"""The page in other languages."""

from __future__ import annotations

import re
from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.browser.steps import run, settings, settle

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


def tabs(page: Page) -> list[str]:
    return [tab.inner_text() for tab in page.get_by_role("tab").all()]


def expect_nothing_cut_or_left_as_a_mark(page: Page) -> None:
    rows = page.get_by_role("tab").evaluate_all("(them) => new Set(them.map((it) => it.offsetTop)).size")
    assert rows == 1
    for number in range(page.get_by_role("tab").count()):
        page.get_by_role("tab").nth(number).click()
        expect(page.get_by_role("tab").nth(number)).to_have_attribute("aria-selected", "true")
        settle(page)
        expect(page.locator("body")).not_to_contain_text(re.compile("__i18n__|flux2-studio: "), use_inner_text=True)
        for width in (390, 1440):
            page.set_viewport_size({"width": width, "height": 900})
            settle(page)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            cut = page.evaluate(
                """() => [...document.querySelectorAll('button:not(.label-wrap), label, h3, .chip')]
                    .filter((it) => it.offsetParent && it.scrollWidth > it.clientWidth + 2 && it.clientWidth)
                    .map((it) => it.textContent)"""
            )
            assert not cut
    page.get_by_role("tab").first.click()


def expect_a_page_and_a_run_in(opened_in: Callable[..., Page], locale: str) -> None:
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
