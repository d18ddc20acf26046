"""The History tab."""

from __future__ import annotations

import re

from playwright.sync_api import Locator, Page, expect

FOX = "a flat fox <img src=x onerror='window.hacked=1'> on a pink background"

OWL = "a 3D OWL on a blue background"


def tiles(page: Page) -> Locator:
    return page.locator("#history .tile")


def tile(page: Page, word: str) -> Locator:
    return page.locator("#history .tile").filter(has=page.get_by_role("button", name=re.compile(f"Open: .*{word}")))


def viewer(page: Page) -> Locator:
    return page.locator("#history .viewer")


def open_picture(page: Page, word: str) -> Locator:
    tile(page, word).locator(".open").click()
    expect(viewer(page)).to_be_visible()
    expect(viewer(page).locator(".prompt-text")).to_contain_text(word)
    return viewer(page)


def act(page: Page, name: str) -> None:
    viewer(page).locator(f"[data-do={name}]").click()


def id_of(page: Page, word: str) -> str:
    return tile(page, word).get_attribute("data-id") or ""
