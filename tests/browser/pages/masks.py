"""The panel for masks and outpainting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import expect_finished, open_tab, upload, write

SIZE = (157, 211)

KEPT = "Only what is coloured may change"


def panel(page: Page, fox: Path) -> Locator:
    """The Edit tab's panel, opened, with a picture to edit and an instruction."""
    open_tab(page, "Edit")
    upload(page, "edit", fox)
    expect(page.locator("#edit")).to_contain_text("As image 1: 157 x 211 pixels")
    write(page, "edit", "make the background yellow")
    opened = page.locator("#edit .edits")
    opened.get_by_role("button", name="Mask and outpainting").click()
    expect(opened.locator("canvas")).to_be_visible()
    return opened


def said(edits: Locator) -> Locator:
    return edits.locator(".mask .said")


def downloaded(page: Page, tmp_path: Path) -> np.ndarray:
    expect_finished(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    file = tmp_path / "downloaded.png"
    download.value.save_as(file)
    return np.asarray(Image.open(file).convert("RGB"))


def changed(after: np.ndarray, fox: Path) -> np.ndarray:
    before = np.asarray(Image.open(fox).convert("RGB"))
    assert after.shape == before.shape
    return (after != before).any(-1)
