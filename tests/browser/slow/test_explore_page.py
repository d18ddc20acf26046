"""Many pictures of one idea, made and looked at in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from tests.browser.steps import (
    choose_checkpoint,
    expect_explored,
    explore,
    explored_pictures,
    open_tab,
    set_number,
    write,
)
from tests.browser.studio import PATIENCE, App, open_studio


def test_seeds_side_by_side(page: Page, app: App, tmp_path: Path) -> None:
    write(page, "generate", "a red apple")
    open_tab(page, "Explore")
    expect(page.locator("#explore-sheet")).to_contain_text("side by side")
    set_number(page.locator("#explore-seeds input[type=number]"), 4)
    explore(page)
    expect_explored(page, 4)
    for picture in explored_pictures(page).all():
        picture.scroll_into_view_if_needed()
        expect(picture).to_have_js_property("complete", True)
        assert picture.evaluate("image => image.naturalWidth") == 128
    with page.expect_download() as download:
        page.get_by_role("link", name="Contact sheet").click()
    download.value.save_as(tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").width > 2 * 128
    # Each is a picture like any other, with its own settings.
    with page.context.expect_page() as opened:
        explored_pictures(page).first.click()
    assert re.search(r"\.png$", opened.value.url)


def test_stopped_and_gone_on_with(page: Page) -> None:
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    steps = page.locator("#generate .steps input[type=number]")
    expect(steps).to_have_value("20")  # the form is laid out for it
    set_number(steps, 40)  # the rest is not done before it is stopped
    write(page, "generate", "a lemon")
    open_tab(page, "Explore")
    set_number(page.locator("#explore-seeds input[type=number]"), 6)
    explore(page)
    expect(explored_pictures(page)).not_to_have_count(0)
    page.locator("#explore-stop").click()
    expect(page.locator("#explore-progress")).to_contain_text("Stopped")
    assert explored_pictures(page).count() < 6
    page.locator("#explore-more").click()
    expect_explored(page, 6)
    expect(page.locator("#explore-more")).to_be_hidden()


def test_a_file_and_what_is_wrong_with_it(page: Page, tmp_path: Path) -> None:
    wrong, right = tmp_path / "wrong.csv", tmp_path / "right.csv"
    wrong.write_text("prompt,seed\na fox,one\n")
    right.write_text("prompt,seed\na fox,1\n<b>an owl</b>,2\n")
    write(page, "generate", "anything")
    open_tab(page, "Explore")
    page.locator("#explore-kind").get_by_text("From a file", exact=True).click()
    page.locator("#explore-file input[type=file]").set_input_files(wrong)
    expect(page.locator("#explore-file")).to_contain_text("wrong")
    explore(page)
    expect(page.locator("#explore-problem")).to_contain_text("Row 2: seed is 'one'")
    page.locator("#explore-file").get_by_label("Remove").or_(
        page.locator("#explore-file [aria-label='Clear']")
    ).first.click()
    page.locator("#explore-file input[type=file]").set_input_files(right)
    expect(page.locator("#explore-file")).to_contain_text("right")
    explore(page)
    expect_explored(page, 2)
    expect(page.locator("#explore-problem")).to_be_hidden()
    expect(page.locator("#explore-sheet thead th")).to_have_text(["a fox", "<b>an owl</b>"])


def test_anothers_exploration_is_not_shown(open_page: Callable[[], Page], browser: Browser, app: App) -> None:
    mine = open_page()
    write(mine, "generate", "a frog")
    open_tab(mine, "Explore")
    set_number(mine.locator("#explore-seeds input[type=number]"), 2)
    explore(mine)
    expect_explored(mine, 2)
    with browser.new_context() as other:
        other.set_default_timeout(PATIENCE)
        page = other.new_page()
        open_studio(page, app.url)
        open_tab(page, "Explore")
        expect(page.locator("#explore-sheet")).to_contain_text("side by side")
        mine.reload()  # and while it finds its own again, the other finds nothing
        open_tab(mine, "Explore")
        expect_explored(mine, 2)
        expect(explored_pictures(page)).to_have_count(0)
