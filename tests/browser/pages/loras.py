"""The LoRA panel."""

from __future__ import annotations

import time
from pathlib import Path

from PIL import Image
from playwright.sync_api import Locator, Page, expect

from tests.browser.steps import (
    expect_finished,
    run,
    set_number,
    write,
)
from tests.browser.studio import PATIENCE, App


def panel(page: Page, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .lora-panel")


def title(page: Page) -> Locator:
    return panel(page).locator("button.label-wrap > span").first


def unfold(page: Page, form: str = "generate") -> Locator:
    panel(page, form).get_by_role("button", name="LoRAs").click()
    return panel(page, form)


def add(page: Page, name: str, form: str = "generate") -> None:
    panel(page, form).locator(".lora-offer input").click()
    page.get_by_role("option", name=name, exact=True).click()
    expect(row(page, name, form)).to_be_visible()


def row(page: Page, name: str, form: str = "generate") -> Locator:
    return panel(page, form).locator(".lora", has_text=name.split(" (")[0])


def draw(page: Page, app: App, seed: int = 5) -> Path:
    before = len(app.pictures())
    patience = time.monotonic() + PATIENCE / 1000
    write(page, "generate", "a flat fox on a pink background")
    set_number(page.locator("#generate .seed input"), seed)
    expect(page.locator("#generate .lock input")).to_be_checked()
    run(page, "generate")
    while len(app.pictures()) == before:  # the page may still show that the run before is done
        assert time.monotonic() < patience, page.locator("#stage").inner_text()
        page.wait_for_timeout(50)
    expect_finished(page)
    (made,) = app.pictures()[before:]
    return made


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()
