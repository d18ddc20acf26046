"""What a person does with LoRAs on the page: adds them, weighs them, takes them off, puts files into the folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from flux2_studio.provenance import metadata
from tests.browser.pages.loras import add, draw, panel, row, title, unfold
from tests.browser.steps import (
    choose_checkpoint,
    open_tab,
    problem,
    run,
    told_json,
    write,
)
from tests.browser.studio import App
from tests.loras import write_lora


def test_two_with_their_weights_are_in_the_file(folder: Path, page: Page, app: App) -> None:
    unfold(page)
    add(page, "ink")
    add(page, "styles/grain")
    add(page, "ink")  # again: it is there already
    expect(panel(page).locator(".lora")).to_have_count(2)
    slider = row(page, "styles/grain").locator("input[type=range]")
    slider.focus()
    for _ in range(10):
        slider.press("ArrowLeft")
    expect(row(page, "styles/grain").locator("input[type=number]")).to_have_value("0.5")
    made = draw(page, app)
    expect(page.locator("#notices li").filter(has_text="tensors fit")).to_have_count(2)
    written = metadata.read_settings(made.read_bytes()).record
    assert written is not None
    assert [(lora.name, lora.weight) for lora in written.request.loras] == [("ink", 1), ("styles/grain", 0.5)]
    assert all(len(sha256) == 64 for sha256 in written.loras)
    expect(page.locator("#json")).to_contain_text("prompt")
    told = told_json(page)
    assert told["loras"][1] == {"name": "styles/grain", "weight": 0.5}


def test_files_that_come_are_found_and_the_empty_folder_says_where(page: Page, app: App) -> None:
    opened = unfold(page)
    expect(opened).to_contain_text(f"Put their .safetensors files into {app.home / 'loras'}")
    expect(opened.locator(".lora-offer")).to_be_hidden()
    file = write_lora(app.home / "loras" / "new.safetensors")
    (app.home / "loras" / "torn.safetensors").write_bytes(b"torn")
    opened.get_by_role("button", name="Refresh").click()
    expect(opened).to_contain_text("torn.safetensors is not a whole safetensors file")
    add(page, "new")
    file.unlink()
    (app.home / "loras" / "torn.safetensors").unlink()
    write(page, "generate", "a fox")
    run(page, "generate")
    expect(problem(page)).to_contain_text("The LoRA 'new' is not in its folder any more")
    opened.get_by_role("button", name="Refresh").click()
    expect(opened).to_contain_text("new was taken off: its file is gone.")
    expect(opened.locator(".lora")).to_have_count(0)


def test_one_for_another_checkpoint_is_marked_and_refused(folder: Path, page: Page) -> None:
    unfold(page)
    panel(page).locator(".lora-offer input").click()
    expect(page.get_by_role("option")).to_have_text(
        [re.compile(r"\bink$"), re.compile(r"\bstyles/grain$"), re.compile(r"\bbig \(for klein 9B\)$")]
    )
    page.get_by_role("option", name="big (for klein 9B)").click()
    expect(row(page, "big")).to_be_visible()
    write(page, "generate", "a fox")
    run(page, "generate")
    expect(problem(page)).to_contain_text("big.safetensors is a LoRA for klein 9B")


def test_another_checkpoint_drops_what_does_not_fit(folder: Path, page: Page) -> None:
    unfold(page)
    add(page, "ink")
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    expect(page.locator("#generate .steps input[type=range]")).to_be_enabled()
    expect(panel(page).locator(".lora")).to_have_count(1)  # the same family
    choose_checkpoint(page, "FLUX.2 klein 4B")
    expect(panel(page)).to_contain_text("ink was taken off: it is for Nano")
    expect(panel(page).locator(".lora")).to_have_count(0)
    expect(title(page)).to_have_text("LoRAs")


def test_forms_have_loras_of_their_own(folder: Path, page: Page) -> None:
    unfold(page)
    add(page, "ink")
    open_tab(page, "Edit")
    expect(unfold(page, "edit").locator(".lora")).to_have_count(0)
    add(page, "styles/grain", "edit")
    expect(panel(page, "edit").locator(".lora")).to_have_count(1)
    open_tab(page, "Generate")
    expect(panel(page).locator(".lora .name")).to_have_text(["ink"])


def test_a_hostile_name_is_text(folder: Path, open_page: Callable[[], Page]) -> None:
    write_lora(folder / "<img src=x onerror=alert(1)>.safetensors")
    page = open_page()
    page.on("dialog", lambda _: pytest.fail("a file's name was run as a script"))
    unfold(page)
    add(page, "<img src=x onerror=alert(1)>")
    expect(panel(page).locator(".lora .name")).to_have_text("<img src=x onerror=alert(1)>")
    expect(panel(page).locator(".lora img")).to_have_count(0)
