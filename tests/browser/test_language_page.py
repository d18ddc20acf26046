"""The page in a browser that prefers another language: everything fixed on it, and what a run says."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.browser.pages.languages import TABS, WORDS, expect_nothing_cut_or_left_as_a_mark, tabs
from tests.browser.steps import run, settings


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
