"""Live: the picture follows what a person types."""

from __future__ import annotations

from collections.abc import Callable

from playwright.sync_api import Page, expect

from tests.browser.pages.live import PROMPT, go_live, live, made, seen
from tests.browser.steps import (
    EXAMPLES,
    WATCH,
    choose_checkpoint,
    open_tab,
    problem,
    run_for_long,
    set_size,
    upload,
    wait_until,
    write,
)
from tests.browser.studio import App

assert len(PROMPT) == 30


def test_other_fields_are_followed_too(page: Page) -> None:
    write(page, "generate", "a flat frog")
    go_live(page)
    expect(live(page, "a flat frog")).to_be_visible()
    first = page.locator("#preview img").get_attribute("src")
    page.locator("#generate .roll").click()
    page.wait_for_function("first => document.querySelector('#preview img').src !== first", arg=first)
    set_size(page, "generate", 192, 128)
    page.wait_for_function("() => document.querySelector('#preview img').naturalWidth === 192")


def test_an_edit_follows_its_instruction(page: Page, app: App) -> None:
    before = made(app, "make the background green")
    open_tab(page, "Edit")
    go_live(page, "edit")
    write(page, "edit", "make the background green")
    expect(page.locator("#progress")).to_contain_text("Add a picture first")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(live(page, "make the background green")).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("not saved")  # no preview of a step
    green = seen(page)[:6].reshape(-1, 3).mean(0)
    assert green[1] > green[0] + 40 and green[1] > green[2] + 40
    assert made(app, "make the background green") == before


def test_it_is_for_checkpoints_of_few_steps(page: Page) -> None:
    go_live(page)
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    expect(page.locator("#generate .live")).to_be_hidden()
    write(page, "generate", "a frog")
    choose_checkpoint(page, "Nano (a toy, on board)")
    expect(page.locator("#generate .live input")).not_to_be_checked()


def test_a_run_of_the_tab_is_not_disturbed(open_page: Callable[[], Page]) -> None:
    page = open_page()
    run_for_long(page)
    expect(page.locator("#progress")).to_contain_text("Step")
    choose_checkpoint(page, "Nano (a toy, on board)")
    go_live(page)
    write(page, "generate", "a flat frog")
    page.evaluate(WATCH)
    wait_until(page, "() => window.previews.size >= 3")  # the run goes on
    expect(page.locator("#progress")).to_contain_text("Step")
    expect(live(page, "a flat frog")).to_have_count(0)
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped")
    write(page, "generate", "a flat owl")
    expect(live(page, "a flat owl")).to_be_visible()
    expect(problem(page)).to_have_count(0)
