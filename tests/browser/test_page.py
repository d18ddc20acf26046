"""What a person does with the page, done in a real browser against the real app."""

from __future__ import annotations

from pathlib import Path

from PIL import Image
from playwright.sync_api import BrowserContext, Page, expect

from tests.browser.steps import (
    WATCH,
    choose_checkpoint,
    expect_finished,
    open_tab,
    problem,
    run,
    set_count,
    set_size,
    settings,
    told_json,
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


def test_generate_shows_previews_and_pictures_that_are_downloaded(page: Page, app: App, tmp_path: Path) -> None:
    before = len(app.pictures())
    place = page.locator("#mat").bounding_box()
    page.evaluate(WATCH)
    write(page, "generate", "a flat fox on a pink background")
    set_size(page, "generate", 256, 192)
    set_count(page, "generate", 3)
    run(page, "generate")
    expect_finished(page, 3)
    assert page.evaluate("window.previews.size") >= 2
    page.evaluate("scrollTo(0, 0)")
    assert page.locator("#mat").bounding_box() == place  # nothing jumps between the first preview and the result
    saved = app.pictures()[before:]
    assert [Image.open(path).size for path in saved] == [(256, 192)] * 3
    shown = settings(page)
    assert shown["Prompt"] == "a flat fox on a pink background"
    assert shown["Size"] == "256 x 192"
    seeds = shown["Seeds"].split(", ")
    assert len(seeds) == 3 and all(seed in path.name for seed, path in zip(seeds, saved, strict=True))
    # The table and the JSON tell of the same run.
    assert str(told_json(page)["seed"]) == seeds[0] == page.locator("#generate .seed input").input_value()
    # What is downloaded is the file of the picture that was picked.
    page.locator("#gallery .thumbnail-item").nth(1).click()
    expect(page.locator("#download")).to_have_text("Download picture 2 of 3")
    assert download(page, tmp_path) == (saved[1].name, saved[1].read_bytes())
    # And of one picture alone, its own.
    set_count(page, "generate", 1)
    run(page, "generate")
    expect_finished(page)
    (last,) = app.pictures()[before + 3 :]
    assert download(page, tmp_path) == (last.name, last.read_bytes())
    assert str(told_json(page)["seed"]) == settings(page)["Seed"] == page.locator("#generate .seed input").input_value()
    assert settings(page)["Seed"] in last.name


def download(page: Page, folder: Path) -> tuple[str, bytes]:
    """The name and the content of the file that the button offers."""
    with page.expect_download() as begun:
        page.locator("#download").click()
    file = folder / "downloaded"
    begun.value.save_as(file)
    return begun.value.suggested_filename, file.read_bytes()


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
