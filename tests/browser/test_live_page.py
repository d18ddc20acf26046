"""Live: the picture follows what a person types."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from flux2_studio.outputs import metadata
from tests.browser.conftest import App
from tests.browser.steps import (
    EXAMPLES,
    choose_checkpoint,
    expect_finished,
    open_tab,
    problem,
    run,
    run_for_long,
    set_size,
    upload,
    write,
)

PROMPT = "a 3D owl on a green background"
assert len(PROMPT) == 30


def go_live(page: Page, form: str = "generate") -> None:
    page.locator(f"#{form} .live input").check()
    expect(page.locator(f"#{form} .lock input")).to_be_checked()


def live(page: Page, prompt: str) -> Locator:
    return page.locator(f'#preview img[alt="Live picture: {prompt}"]')


def seen(page: Page) -> np.ndarray:
    """The picture on the mat."""
    source = page.locator("#preview img").get_attribute("src") or ""
    data = base64.b64decode(source.partition(",")[2])
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)


def made(app: App, prompt: str) -> list[Path]:
    """The saved pictures of `prompt`, oldest first: a run of another test may still go on."""
    records = ((path, metadata.read(path.read_bytes()).record) for path in app.pictures())
    return [path for path, record in records if record is not None and record.request.prompt == prompt]


def saved(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_typing_gives_the_picture_of_the_last_prompt(page: Page, app: App) -> None:
    go_live(page)
    expect(page.locator("#progress")).to_contain_text("write a prompt")
    page.locator("#generate .prompt textarea").press_sequentially(PROMPT, delay=30)
    expect(page.locator("#generate .prompt textarea")).to_have_value(PROMPT)
    expect(live(page, PROMPT)).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("not saved")
    draft = seen(page)
    red, green, blue = draft[:6].reshape(-1, 3).mean(0)
    assert green > red + 40 and green > blue + 40
    assert not made(app, PROMPT)
    page.wait_for_timeout(1000)
    expect(live(page, PROMPT)).to_be_visible()  # nothing late takes its place

    run(page, "generate")
    expect_finished(page)
    (kept,) = made(app, PROMPT)
    picture = saved(kept)
    assert abs(draft - picture).mean() < 3, "what was seen is what is kept, but for the page's compression"
    # And typing goes on from there.
    page.locator("#generate .prompt textarea").press_sequentially("s")
    expect(live(page, PROMPT + "s")).to_be_visible()
    expect(page.locator("#gallery")).to_be_hidden()


def test_other_fields_are_followed_too(page: Page) -> None:
    write(page, "generate", "a flat frog")
    go_live(page)
    expect(live(page, "a flat frog")).to_be_visible()
    first = page.locator("#preview img").get_attribute("src")
    page.locator("#generate .roll").click()
    page.wait_for_function("first => document.querySelector('#preview img').src !== first", arg=first)
    set_size(page, "generate", 192, 128)
    page.wait_for_function("() => document.querySelector('#preview img').naturalWidth === 192")


def test_an_edit_follows_its_instruction(page: Page, app: App) -> None:
    before = made(app, "make the background green")
    open_tab(page, "Edit")
    go_live(page, "edit")
    write(page, "edit", "make the background green")
    expect(page.locator("#progress")).to_contain_text("Add a picture first")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(live(page, "make the background green")).to_be_visible()
    expect(page.locator("#progress")).to_contain_text("not saved")  # no preview of a step
    green = seen(page)[:6].reshape(-1, 3).mean(0)
    assert green[1] > green[0] + 40 and green[1] > green[2] + 40
    assert made(app, "make the background green") == before


def test_it_is_for_checkpoints_of_few_steps(page: Page) -> None:
    go_live(page)
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    expect(page.locator("#generate .live")).to_be_hidden()
    write(page, "generate", "a frog")
    choose_checkpoint(page, "Nano (a toy, on board)")
    expect(page.locator("#generate .live input")).not_to_be_checked()


def test_a_run_of_the_tab_is_not_disturbed(open_page: Callable[[], Page]) -> None:
    page = open_page()
    run_for_long(page)
    expect(page.locator("#progress")).to_contain_text("Step")
    choose_checkpoint(page, "Nano (a toy, on board)")
    go_live(page)
    write(page, "generate", "a flat frog")
    page.wait_for_timeout(1500)
    expect(page.locator("#progress")).to_contain_text("Step")
    expect(live(page, "a flat frog")).to_have_count(0)
    page.locator("#stop").click()
    expect(page.locator("#progress")).to_contain_text("Stopped")
    write(page, "generate", "a flat owl")
    expect(live(page, "a flat owl")).to_be_visible()
    expect(problem(page)).to_have_count(0)
