"""What a person does with the page, done in a real browser against the real app."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import BrowserContext, Page, Route, expect

from tests.browser.conftest import ROOT, App, open_studio
from tests.browser.steps import (
    EXAMPLES,
    WATCH,
    choose_checkpoint,
    ends_with,
    expect_finished,
    hand_over,
    open_tab,
    problem,
    result,
    run,
    run_for_long,
    set_count,
    set_number,
    set_size,
    settings,
    told_json,
    upload,
    write,
)


def test_opens_on_its_own_and_serves_no_other_file(context: BrowserContext, app: App) -> None:
    """No word and no picture from elsewhere: the page works without a network."""
    page = context.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(app.url)
    expect(page.get_by_role("heading", name="flux2-studio")).to_be_visible()
    expect(page.locator("#about")).to_contain_text("on disk")
    expect(page.locator("#preview")).to_contain_text("Your picture will appear here")
    assert asked
    assert [url for url in asked if not url.startswith((app.url, "data:", "blob:"))] == []
    for path in (ROOT / "app.py", app.log, Path("/etc/passwd")):
        assert page.request.get(f"{app.url}gradio_api/file={path}").status in (403, 404)
    assert page.request.get(f"{app.url}gradio_api/info").json() == {"named_endpoints": {}, "unnamed_endpoints": {}}


def test_generate_shows_previews_and_the_picture(page: Page, app: App) -> None:
    before = len(app.pictures())
    place = page.locator("#mat").bounding_box()
    page.evaluate(WATCH)
    write(page, "generate", "a flat fox on a pink background")
    set_size(page, "generate", 256, 256)
    set_count(page, "generate", 4)
    run(page, "generate")
    expect_finished(page, 4)
    assert page.evaluate("window.previews.size") >= 2
    page.evaluate("scrollTo(0, 0)")
    assert page.locator("#mat").bounding_box() == place  # nothing jumps between the first preview and the result
    saved = app.pictures()[before:]
    assert len(saved) == 4
    assert all(Image.open(path).size == (256, 256) for path in saved)
    shown = settings(page)
    assert shown["Prompt"] == "a flat fox on a pink background"
    assert shown["Size"] == "256 x 256"
    assert len(shown["Seeds"].split(", ")) == 4


def test_download_is_the_saved_file(page: Page, app: App, tmp_path: Path) -> None:
    write(page, "generate", "a line drawing of a cactus")
    run(page, "generate")
    expect_finished(page)
    with page.expect_download() as download:
        page.locator("#download").click()
    file = tmp_path / "downloaded.png"
    download.value.save_as(file)
    saved = app.pictures()[-1]
    assert file.read_bytes() == saved.read_bytes()
    assert download.value.suggested_filename == saved.name
    # The table, the JSON and the file tell of the same run.
    told = told_json(page)
    assert str(told["seed"]) == settings(page)["Seed"] == page.locator("#generate .seed input").input_value()
    assert str(told["seed"]) in saved.name


def test_picking_one_of_several_downloads_that_one(page: Page, app: App, tmp_path: Path) -> None:
    write(page, "generate", "a frog")
    set_count(page, "generate", 3)
    run(page, "generate")
    expect_finished(page, 3)
    seeds = settings(page)["Seeds"].split(", ")
    page.locator("#gallery .thumbnail-item").nth(1).click()
    expect(page.locator("#download")).to_have_text("Download picture 2 of 3")
    with page.expect_download() as download:
        page.locator("#download").click()
    assert seeds[1] in download.value.suggested_filename


def test_a_busy_browser_misses_nothing(page: Page) -> None:
    """All that a run tells comes at once to a browser that had other things to do."""
    write(page, "generate", "a strawberry")
    page.evaluate("""() => {
        document.querySelector('#generate .run').click();
        setTimeout(() => { const end = performance.now() + 8000; while (performance.now() < end); }, 50);
    }""")
    expect_finished(page)
    expect(page.locator("#download")).to_be_visible()
    assert settings(page)["Prompt"] == "a strawberry"
    expect(page.locator("#stop")).to_be_hidden()


def test_stop_ends_the_run(page: Page, app: App) -> None:
    before = len(app.pictures())
    run_for_long(page)
    expect(page.locator("#preview img")).to_be_visible()
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped")
    expect(page.locator("#stop")).to_be_hidden()
    assert len(app.pictures()) - before < 16
    # What was seen last stays in sight, and the form can be used again.
    expect(page.locator("#preview img").or_(result(page))).to_be_visible()
    expect(page.locator("#generate .run")).to_be_enabled()


def test_second_tab_waits_its_turn(open_page: Callable[[], Page]) -> None:
    first, second = open_page(), open_page()
    run_for_long(first)
    expect(first.locator("#preview img")).to_be_visible()
    write(second, "generate", "a lemon")
    run(second, "generate")
    expect(second.locator("#progress")).to_contain_text("Waiting: 1 run before yours")
    first.locator("#stop").click()
    expect_finished(second)


def test_a_closed_tab_loses_nothing(open_page: Callable[[], Page], app: App) -> None:
    before = len(app.pictures())
    first = open_page()
    write(first, "generate", "a sunflower")
    set_size(first, "generate", 256, 256)
    set_count(first, "generate", 2)
    run(first, "generate")
    expect(first.locator("#generate .seed input")).not_to_have_value("")  # it has begun
    first.close()
    second = open_page()
    write(second, "generate", "a rocket")
    run(second, "generate")
    expect_finished(second)
    sizes = sorted(Image.open(path).size for path in app.pictures()[before:])
    assert sizes == [(128, 128), (256, 256), (256, 256)]
    assert "Traceback" not in app.log.read_text()


def test_seed_lock(page: Page) -> None:
    seed, lock = page.locator("#generate .seed input"), page.locator("#generate .lock input")
    write(page, "generate", "a panda")
    run(page, "generate")
    expect_finished(page)
    first = seed.input_value()
    expect(lock).not_to_be_checked()
    run(page, "generate")
    expect(seed).not_to_have_value(first)
    expect_finished(page)
    page.locator("#generate .roll").click()  # rolling and typing lock
    expect(lock).to_be_checked()
    rolled = seed.input_value()
    run(page, "generate")
    expect(page.locator("#settings")).to_contain_text(rolled)
    expect_finished(page)
    set_number(seed, 42)
    run(page, "generate")
    expect(page.locator("#settings tr", has_text="Seed")).to_contain_text("42")


def test_checkpoints_swap_without_a_restart(page: Page, app: App) -> None:
    sheet = page.locator("#generate")
    expect(sheet.locator(".steps input[type=range]")).to_be_disabled()
    expect(sheet.locator(".steps")).to_contain_text("Fixed by distillation.")
    expect(sheet.locator(".negative")).to_be_hidden()
    for label, name in (("FLUX.2 klein Base 4B", "klein-base-4b"), ("FLUX.2 klein 4B", "klein-4b")):
        choose_checkpoint(page, label)
        base = name == "klein-base-4b"
        expect(page.locator("#about")).to_contain_text("on disk")
        # A preset follows the checkpoint's own size; a size that somebody set stays.
        expect(sheet.get_by_label("Width")).to_have_value("1024" if base else "64")
        expect(sheet.locator(".steps input[type=range]")).to_be_enabled(enabled=base)
        expect(sheet.locator(".guidance input[type=range]")).to_be_enabled(enabled=base)
        expect(sheet.locator(".negative")).to_be_visible(visible=base)
        write(page, "generate", "a red house")
        set_size(page, "generate", 64, 96)
        if base:
            set_number(sheet.locator(".steps input[type=number]"), 2)
            sheet.locator(".negative textarea").fill("a dog")
        run(page, "generate")
        expect(page.locator("#json")).to_contain_text(f'"{name}"')
        expect_finished(page)
        told = settings(page)
        assert told["Steps"] == ("2" if base else "4")
        assert told.get("Negative prompt") == ("a dog" if base else None)
        assert Image.open(app.pictures()[-1]).size == (64, 96)


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


def test_two_references_in_order(page: Page) -> None:
    open_tab(page, "Multi-reference")
    upload(page, "multi", EXAMPLES / "rocket.png", EXAMPLES / "car.png", EXAMPLES / "fox.png")
    captions = page.locator("#multi .references .caption-label")
    expect(captions).to_have_text(["image 1", "image 2", "image 3"])
    pictures = page.locator("#multi .references .thumbnail-item")
    pictures.nth(2).click()
    page.get_by_role("button", name="Remove", exact=True).click()
    expect(captions).to_have_text(["image 1", "image 2"])
    pictures.nth(1).click()
    page.get_by_role("button", name="Earlier").click()
    expect(pictures.first.locator("img")).to_have_attribute("src", ends_with("car.png"))
    write(page, "multi", "the object of image 1 on the background of image 2")
    run(page, "multi")
    expect_finished(page)
    assert settings(page)["References"] == "car.png, rocket.png"


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


def test_errors_are_words(page: Page, app: App) -> None:
    run(page, "generate")
    expect(problem(page)).to_contain_text("Write a prompt first")
    expect(page.get_by_test_id("toast-body")).to_contain_text("Write a prompt first")
    write(page, "generate", "a <b>fox</b>")
    choose_checkpoint(page, "FLUX.2 klein 9B")
    expect(page.locator("#about")).to_contain_text("Gated: accept the licence on black-forest-labs/FLUX.2-klein-9B")
    expect(page.locator("#about")).to_contain_text("first run downloads up to")
    run(page, "generate")
    expect(problem(page)).to_contain_text("is not on this machine")
    expect(page.locator("#generate .run")).to_be_enabled()
    expect(page.locator("#stop")).to_be_hidden()
    assert "Traceback" not in page.content()
    assert "Traceback" not in app.log.read_text()
    # And after all that the studio still draws.
    choose_checkpoint(page, "Nano (a toy, on board)")
    run(page, "generate")
    expect(page.locator("#settings tr", has_text="Prompt")).to_contain_text("a <b>fox</b>")
    expect(problem(page)).to_be_hidden()


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


def test_sixteen_pictures_fit_on_the_mat(page: Page) -> None:
    write(page, "generate", "a frog")
    page.locator("#generate .prompt textarea").press("Control+Enter")  # which runs it, too
    expect_finished(page)
    assert settings(page)["Prompt"] == "a frog"
    write(page, "generate", "sixteen frogs")
    set_count(page, "generate", 16)
    run(page, "generate")
    expect_finished(page, 16)
    for width in (1440, 390):
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(500)  # until all has its place
        mat = page.locator("#mat").bounding_box()
        last = page.locator("#gallery .thumbnail-item").nth(15).bounding_box()
        assert mat and last
        assert last["y"] + last["height"] <= mat["y"] + mat["height"]
        assert last["x"] + last["width"] <= mat["x"] + mat["width"]


def test_a_phone_needs_no_sideways_scrolling(context: BrowserContext, app: App) -> None:
    page = context.new_page()
    page.set_viewport_size({"width": 390, "height": 844})
    open_studio(page, app.url)
    page.locator("#generate .examples button").first.click()
    expect(page.locator("#generate .prompt textarea")).not_to_have_value("")
    run(page, "generate")
    expect_finished(page)
    expect(page.locator("#mat")).to_be_in_viewport()  # the run brought its picture into sight
    page.locator("#use-in-edit").click()
    expect(page.locator("#edit .references .thumbnail-item")).to_be_in_viewport()  # and this one the form
    for scheme in ("light", "dark"):
        if scheme == "dark":
            page.emulate_media(color_scheme="dark")
            open_studio(page, app.url)
        for tab in ("Generate", "Edit", "Multi-reference"):
            open_tab(page, tab)
            expect(page.locator(".sheet:visible .run")).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, tab
        dark = "document.body.classList.contains('dark')"
        assert page.evaluate(dark) is (scheme == "dark")
        page.locator("#look").click()
        assert page.evaluate(dark) is (scheme != "dark")
