"""Many pictures of one idea, made and looked at in a real browser."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.exploring import side
from tests.browser.steps import (
    expect_explored,
    explore,
    open_tab,
    write,
)


def test_a_grid_with_labels_survives_a_reload(page: Page) -> None:
    write(page, "generate", "a red {fox|owl} on a white background")
    open_tab(page, "Explore")
    page.locator("#explore-kind").get_by_text("Grid", exact=True).click()
    side(page, "columns", "Prompt words", "red, blue, green")
    explore(page)
    expect_explored(page, 6)
    expect(page.locator("#explore-sheet thead th")).to_have_text(["red", "blue", "green"])
    expect(page.locator("#explore-sheet tbody th")).to_have_text(
        ["a red fox on a white background", "a red owl on a white background"]
    )
    page.reload()
    open_tab(page, "Explore")
    expect_explored(page, 6)
