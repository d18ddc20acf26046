"""The Inspect tab in a real browser: what a picture says, and back to the form that made it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from tests.browser.pages.inspection import expect_ignored, inspect, pixels
from tests.browser.steps import expect_finished, run, set_size, write
from tests.browser.studio import App


def test_a_picture_says_all_of_itself_and_is_made_again_and_a_hostile_one_nothing(
    page: Page, app: App, tmp_path: Path
) -> None:
    write(page, "generate", "a flat <b>fox</b> on a pink background")
    set_size(page, "generate", 256, 256)
    run(page, "generate")
    expect_finished(page)
    first = app.pictures()[-1]
    page.reload()
    inspect(page, first)
    report = page.locator("#inspect")
    expect(report).to_contain_text("a flat <b>fox</b> on a pink background")
    expect(report).to_contain_text("Watermark found: 46 of the 46 bits")
    expect(report).to_contain_text("unchanged since this installation signed it")
    page.locator("#inspect-restore").click()
    prompt = page.locator("#generate .prompt textarea")
    expect(prompt).to_be_visible()
    expect(prompt).to_have_value("a flat <b>fox</b> on a pink background")
    run(page, "generate")
    expect_finished(page)
    again = app.pictures()[-1]
    assert again != first
    np.testing.assert_array_equal(pixels(again), pixels(first))

    # A hostile picture is ignored with a message, and so is what is none.
    expect_ignored(page, tmp_path, "html")
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"not a picture")
    inspect(page, rubbish)
    expect(page.locator("#inspect")).to_contain_text("not a picture")
    expect(page.locator("#inspect-restore")).to_be_hidden()
