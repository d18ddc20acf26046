"""What a person does to change a part of a picture: paints, loads or types a mask, outpaints, compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from playwright.sync_api import Page, expect

from tests.browser.pages.masks import KEPT, changed, downloaded, panel, said
from tests.browser.steps import run, settings


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
