"""The History tab in a real browser: pictures found again, large, changed, sent on; and nothing of it for others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.pages.history import FOX, OWL, act, open_picture, tile, tiles, viewer
from tests.browser.steps import expect_finished, open_tab, run, write
from tests.browser.studio import App


def test_a_picture_is_varied(filled: Page, app: App) -> None:
    page = filled
    before = app.pictures()
    open_picture(page, "OWL")
    act(page, "vary")
    expect_finished(page)
    expect(page.locator("#settings")).to_contain_text(OWL)
    expect(page.locator("#settings")).not_to_contain_text(re.compile(r"Seed\s*12\b"))
    open_tab(page, "History")
    expect(tiles(page)).to_have_count(3)
    assert len(app.pictures()) == len(before) + 1
    open_picture_at(page, 0)
    expect(viewer(page).locator(".prompt-text")).to_have_text(OWL)
    expect(viewer(page).locator("table")).not_to_contain_text(re.compile(r"Seed\s*12\b"))


def open_picture_at(page: Page, place: int) -> None:
    tiles(page).nth(place).locator(".open").click()
    expect(viewer(page)).to_be_visible()


def test_a_picture_is_sent_on_and_knows_what_became_of_it(filled: Page) -> None:
    page = filled
    open_picture(page, "OWL")
    act(page, "multi")
    expect(page.locator("#multi .references img")).to_have_count(1)
    open_tab(page, "History")
    open_picture(page, "fox")
    act(page, "multi")
    expect(page.locator("#multi .references img")).to_have_count(2)
    open_tab(page, "History")
    open_picture(page, "fox")
    act(page, "edit")
    expect(page.locator("#edit .references img")).to_be_visible()
    write(page, "edit", "paint it blue")
    run(page, "edit")
    expect(page.locator("#settings")).to_contain_text("paint it blue")
    expect_finished(page)
    open_tab(page, "History")
    shown = open_picture(page, "paint it blue")
    shown.locator(".from [data-open]").click()
    expect(shown.locator(".prompt-text")).to_have_text(FOX)
    shown.locator(".into [data-open]").click()
    expect(shown.locator(".prompt-text")).to_have_text("paint it blue")
    act(page, "again")  # an edit again, with its reference
    expect(page.locator("#edit .references img")).to_be_visible()
    expect_finished(page)
    open_tab(page, "History")
    expect(tiles(page)).to_have_count(4)


def test_a_lost_file_is_a_marked_tile(remember: Callable[[str, int], Path], open_page: Callable[[], Page]) -> None:
    file = remember(OWL, 12)
    page = open_page()
    open_tab(page, "History")
    expect(tile(page, "OWL").locator("img")).to_be_visible()
    file.unlink()
    expect(tile(page, "OWL").locator(".lost")).to_have_text("The file is missing")  # at the next look
    shown = open_picture(page, "OWL")
    expect(shown.locator("figure .lost")).to_contain_text("Run again makes it once more")
    expect(shown.locator("[data-do=edit]")).to_be_disabled()


def test_works_on_a_phone(filled: Page) -> None:
    page = filled
    page.set_viewport_size({"width": 390, "height": 844})
    open_picture(page, "OWL")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = viewer(page).locator("[data-do=vary]").bounding_box()
    assert box is not None and box["height"] >= 44 and box["x"] + box["width"] <= 390
    act(page, "older")
    expect(viewer(page).locator(".prompt-text")).to_have_text(FOX)
