"""The History tab in a real browser: pictures found again, large, changed, sent on; and nothing of it for others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser.conftest import PATIENCE, App
from tests.browser.steps import expect_finished, open_tab, run, write

FOX = "a flat fox <img src=x onerror='window.hacked=1'> on a pink background"
OWL = "a 3D OWL on a blue background"


@pytest.fixture
def filled(remember: Callable[[str, int], Path], open_page: Callable[[], Page]) -> Page:
    """A browser's page whose history holds a fox and, newer, an owl."""
    remember(FOX, 11)
    remember(OWL, 12)
    page = open_page()
    open_tab(page, "History")
    expect(tiles(page)).to_have_count(2)
    return page


def tiles(page: Page) -> Locator:
    return page.locator("#history .tile")


def tile(page: Page, word: str) -> Locator:
    return page.locator("#history .tile").filter(has=page.get_by_role("button", name=re.compile(f"Open: .*{word}")))


def viewer(page: Page) -> Locator:
    return page.locator("#history .viewer")


def open_picture(page: Page, word: str) -> Locator:
    tile(page, word).locator(".open").click()
    expect(viewer(page)).to_be_visible()
    expect(viewer(page).locator(".prompt-text")).to_contain_text(word)
    return viewer(page)


def act(page: Page, name: str) -> None:
    viewer(page).locator(f"[data-do={name}]").click()


def id_of(page: Page, word: str) -> str:
    return tile(page, word).get_attribute("data-id") or ""


def test_pictures_are_found_marked_and_looked_at_by_keys(filled: Page) -> None:
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


def test_deleting_is_undone_and_a_selection_comes_as_a_zip(filled: Page) -> None:
    page = filled
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


def test_settings_are_reused_and_run_again_makes_the_same_picture(filled: Page, app: App) -> None:
    page = filled
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


def test_another_browser_sees_nothing_of_it_and_is_told_what_to_do(filled: Page, browser: Browser, app: App) -> None:
    id_ = id_of(filled, "fox")
    addresses = [f"{app.url}history/{path}/{id_}" for path in ("picture", "thumbnail", "entry")]
    assert [filled.request.get(address).status for address in addresses] == [200] * 3
    other = browser.new_context()
    try:
        other.set_default_timeout(PATIENCE)
        page = other.new_page()
        page.goto(app.url)
        open_tab(page, "History")
        expect(page.locator("#history .nothing")).to_contain_text("Your pictures will gather here")
        expect(page.locator("#history .nothing")).to_contain_text("Make the first one on the Generate tab")
        expect(page.locator("#history .filters")).to_be_hidden()
        assert [page.request.get(address).status for address in addresses] == [404] * 3
        page.evaluate("(id) => { window.studioHistory.asked = id; }", id_)
        page.locator("#history-edit").evaluate("(button) => button.click()")
        expect(page.get_by_text("not in your history any more")).to_be_visible()
    finally:
        other.close()


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
