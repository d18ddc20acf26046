"""The Inspect tab in a real browser: what a picture says, and back to the form that made it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from tests.browser.pages.inspection import GOOD, HOSTILE, changed, expect_ignored, inspect, pixels
from tests.browser.steps import EXAMPLES, expect_finished, open_tab, run, set_count, upload, write
from tests.browser.studio import App


def test_an_edit_of_a_batch_comes_back_with_its_reference(page: Page, app: App, tmp_path: Path) -> None:
    reference = tmp_path / "mine.png"
    reference.write_bytes((EXAMPLES / "penguin.png").read_bytes())
    open_tab(page, "Edit")
    upload(page, "edit", reference)
    expect(page.locator("#edit .references img")).to_be_visible()
    write(page, "edit", "make the background green")
    set_count(page, "edit", 2)
    run(page, "edit")
    expect_finished(page, 2)
    *_, _, second = app.pictures()
    reference.unlink()
    page.reload()
    inspect(page, second)
    page.locator("#inspect-restore").click()
    expect(page.locator("#edit .references img")).to_be_visible()
    expect(page.locator("#edit .prompt textarea")).to_have_value("make the background green")
    run(page, "edit")
    expect_finished(page, 2)
    again = app.pictures()[-1]
    assert again != second
    np.testing.assert_array_equal(pixels(again), pixels(second))


def test_one_changed_pixel_is_told(page: Page, app: App, tmp_path: Path) -> None:
    write(page, "generate", "a flat fox")
    run(page, "generate")
    expect_finished(page)
    forged = tmp_path / "forged.png"
    forged.write_bytes(changed(app.pictures()[-1].read_bytes()))
    inspect(page, forged)
    expect(page.locator("#inspect")).to_contain_text("The picture was changed after it was signed")


def test_hostile_pictures_are_ignored_with_a_message(page: Page, tmp_path: Path) -> None:
    for kind in HOSTILE:
        if kind != "html":  # that one is among the quick tests
            expect_ignored(page, tmp_path, kind)


def test_rubbish_is_told_and_what_cannot_be_restored_explained(page: Page, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"not a picture")
    inspect(page, rubbish)
    expect(page.locator("#inspect")).to_contain_text("not a picture")
    expect(page.locator("#inspect-restore")).to_be_hidden()
    info = PngInfo()
    info.add_text("parameters", json.dumps(GOOD | {"checkpoint": {"name": "sdxl", "label": "SDXL", "sha256": ""}}))
    file = tmp_path / "unknown.png"
    Image.new("RGB", (64, 64), "teal").save(file, pnginfo=info)
    inspect(page, file)
    expect(page.get_by_text("this studio has no checkpoint called 'sdxl'")).to_be_visible()


def test_formats_and_marks_are_chosen_on_the_page_and_it_says_its_safety_policy(page: Page, app: App) -> None:
    expect(page.locator("#policy")).to_have_text(
        "Safety check: warnings only. What it flags is told, and shown all the same."
    )
    write(page, "generate", "a flat fox")
    marks = page.locator("#generate .marks")
    marks.locator(".label-wrap").first.click()
    expect(marks).to_contain_text("it does not prove who made it")
    marks.get_by_label("JPEG").check()
    marks.get_by_label("Content credentials").uncheck()
    run(page, "generate")
    expect_finished(page)
    newest = max((app.home / "outputs").rglob("*.jpg"), key=lambda path: path.stat().st_mtime_ns)
    data = newest.read_bytes()
    assert Image.open(newest).format == "JPEG" and b"c2pa" not in data and b"a flat fox" in data
