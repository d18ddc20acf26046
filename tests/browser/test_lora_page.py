"""What a person does with LoRAs on the page: adds them, weighs them, takes them off, puts files into the folder."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser.pages.loras import add, draw, panel, pixels, row, title, unfold
from tests.browser.steps import (
    set_number,
)
from tests.browser.studio import App


def test_a_lora_changes_the_picture_and_at_weight_0_does_not(folder: Path, page: Page, app: App) -> None:
    plain = draw(page, app)
    expect(panel(page).locator(".lora")).to_have_count(0)
    unfold(page)
    add(page, "ink")
    expect(title(page)).to_have_text("LoRAs (1)")
    changed = draw(page, app)
    expect(page.locator("#notices")).to_contain_text("ink.safetensors (LoRA of rank 4): 8 of 12 tensors fit")
    expect(page.locator("#settings tr", has_text="LoRAs")).to_contain_text("ink (1)")
    set_number(row(page, "ink").locator("input[type=number]"), 0)
    expect(row(page, "ink").locator("input[type=range]")).to_have_value("0")
    at_zero = draw(page, app)
    assert pixels(at_zero) == pixels(plain) != pixels(changed)
    row(page, "ink").get_by_role("button", name="Take ink off").click()
    expect(title(page)).to_have_text("LoRAs")
    again = draw(page, app)
    assert pixels(again) == pixels(plain)
    expect(page.locator("#settings")).not_to_contain_text("LoRAs")
