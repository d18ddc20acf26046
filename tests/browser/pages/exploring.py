"""The Explore tab."""

from __future__ import annotations

from playwright.sync_api import Page


def side(page: Page, name: str, field: str, values: str) -> None:
    page.locator(f"#explore-{name} input").click()
    page.get_by_role("option", name=field, exact=True).click()
    page.locator(f"#explore-{name}-values textarea").fill(values)
