"""What a person does with the page, done in a real browser against the real app."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.steps import (
    EXAMPLES,
    WATCH,
    choose_checkpoint,
    ends_with,
    expect_finished,
    open_tab,
    problem,
    run,
    set_count,
    set_size,
    settings,
    told_json,
    upload,
    write,
)
from tests.browser.studio import ROOT, App, open_studio


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
