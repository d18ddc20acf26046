"""Live: the picture follows what a person types."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.live import PROMPT, go_live, live, made, saved, seen
from tests.browser.steps import (
    expect_finished,
    run,
)
from tests.browser.studio import App

# Collects the names of all pictures that the preview shows, from now on.
WATCH_NAMES = """() => {
  window.names = new Set();
  new MutationObserver(() => {
    const image = document.querySelector('#preview img');
    if (image) window.names.add(image.alt);
  }).observe(document.body, {childList: true, subtree: true, attributes: true});
}"""


def test_typing_gives_the_picture_of_the_last_prompt(page: Page, app: App) -> None:
    go_live(page)
    expect(page.locator("#progress")).to_contain_text("write a prompt")
    page.locator("#generate .prompt textarea").press_sequentially(PROMPT, delay=30)
    expect(page.locator("#generate .prompt textarea")).to_have_value(PROMPT)
    expect(live(page, PROMPT)).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("not saved")
    draft = seen(page)
    red, green, blue = draft[:6].reshape(-1, 3).mean(0)
    assert green > red + 40 and green > blue + 40
    assert not made(app, PROMPT)
    page.evaluate(WATCH_NAMES)

    run(page, "generate")
    expect_finished(page)
    names = [name for name in page.evaluate("[...window.names]") if name.startswith("Live picture: ")]
    assert names in ([], [f"Live picture: {PROMPT}"]), "nothing late took its place"
    (kept,) = made(app, PROMPT)
    picture = saved(kept)
    assert abs(draft - picture).mean() < 3, "what was seen is what is kept, but for the page's compression"
    # And typing goes on from there.
    page.locator("#generate .prompt textarea").press_sequentially("s")
    expect(live(page, PROMPT + "s")).to_be_visible()
    expect(page.locator("#gallery")).to_be_hidden()
