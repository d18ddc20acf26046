"""The panel that enhances a prompt."""

from __future__ import annotations

from playwright.sync_api import Locator, Page

KEY = "sk-or-v1-typed-on-the-page"

RICH = "A flat red apple on a yellow background"


def panel(page: Page, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .upsampling")


def unfold(page: Page, by: str, form: str = "generate") -> Locator:
    """The panel, open, with `by` chosen."""
    here = panel(page, form)
    here.locator(".label-wrap").first.click()
    here.get_by_label(by).check()
    return here
