"""The last preview of a stopped run, kept on one click."""

from __future__ import annotations

from PIL import Image
from playwright.sync_api import Page, expect

from flux2_studio.provenance import metadata
from tests.browser.steps import choose_checkpoint, open_tab, set_number, set_size, write
from tests.browser.studio import App


def test_a_stopped_run_s_preview_is_kept(page: Page, app: App) -> None:
    before = set(app.pictures())
    keep = page.locator("#keep-preview")
    expect(keep).to_be_hidden()
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    steps = page.locator("#generate .steps input[type=number]")
    expect(steps).to_have_value("20")
    set_number(steps, 100)
    write(page, "generate", "a 3D whale, half done")
    set_size(page, "generate", 256, 256)
    page.locator("#generate .run").click()
    expect(page.locator("#preview img")).to_be_visible()
    expect(keep).to_be_hidden()
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped before a picture was finished")
    keep.click()
    expect(page.locator("#progress")).to_contain_text("Kept an unfinished preview, after step")
    expect(page.locator("#gallery img").first).to_be_visible()
    expect(page.locator("#download")).to_be_visible()
    expect(keep).to_be_hidden()
    (made,) = set(app.pictures()) - before
    assert Image.open(made).size == (256, 256)
    record = metadata.read_settings(made.read_bytes()).record
    assert record is not None and record.unfinished is not None and record.unfinished[1] == 100
    open_tab(page, "History")
    page.get_by_role("button", name="Open: a 3D whale, half done").click()
    expect(page.locator("#history .viewer tbody")).to_contain_text("a preview, kept after step")
    page.keyboard.press("Escape")
    # The next run has nothing of it.
    open_tab(page, "Generate")
    set_number(steps, 2)
    set_size(page, "generate", 128, 128)
    page.locator("#generate .run").click()
    expect(page.locator("#progress")).to_contain_text("1 picture in")
    expect(keep).to_be_hidden()
