"""Pictures that are uploaded: removed, replaced, refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, Route, expect

from tests.browser.steps import (
    EXAMPLES,
    ends_with,
    hand_over,
    open_tab,
    problem,
    run,
    upload,
    write,
)


def test_a_picture_is_removed_at_once_after_it_was_selected(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png")
    pictures = page.locator("#multi .references .thumbnail-item")
    expect(page.locator("#multi .references .caption-label")).to_have_text(["image 1", "image 2"])
    slow: list[Route] = []
    # What the server is told of the selection arrives after the press.
    page.route("**/gradio_api/run/**", lambda route: slow.append(route))
    pictures.nth(0).click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(pictures).to_have_count(1)
    expect(pictures.first.locator("img")).to_have_attribute("src", ends_with("car.png"))
    assert slow
    for route in slow:
        route.continue_()


def test_a_selected_picture_leaves_room_for_more(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_count(2)
    page.locator("#multi .references .thumbnail-item").first.click()
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Add pictures").click()
    chooser.value.set_files(EXAMPLES / "fox.png")
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    page.locator("#multi .references .thumbnail-item").first.click()
    hand_over(page, "paste", "pasted.png")
    expect(captions).to_have_count(4)


def test_the_picture_to_edit_is_replaced_by_a_good_one_only(page: Page, tmp_path: Path) -> None:
    rubbish = tmp_path / "holiday.png"
    rubbish.write_bytes(b"rubbish")
    open_tab(page, "Edit")
    upload(page, "edit", EXAMPLES / "fox.png")
    picture = page.locator("#edit .references .thumbnail-item img")
    expect(picture).to_have_attribute("src", ends_with("fox.png"))
    expect(page.locator("#edit")).to_contain_text("As image 1: 128 x 128 pixels")  # the server is done with it
    upload(page, "edit", rubbish)
    expect(page.locator("#edit .block.refused")).to_contain_text("holiday.png is not a picture")
    expect(picture).to_have_attribute("src", ends_with("fox.png"))
    # A click on the picture, which selects it, leaves it replaceable.
    picture.click()
    expect(page.locator("#edit .references input[type=file]")).to_have_count(1)
    hand_over(page, "drop", "dropped.png")
    expect(page.locator("#edit")).to_contain_text("As image 1: 96 x 64 pixels")
    expect(picture).to_have_attribute("src", ends_with("dropped.png"))
    expect(page.locator("#edit .block.refused")).to_be_hidden()


def test_clear_takes_the_refusal_along_and_ten_are_the_most(page: Page, tmp_path: Path) -> None:
    rubbish = tmp_path / "holiday.png"
    rubbish.write_bytes(b"rubbish")
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "fox.png", rubbish)
    refused = page.locator("#multi .block.refused")
    expect(refused).to_contain_text("holiday.png")
    page.locator("#multi .references").get_by_role("button", name="Clear").click()
    expect(refused).to_be_hidden()
    expect(page.locator("#multi")).not_to_contain_text("As image 1:")
    expect(page.get_by_role("button", name="Add pictures")).to_be_hidden()
    # More than ten are refused in words.
    files = []
    for number in range(11):
        file = tmp_path / f"picture-{number:02}.png"
        Image.new("RGB", (64, 64), (number * 20, 0, 0)).save(file)
        files.append(file)
    upload(page, "multi", *files)
    expect(refused).to_contain_text("at most 10 pictures: picture-10.png was left out")
    expect(page.locator("#multi .references .thumbnail-item")).to_have_count(10)


@pytest.mark.parametrize("form, tab", [("edit", "Edit"), ("multi", "Multi-reference")])
def test_a_rubbish_upload_is_refused_in_words(page: Page, tmp_path: Path, form: str, tab: str) -> None:
    file = tmp_path / "holiday.png"
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 99)
    open_tab(page, tab)
    upload(page, form, file)
    expect(page.locator(f"#{form} .block.refused")).to_contain_text("holiday.png")
    expect(page.locator(f"#{form} .references .thumbnail-item")).to_have_count(0)
    write(page, form, "make it blue")
    run(page, form)
    expect(problem(page)).to_contain_text("Add a picture first")
    expect(page.locator(f"#{form} .run")).to_be_enabled()
