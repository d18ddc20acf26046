"""What the page shows before a run: whether it fits, and the chosen checkpoint being loaded."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.test_page import choose_checkpoint, expect_finished, run, set_size, write


def test_whether_it_fits_stands_under_the_button(page: Page) -> None:
    line = page.locator("#generate .fit").first
    expect(line).to_have_text(re.compile(r"Fits: 0\.\d+ of [\d.]+ GB; everything stays"))
    before = line.inner_text()
    set_size(page, "generate", 512, 512)
    expect(line).not_to_have_text(before)
    expect(line).to_have_text(re.compile(r"Fits: 0\.\d"))


def test_a_chosen_checkpoint_is_loaded_at_once(page: Page) -> None:
    page.evaluate(
        """() => {
          window.told = [];
          const loading = document.getElementById('loading');
          new MutationObserver(() => window.told.push(loading.innerText.trim()))
            .observe(loading, {childList: true, subtree: true, characterData: true});
        }"""
    )
    choose_checkpoint(page, "FLUX.2 klein 4B")
    page.wait_for_function("() => window.told.length > 1 && window.told.at(-1) === ''")
    told = " ".join(page.evaluate("() => window.told"))
    assert "FLUX.2 klein 4B" in told, told
    expect(page.locator("#loading")).to_be_hidden()
    set_size(page, "generate", 64, 64)
    write(page, "generate", "a fox")
    run(page, "generate")
    expect_finished(page)
