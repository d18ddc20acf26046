"""The forms: pictures to edit, and sizes."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.steps import (
    EXAMPLES,
    ends_with,
    expect_finished,
    hand_over,
    open_tab,
    problem,
    run,
    set_number,
    settings,
    upload,
    write,
)
from tests.browser.studio import App


def test_edit_an_uploaded_picture(page: Page, app: App, tmp_path: Path) -> None:
    photo = Image.new("RGB", (112, 80), "teal")
    lying = Image.Exif()
    lying[0x0112] = 6  # a phone held upright
    file = tmp_path / "photo.jpg"
    photo.save(file, exif=lying)
    open_tab(page, "Edit")
    upload(page, "edit", file)
    # The size of an upright picture: the file arrived with its EXIF block.
    expect(page.locator("#edit")).to_contain_text("As image 1: 80 x 112 pixels")
    write(page, "edit", "make the background yellow")
    page.evaluate(
        """() => {
          window.told = '';
          new MutationObserver(() => { window.told += document.querySelector('#progress').innerText; })
            .observe(document.querySelector('#progress'), {childList: true, subtree: true, characterData: true});
        }"""
    )
    run(page, "edit")
    expect_finished(page)
    assert "Checking the pictures" in page.evaluate("window.told")
    assert Image.open(app.pictures()[-1]).size == (80, 112)
    assert settings(page)["References"] == "photo.jpg"


def test_edit_an_example_and_go_on_from_the_result(page: Page, app: App) -> None:
    open_tab(page, "Edit")
    page.locator("#edit .examples").get_by_role("button", name="make the background yellow").click()
    expect(page.locator("#edit .references .thumbnail-item")).to_have_count(1)
    run(page, "edit")
    expect_finished(page)
    made = app.pictures()[-1]
    open_tab(page, "Generate")
    page.locator("#use-in-edit").click()
    expect(page.locator("#edit .references .thumbnail-item img")).to_have_attribute("src", ends_with(made.name))
    write(page, "edit", "turn it into a line drawing")
    run(page, "edit")
    expect(page.locator("#settings")).to_contain_text(made.name)
    expect_finished(page)


def test_sizes_are_rounded_where_one_sees_it_and_an_empty_one_is_named(page: Page, app: App) -> None:
    sheet = page.locator("#generate")
    set_number(sheet.get_by_label("Width"), 130)
    expect(sheet.get_by_label("Width")).to_have_value("128")
    expect(sheet).to_contain_text("The width was rounded from 130 to 128")
    set_number(sheet.get_by_label("Height"), 40)
    expect(sheet).to_contain_text("The height must be at least 64 pixels")
    sheet.get_by_text("16:9", exact=True).click()
    expect(sheet.get_by_label("Width")).to_have_value("176")
    expect(sheet.get_by_label("Height")).to_have_value("96")
    expect(sheet).not_to_contain_text("must be at least")
    # An empty one is named, and not run.
    before = len(app.pictures())
    write(page, "generate", "a whale")
    sheet.get_by_label("Width").fill("")
    set_number(sheet.get_by_label("Height"), 256)
    expect(sheet.locator(".note .problem")).to_contain_text("Give the width in pixels")
    run(page, "generate")
    expect(problem(page)).to_contain_text("Give the width in pixels")
    assert len(app.pictures()) == before


def test_a_reference_gives_the_size_until_one_is_chosen(page: Page, app: App) -> None:
    open_tab(page, "Edit")
    sheet = page.locator("#edit")
    hand_over(page, "paste", "pasted.png")
    expect(sheet).to_contain_text("As image 1: 96 x 64 pixels")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(sheet).to_contain_text("As image 1: 128 x 128 pixels (1:1).")
    expect(sheet.get_by_label("Width")).to_be_hidden()
    sheet.get_by_text("4:3", exact=True).click()
    expect(sheet.get_by_label("Width")).to_have_value("144")
    sheet.get_by_text("As image 1", exact=True).click()
    expect(sheet.get_by_label("Width")).to_be_hidden()
    write(page, "edit", "remove the background")
    run(page, "edit")
    expect_finished(page)
    assert Image.open(app.pictures()[-1]).size == (128, 128)
