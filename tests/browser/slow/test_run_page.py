"""Runs on the page: stopped, waited for, closed, with seeds, checkpoints and many pictures."""

from __future__ import annotations

from collections.abc import Callable

from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.steps import (
    choose_checkpoint,
    expect_finished,
    result,
    run,
    run_for_long,
    set_count,
    set_number,
    set_size,
    settings,
    settle,
    write,
)
from tests.browser.studio import App


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
        settle(page)
        mat = page.locator("#mat").bounding_box()
        last = page.locator("#gallery .thumbnail-item").nth(15).bounding_box()
        assert mat and last
        assert last["y"] + last["height"] <= mat["y"] + mat["height"]
        assert last["x"] + last["width"] <= mat["x"] + mat["width"]
