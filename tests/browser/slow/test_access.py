"""The page for everybody: axe-core looks at each tab, in light and dark, on a desk and on a phone."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.axe import violations
from tests.browser.steps import EXAMPLES, expect_finished, open_tab, run, set_count, upload, write
from tests.browser.studio import App


def test_what_a_run_leaves(page: Page, app: App) -> None:
    found = []
    run(page, "generate")
    expect(page.locator("#message .problem")).to_be_visible()
    found += violations(page, "an error")
    write(page, "generate", "a fox")
    set_count(page, "generate", 2)
    run(page, "generate")
    expect_finished(page, 2)
    found += violations(page, "two results")
    open_tab(page, "Edit")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(page.locator("#edit")).to_contain_text("As image 1: 128 x 128 pixels")
    page.locator("#edit .edits button.label-wrap").click()
    expect(page.locator("#edit .mask canvas")).to_be_visible()
    found += violations(page, "a mask")
    write(page, "edit", "make the background yellow")
    run(page, "edit")
    expect_finished(page)
    found += violations(page, "an edit and what it was made of")
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png")
    expect(page.locator("#multi")).to_contain_text("As image 1:")  # until then it is the browser's own view of them
    page.locator("#multi .references .thumbnail-item").first.click()
    page.locator("#multi .name").locator("input, textarea").fill("rocket")
    page.keyboard.press("Enter")
    expect(page.locator("#multi .references .caption-label").first).to_have_text("image 1 · @rocket")
    found += violations(page, "a named reference")
    page.locator("#multi .from-history").click()
    page.locator("#picker .tile").first.click()
    found += violations(page, "pictures of History to choose from")
    page.keyboard.press("Escape")
    open_tab(page, "Inspect")
    page.locator("#inspect .references input[type=file]").set_input_files(app.pictures()[-1])
    expect(page.locator("#inspect-restore")).to_be_visible()
    page.locator("#inspect-raw button.label-wrap").click()
    found += violations(page, "an inspection")
    open_tab(page, "History")
    expect(page.locator("#history .tile").first).to_be_visible()
    page.locator("#history .pick").first.check(force=True)
    found += violations(page, "History")
    page.locator("#history .open").first.click()
    expect(page.locator("#history .viewer")).to_be_visible()
    found += violations(page, "a picture of History")
    page.keyboard.press("Escape")
    open_tab(page, "Generate")
    page.locator("#checkpoint input").click()
    expect(page.get_by_role("option").first).to_be_visible()
    found += violations(page, "the checkpoints")
    assert not found, "\n\n".join(found)
