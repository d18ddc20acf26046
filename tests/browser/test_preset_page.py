"""What a person does with presets on the page: applies and undoes them, keeps their own, hands them on."""

from __future__ import annotations

import re

from playwright.sync_api import Page, expect

from tests.browser.pages.presets import choose, prompt
from tests.browser.steps import (
    expect_finished,
    preset_button,
    preset_part,
    run,
    set_count,
    settings,
    write,
)


def test_a_preset_takes_the_words_of_the_prompt_and_is_drawn_and_undone(page: Page) -> None:
    write(page, "generate", "a cactus")
    set_count(page, "generate", 2)
    choose(page, "Icons · Line icon")
    expect(preset_part(page, "card").locator("img")).to_be_visible()
    expect(prompt(page)).to_have_value("a cactus")  # looking changes nothing
    preset_button(page, "apply").click()
    expect(prompt(page)).to_have_value("a line drawing of a cactus on a white background")
    expect(preset_part(page, "said")).to_have_text("Line icon set: prompt.")
    run(page, "generate")
    expect_finished(page, 2)
    assert settings(page)["Prompt"] == "a line drawing of a cactus on a white background"
    # The next one takes the same words; its size is more than nano draws.
    choose(page, "Poster and text · Event poster")
    preset_button(page, "apply").click()
    expect(preset_part(page, "said")).to_contain_text("the size is 112 x 160, nearly the same shape")
    expect(prompt(page)).to_have_value(re.compile(r"illustration of a cactus\."))
    expect(page.locator("#generate").get_by_label("Width")).to_have_value("112")
    preset_button(page, "undo").click()
    expect(prompt(page)).to_have_value("a line drawing of a cactus on a white background")
    expect(page.locator("#generate").get_by_label("Width")).to_have_value("128")
    preset_button(page, "undo").click()
    expect(prompt(page)).to_have_value("a cactus")
    expect(preset_button(page, "undo")).to_be_hidden()
