"""The History tab in a real browser: pictures found again, large, changed, sent on; and nothing of it for others."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.pages.history import FOX, OWL, act, open_picture, tile, tiles
from tests.browser.steps import expect_finished, open_tab
from tests.browser.studio import App


def test_pictures_are_found_deleted_brought_back_and_made_again(filled: Page, app: App) -> None:
    page = filled
    expect(tiles(page).first.locator(".open")).to_have_accessible_name(re.compile("Open: a 3D OWL"))  # newest first
    expect(tile(page, "fox").locator("img")).to_be_visible()
    page.get_by_role("searchbox").fill("OWL blue")
    expect(tiles(page)).to_have_count(1)
    expect(page.locator("#history .count")).to_have_text("1 of 2 pictures")
    page.get_by_role("searchbox").fill("owl pink")
    expect(page.locator("#history .nothing")).to_contain_text("Nothing matches")
    page.locator("#history .filters").get_by_role("button", name="Clear").click()
    expect(tiles(page)).to_have_count(2)
    tile(page, "fox").hover()
    tile(page, "fox").locator(".heart").click()
    expect(tile(page, "fox").locator(".heart")).to_have_attribute("aria-pressed", "true")
    page.get_by_label("Favourites only").check()
    expect(tiles(page)).to_have_count(1)
    page.get_by_label("Favourites only").uncheck()
    expect(tiles(page)).to_have_count(2)
    page.locator("#history input[name=since]").fill("2999-01-01")
    expect(page.locator("#history .nothing")).to_be_visible()
    page.locator("#history input[name=since]").fill("")
    expect(tiles(page)).to_have_count(2)
    page.locator("#history select").select_option("nano")
    expect(tiles(page)).to_have_count(2)

    shown = open_picture(page, "OWL")
    expect(shown.locator("figure img:not(.before)")).to_have_js_property("complete", True)
    expect(shown.locator("table")).to_contain_text("128 x 128")
    expect(shown.locator("[data-do=newer]")).to_be_disabled()
    page.keyboard.press("ArrowRight")
    expect(shown.locator(".prompt-text")).to_have_text(FOX)  # with its tags, as text
    expect(shown.locator("[data-do=favourite]")).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("f")
    expect(shown.locator("[data-do=favourite]")).to_have_attribute("aria-pressed", "false")
    page.keyboard.press("ArrowLeft")
    expect(shown.locator(".prompt-text")).to_have_text(OWL)
    page.keyboard.press("Escape")
    expect(shown).to_be_hidden()
    expect(tile(page, "OWL").locator(".open")).to_be_focused()
    assert page.evaluate("window.hacked === undefined")
    assert page.locator("img[src=x]").count() == 0

    # Deleting is undone, and a selection comes as a zip.
    shown = open_picture(page, "OWL")
    page.keyboard.press("Delete")
    expect(shown.locator(".prompt-text")).to_have_text(FOX)
    expect(tiles(page)).to_have_count(1)
    shown.get_by_role("button", name="Undo").click()
    expect(shown.locator(".prompt-text")).to_have_text(OWL)
    page.keyboard.press("Escape")
    expect(tiles(page)).to_have_count(2)
    for word in ("fox", "OWL"):
        tile(page, word).hover()
        tile(page, word).locator(".pick").check()
    expect(page.locator("#history .count")).to_have_text("2 selected")
    with page.expect_download() as waited:
        page.get_by_role("button", name="Download as zip").click()
    assert waited.value.suggested_filename == "flux2-studio-2-pictures.zip"
    page.locator("#history .picked").get_by_role("button", name="Delete").click()
    expect(page.locator("#history .nothing")).to_be_visible()
    page.get_by_role("button", name="Bring back").click()
    expect(tiles(page)).to_have_count(2)

    # Settings are reused, and run again makes the same picture.
    before = app.pictures()
    open_picture(page, "fox")
    act(page, "reuse")
    expect(page.locator("#generate .prompt textarea")).to_be_visible()
    expect(page.locator("#generate .prompt textarea")).to_have_value(FOX)
    expect(page.locator("#generate").get_by_label("Seed", exact=True)).to_have_value("11")
    open_tab(page, "History")
    open_picture(page, "fox")
    act(page, "again")
    expect(page.locator("#settings")).to_contain_text(FOX)
    expect_finished(page)
    expect(page.locator("#settings")).to_contain_text("11")
    assert len(app.pictures()) == len(before) + 1
    open_tab(page, "History")
    expect(tiles(page)).to_have_count(3)  # the new one is at the top, unasked
    expect(tiles(page).first.locator(".open")).to_have_accessible_name(re.compile("fox"))
