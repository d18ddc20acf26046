"""The page for everybody: axe-core looks at each tab, in light and dark, on a desk and on a phone."""

from __future__ import annotations

from playwright.sync_api import Page, expect

from tests.browser.pages.axe import TABS, UNFOLD, violations
from tests.browser.steps import open_tab, settle


def test_every_tab_before_anything_was_made(page: Page) -> None:
    found = []
    for tab in TABS:
        open_tab(page, tab)
        expect(page.get_by_role("tab", name=tab)).to_have_attribute("aria-selected", "true")
        if tab == "History":
            expect(page.locator("#history .nothing")).to_be_visible()
        while page.evaluate(UNFOLD):  # some are inside others
            settle(page)
        found += violations(page, tab)
    open_tab(page, "Generate")
    page.locator("#keys").click()
    expect(page.locator("#keys-help")).to_be_visible()
    found += violations(page, "Keys")
    assert not found, "\n\n".join(found)
