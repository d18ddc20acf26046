"""The list of presets."""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import (
    preset_button,
    preset_part,
    write,
)


def options(page: Page, search: str, form: str = "generate") -> Locator:
    """What the list offers for `search`, once it is there."""
    field = page.locator(f"#{form} .preset input")
    field.click()
    field.fill(search)
    return page.get_by_role("option")


def choose(page: Page, name: str, form: str = "generate") -> None:
    options(page, name.partition(" · ")[2], form).filter(has_text=name).first.click()
    expect(preset_part(page, "card", form).locator(".card")).to_be_visible()


def prompt(page: Page, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .prompt textarea")


def save(page: Page, name: str, text: str) -> None:
    write(page, "generate", text)
    page.locator("#generate .preset-name").get_by_label("Name").fill(name)
    preset_button(page, "save").click()
