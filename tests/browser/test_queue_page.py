"""Runs outlive the tab and the page, and wait their turn: seen from a real browser."""

from __future__ import annotations

from playwright.sync_api import Browser, Page, expect

from tests.browser.pages.history import id_of
from tests.browser.steps import (
    WATCH,
    choose_checkpoint,
    expect_finished,
    open_tab,
    press,
    queue_one,
    row,
    run,
    run_on,
    set_count,
    stop,
    write,
)
from tests.browser.studio import PATIENCE, App, open_studio


def test_a_reload_finds_the_run_again(page: Page) -> None:
    run_on(page)
    page.reload()
    page.evaluate(WATCH)
    expect(page.locator("#stop")).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("Step")
    page.wait_for_function("window.previews.size >= 2")  # and they go on
    stop(page)
    expect(page.locator("#progress")).to_contain_text("Stopped")
    expect(page.locator("#queue")).to_be_hidden()


def test_the_queue_is_put_in_order(page: Page, app: App) -> None:
    run_on(page)
    choose_checkpoint(page, "Nano (a toy, on board)")
    set_count(page, "generate", 1)
    for prompt in ("a lemon", "a <b>frog</b>", "a rocket"):
        queue_one(page, prompt)
    rows = page.locator("#queue li .prompt-text")
    expect(rows).to_have_text(["a 3D owl", "a lemon", "a <b>frog</b>", "a rocket"])
    press(page, "frog", "Earlier")
    expect(rows).to_have_text(["a 3D owl", "a <b>frog</b>", "a lemon", "a rocket"])
    expect(row(page, "frog")).to_contain_text("1 run before it")
    press(page, "lemon", "Take this run off the queue")
    expect(rows).to_have_text(["a 3D owl", "a <b>frog</b>", "a rocket"])
    place = page.locator("#queue").bounding_box()
    shown = page.locator("#preview img").get_attribute("src")
    expect(page.locator("#preview img")).not_to_have_attribute("src", str(shown))
    assert page.locator("#queue").bounding_box() == place  # nothing jumps while previews arrive
    press(page, "a 3D owl", "Take this run off the queue")
    expect(page.locator("#settings")).to_contain_text("a rocket")
    expect_finished(page)
    expect(page.locator("#queue")).to_be_hidden()


def test_another_browser_sees_nothing_of_queue_and_history(filled: Page, browser: Browser, app: App) -> None:
    page = filled
    id_ = id_of(page, "fox")
    addresses = [f"{app.url}history/{path}/{id_}" for path in ("picture", "thumbnail", "entry")]
    assert [page.request.get(address).status for address in addresses] == [200] * 3
    open_tab(page, "Generate")
    stranger = browser.new_context()
    stranger.set_default_timeout(PATIENCE)
    other = stranger.new_page()
    open_studio(other, app.url)
    open_tab(other, "History")
    expect(other.locator("#history .nothing")).to_contain_text("Your pictures will gather here")
    expect(other.locator("#history .nothing")).to_contain_text("Make the first one on the Generate tab")
    expect(other.locator("#history .filters")).to_be_hidden()
    assert [other.request.get(address).status for address in addresses] == [404] * 3
    other.evaluate("(id) => { window.studioHistory.asked = id; }", id_)
    other.locator("#history-edit").evaluate("(button) => button.click()")
    expect(other.get_by_text("not in your history any more")).to_be_visible()
    open_tab(other, "Generate")
    run_on(page)
    queue_one(page, "a secret lemon")
    write(other, "generate", "a frog")
    run(other, "generate")
    expect(row(other, "a frog")).to_contain_text("2 runs before it, 2 of them other people's")
    assert "lemon" not in other.content() and other.locator("#queue li").count() == 1
    press(page, "a secret lemon", "Take this run off the queue")
    stop(page)
    expect_finished(other)
    stranger.close()
