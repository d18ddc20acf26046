"""Before and after, on the stage and in History: slider, hold, flicker; and a range picked with Shift."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import EXAMPLES, expect_finished, open_tab, run, upload, write
from tests.browser.studio import App

# How often the class "held" comes or goes while 2.2 seconds pass.
TURNS = """([selector]) => new Promise((done) => {
  const watched = document.querySelector(selector);
  let [turns, held] = [0, watched.classList.contains('held')];
  new MutationObserver(() => {
    if (watched.classList.contains('held') !== held) { turns += 1; held = !held; }
  }).observe(watched, {attributes: true});
  setTimeout(() => done(turns), 2200);
})"""
HELD = re.compile(r"\bheld\b")


@pytest.fixture
def edited(page: Page) -> Page:
    """A page that has just edited the fox."""
    open_tab(page, "Edit")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(page.locator("#edit")).to_contain_text("As image 1: 128 x 128 pixels")
    write(page, "edit", "make the background yellow")
    run(page, "edit")
    expect_finished(page)
    return page


def expect_flicker(page: Page, button: Locator, selector: str) -> None:
    """It changes about twice a second, until it is pressed again; for who asks for less motion, at each press."""
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    assert 2 <= page.evaluate(TURNS, [selector]) <= 5
    button.click()
    expect(button).to_have_attribute("aria-pressed", "false")
    expect(page.locator(selector)).not_to_have_class(HELD)
    page.emulate_media(reduced_motion="reduce")
    button.click()
    expect(page.locator(selector)).to_have_class(HELD)
    assert page.evaluate(TURNS, [selector]) == 0
    button.click()
    expect(page.locator(selector)).not_to_have_class(HELD)
    page.emulate_media(reduced_motion="no-preference")


def test_before_and_after(edited: Page, app: App) -> None:
    page = edited
    flicker = page.locator("#hold .flicker")
    flicker.scroll_into_view_if_needed()
    expect_flicker(page, flicker, "#compare")

    open_tab(page, "History")
    page.locator("#history .tile .open").first.click()
    viewer = page.locator("#history .viewer")
    original, result = viewer.locator("figure .before"), viewer.locator("figure img").first
    expect(viewer.locator(".comparison")).to_be_visible()
    expect(original).to_be_hidden()
    viewer.locator(".slide").click()
    expect(original).to_be_visible()
    expect(original).to_have_js_property("naturalWidth", 128)
    assert original.bounding_box() == result.bounding_box()
    slider = viewer.get_by_role("slider")
    prompt = viewer.locator(".prompt-text").inner_text()
    slider.focus()
    page.keyboard.press("ArrowRight")  # moves the slider, and turns no page
    expect(slider).to_have_value("51")
    expect(viewer.locator(".prompt-text")).to_have_text(prompt)
    box = viewer.locator("figure").bounding_box()
    assert box
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 3)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 3, steps=4)
    page.mouse.up()
    expect(slider).to_have_value("25")
    clip = original.evaluate("(it) => getComputedStyle(it).clipPath")
    assert "75%" in clip, clip
    viewer.locator(".slide").click()
    expect(original).to_be_hidden()
    viewer.locator(".hold").hover()
    page.mouse.down()
    expect(original).to_be_visible()
    page.mouse.up()
    expect(original).to_be_hidden()
    expect_flicker(page, viewer.locator(".flicker"), "#history .viewer figure")
    viewer.locator(".flicker").click()
    page.keyboard.press("Escape")
    expect(viewer).to_be_hidden()
    page.locator("#history .tile .open").first.click()
    expect(viewer.locator(".flicker")).to_have_attribute("aria-pressed", "false")
    expect(original).to_be_hidden()
    assert "Traceback" not in app.log.read_text()


def test_shift_picks_a_range(remember: Callable[[str, int], Path], open_page: Callable[[], Page]) -> None:
    for seed in range(4):
        remember("a frog", seed)
    page = open_page()
    open_tab(page, "History")
    tiles, count = page.locator("#history .tile"), page.locator("#history .count")
    expect(tiles).to_have_count(4)
    picks = page.locator("#history .tile .pick")
    picks.nth(0).check()
    expect(count).to_have_text("1 selected")
    picks.nth(3).click(modifiers=["Shift"])
    expect(count).to_have_text("4 selected")
    expect(picks.nth(2)).to_be_checked()
    picks.nth(2).click(modifiers=["Shift"])  # and takes it back, from the one that was clicked last
    expect(count).to_have_text("2 selected")
    tiles.nth(2).locator(".open").click(modifiers=["Shift"])
    expect(count).to_have_text("3 selected")
    expect(page.locator("#history .viewer")).to_be_hidden()
    # None of it is written down: without Shift, a picture is opened.
    tiles.nth(0).locator(".open").click()
    expect(page.locator("#history .viewer")).to_be_visible()
    expect(page.locator("#history .comparison")).to_be_hidden()  # it was made from nothing
