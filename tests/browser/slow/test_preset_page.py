"""What a person does with presets on the page: applies and undoes them, keeps their own, hands them on."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from flux2_studio.storage.presets import read_preset
from tests.browser.pages.presets import choose, options, prompt, save
from tests.browser.steps import EXAMPLES as PICTURES
from tests.browser.steps import (
    choose_checkpoint,
    expect_finished,
    open_tab,
    preset_button,
    preset_part,
    run,
    set_number,
    unfold_presets,
    upload,
    write,
)
from tests.browser.studio import PATIENCE, App, open_studio


@pytest.fixture
def stranger(browser: Browser, app: App) -> Iterator[Page]:
    """The page in another person's browser."""
    context = browser.new_context(viewport={"width": 390, "height": 844})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    open_studio(page, app.url)
    yield page
    context.close()


def test_an_edit_recipe_runs_as_it_is(page: Page) -> None:
    open_tab(page, "Edit")
    upload(page, "edit", PICTURES / "rocket.png")
    choose(page, "Icons · Paint it", "edit")
    preset_button(page, "apply", "edit").click()
    expect(preset_part(page, "said", "edit")).to_contain_text('Its subject is an example, "blue"')
    expect(prompt(page, "edit")).to_have_value("paint it blue")
    run(page, "edit")
    expect_finished(page)


def test_ones_own_are_saved_renamed_handed_on_and_deleted(
    open_page: Callable[[], Page], stranger: Page, tmp_path: Path
) -> None:
    page = open_page()
    unfold_presets(page)
    save(page, "My <b>ink</b>", "a flat icon of {subject} on a red background")
    expect(preset_part(page, "told")).to_have_text("Saved as My <b>ink</b>. Only you see it.")
    # Under the same name it asks first.
    save(page, "my <b>INK</b>", "a flat icon of {subject} on a green background")
    expect(preset_part(page, "question")).to_contain_text("You have a preset called My <b>ink</b> already. Replace it?")
    preset_button(page, "replace").click()
    expect(preset_part(page, "told")).to_have_text("my <b>INK</b> is replaced.")
    page.locator("#generate .preset-name").get_by_label("Name").fill("Greens")
    preset_button(page, "rename").click()
    expect(preset_part(page, "told")).to_have_text("It is called Greens now.")
    # It is there when the page is opened again, and nobody else has it.
    page = open_page()
    choose(page, "Yours · Greens")
    write(page, "generate", "a lemon")
    preset_button(page, "apply").click()
    expect(prompt(page)).to_have_value("a flat icon of a lemon on a green background")
    expect(options(stranger, "Icons ·").first).to_be_visible()
    expect(options(stranger, "Greens").filter(has_text="Greens")).to_have_count(0)
    stranger.keyboard.press("Escape")
    # Out into a file, and in at the other's.
    unfold_presets(page)
    with page.expect_download() as download:
        preset_button(page, "export").click()
    file = tmp_path / download.value.suggested_filename
    download.value.save_as(file)
    assert file.name == "greens.json"
    assert read_preset(file).template == "a flat icon of {subject} on a green background"
    unfold_presets(stranger)
    stranger.locator("#generate .presets input[type=file]").set_input_files(str(file))
    expect(preset_part(stranger, "told")).to_have_text("Imported Greens. Only you see it.")
    # What is deleted comes back, once it is asked for.
    preset_button(page, "delete").click()
    expect(preset_part(page, "told")).to_have_text("Greens is deleted.")
    preset_button(page, "restore").click()
    expect(preset_part(page, "told")).to_have_text("Greens is back.")
    preset_button(page, "delete").click()
    expect(preset_part(page, "told")).to_have_text("Greens is deleted.")
    again = open_page()
    expect(options(again, "Icons ·").first).to_be_visible()
    expect(options(again, "Greens").filter(has_text="Greens")).to_have_count(0)
    expect(options(stranger, "Greens").filter(has_text="Greens")).to_have_count(1)


def test_a_preset_brings_its_checkpoint_and_undo_takes_it_back(page: Page) -> None:
    steps = page.locator("#generate .steps input[type=number]")
    negative = page.locator("#generate .negative textarea")
    checkpoint = page.locator("#checkpoint input")
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    expect(steps).to_have_value("20")
    set_number(steps, 7)
    negative.fill("blur")
    unfold_presets(page)
    save(page, "Slow", "a fox")
    expect(preset_part(page, "told")).to_contain_text("Saved as Slow.")
    choose_checkpoint(page, "Nano (a toy, on board)")
    expect(steps).to_have_value("4")
    expect(negative).to_be_hidden()
    write(page, "generate", "a lemon")
    preset_button(page, "apply").click()
    expect(prompt(page)).to_have_value("a fox")
    expect(checkpoint).to_have_value("Nano Base (a toy, on board)")
    expect(steps).to_have_value("7")
    expect(negative).to_have_value("blur")
    for tab, form in (("Edit", "edit"), ("Multi-reference", "multi")):
        open_tab(page, tab)
        expect(page.locator(f"#{form} .steps input[type=number]")).to_have_value("20")
    open_tab(page, "Generate")  # what the change of the checkpoint did to those does not reach this one
    expect(steps).to_have_value("7")
    preset_button(page, "undo").click()
    expect(prompt(page)).to_have_value("a lemon")
    expect(checkpoint).to_have_value("Nano (a toy, on board)")
    expect(steps).to_have_value("4")
    expect(negative).to_be_hidden()


def test_a_file_that_is_no_preset_is_told(page: Page, tmp_path: Path) -> None:
    unfold_presets(page)
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({"name": "x", "references": ["/etc/passwd"]}), encoding="utf-8")
    page.locator("#generate .presets input[type=file]").set_input_files(str(file))
    expect(preset_part(page, "told").locator(".problem")).to_have_text(
        "bad.json: A preset has no field 'references': leave it out."
    )
