"""Reference pictures that have names, and those that come out of History, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import EXAMPLES, expect_finished, open_tab, run, upload, write

Remember = Callable[[str, int], Path]


def captions(page: Page) -> Locator:
    return page.locator("#multi .references .caption-label")


def select(page: Page, place: int) -> Locator:
    """Select the picture in that place; returns the field for its name."""
    page.locator("#multi .references .gallery-item").nth(place).click()
    field = page.locator("#multi .name").locator("input, textarea")
    expect(field).to_be_enabled()
    return field


def test_a_named_picture_is_called_by_its_name(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png", EXAMPLES / "fox.png")
    expect(captions(page)).to_have_text(["image 1", "image 2", "image 3"])
    expect(page.locator("#multi .name").locator("input, textarea")).to_be_disabled()
    field = select(page, 2)
    field.fill("fox")
    field.press("Enter")
    expect(captions(page)).to_have_text(["image 1", "image 2", "image 3 · @fox"])
    # Nobody need press Enter: what is done with the pictures next takes the name along.
    field.fill("Red fox")
    select(page, 1)
    expect(captions(page)).to_have_text(["image 1", "image 2", "image 3 · @Red-fox"])
    expect(field).to_have_value("")
    field.fill("red-FOX")
    field.press("Enter")
    expect(page.locator("#multi .block.refused")).to_contain_text("Another picture is called @red-FOX already")
    field.fill("car")
    page.locator("#multi").get_by_role("button", name="Earlier").click()
    expect(captions(page)).to_have_text(["image 1 · @car", "image 2", "image 3 · @Red-fox"])
    write(page, "multi", "the object of @red-fox on the background of @car, not @dog")
    run(page, "multi")
    expect(page.locator(".toast-body")).to_contain_text("No picture here is called @dog")
    expect_finished(page)
    told = page.locator("#settings tr", has_text="Prompt")
    expect(told).to_contain_text("the object of image 3 on the background of image 1, not @dog")
    expect(page.locator("#settings tr", has_text="References")).to_contain_text("car.png, rocket.png, fox.png")


def test_pictures_of_history_are_chosen_in_their_order(remember: Remember, open_page: Callable[[], Page]) -> None:
    lost = remember("a lost <b>star</b>", 10)
    for seed, prompt in enumerate(("a flat fox", "a 3D owl", "a flat car"), 11):
        remember(prompt, seed)
    lost.unlink()
    page = open_page()
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "fox.png")
    expect(captions(page)).to_have_text(["image 1"])
    field = select(page, 0)
    field.fill("mine")
    field.press("Enter")
    expect(captions(page)).to_have_text(["image 1 · @mine"])
    opens = page.locator("#multi .from-history")
    opens.click()
    picker = page.locator("#picker")
    tiles = picker.locator(".tile")
    expect(tiles).to_have_count(4)
    expect(tiles.nth(3)).to_be_disabled()
    expect(tiles.nth(3)).to_have_text("The file is missing")
    expect(picker.locator(".add")).to_be_hidden()
    picker.locator(".tile", has=page.locator("img")).nth(2).click()  # the fox, which is the oldest
    tiles.nth(0).click()
    tiles.nth(1).click()
    tiles.nth(0).click()  # not that one, after all
    expect(picker.locator(".place")).to_have_text(["", "2", "1", ""])
    expect(tiles.nth(2)).to_have_attribute("aria-pressed", "true")
    expect(picker.locator(".add")).to_have_text("Add 2 pictures")
    picker.locator(".add").click()
    expect(picker).to_be_hidden()
    expect(captions(page)).to_have_text(["image 1 · @mine", "image 2", "image 3"])
    sources = page.locator("#multi .references img").evaluate_all("(all) => all.map((it) => it.src)")
    assert [re.search(r"-(\d\d)-[^/]*png$|fox.png$", source) is not None for source in sources] == [True] * 3, sources
    seeds = [found[1] for source in sources if (found := re.search(r"-(\d\d)-[^/]*png$", source))]
    assert seeds == ["11", "12"], "in the order in which they were chosen"
    opens.click()
    picker.locator("input").fill("nothing like this")
    expect(picker.locator("[role=status]")).to_have_text("Nothing matches.")
    picker.locator("input").fill("owl")
    expect(tiles).to_have_count(1)
    picker.locator("input").fill("")
    expect(tiles).to_have_count(4)
    page.keyboard.press("Escape")
    expect(picker).to_be_hidden()
    expect(captions(page)).to_have_count(3)
    open_tab(page, "Edit")
    page.locator("#edit .from-history").click()
    tiles.first.click()  # one is all that it takes
    expect(picker).to_be_hidden()
    expect(page.locator("#edit .references img")).to_have_attribute("src", re.compile("-13-[^/]*png$"))


def test_an_empty_history_says_what_to_do(page: Page) -> None:
    open_tab(page, "Edit")
    page.locator("#edit .from-history").click()
    status = page.locator("#picker [role=status]")
    expect(status).to_have_text("No picture yet: make the first one on the Generate tab.")
    page.locator("#picker .close").click()
    expect(page.locator("#picker")).to_be_hidden()
