"""What a person does to change a part of a picture: paints, loads or types a mask, outpaints, compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from tests.browser.pages.masks import KEPT, changed, downloaded, panel, said
from tests.browser.steps import EXAMPLES, ends_with, expect_finished, open_tab, run, settings, upload, write


def test_only_what_was_painted_changes(page: Page, fox: Path, tmp_path: Path) -> None:
    edits = panel(page, fox)
    canvas = edits.locator("canvas")
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    assert box is not None
    x, y = box["x"] + box["width"] * 0.2, box["y"] + box["height"] * 0.3
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + box["width"] * 0.6, y, steps=5)
    page.mouse.up()
    expect(said(edits)).to_contain_text(KEPT)
    run(page, "edit")
    now = changed(downloaded(page, tmp_path), fox)
    rows = np.nonzero(now.any(1))[0]
    assert 211 * 0.2 < rows.min() < rows.max() < 211 * 0.4 and now.sum() > 500
    assert settings(page)["Mask"].endswith(".png")


def test_references_are_added_put_in_order_and_removed(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_text(["image 1", "image 2"])
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(EXAMPLES / "fox.png")
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    pictures = page.locator("#multi .references .thumbnail-item")
    pictures.nth(2).click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(captions).to_have_text(["image 1", "image 2"])
    pictures.nth(1).click()
    page.get_by_role("button", name="Earlier").click()
    expect(pictures.first.locator("img")).to_have_attribute("src", ends_with("car.png"))
    write(page, "multi", "the object of image 1 on the background of image 2")
    run(page, "multi")
    expect_finished(page)
    assert settings(page)["References"] == "car.png, rocket.png"
