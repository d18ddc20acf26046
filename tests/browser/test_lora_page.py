"""What a person does with LoRAs on the page: adds them, weighs them, takes them off, puts files into the folder."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Locator, Page, expect

from flux2_studio.outputs import metadata
from tests.browser.conftest import PATIENCE, App
from tests.browser.steps import (
    choose_checkpoint,
    expect_finished,
    open_tab,
    problem,
    run,
    set_number,
    told_json,
    write,
)
from tests.loras import write_lora


@pytest.fixture
def folder(app: App) -> Iterator[Path]:
    """The LoRAs' folder with two for nano and one for another checkpoint, emptied afterwards."""
    folder = app.home / "loras"
    write_lora(folder / "ink.safetensors", odd=True)
    write_lora(folder / "styles" / "grain.safetensors", seed=1)
    write_lora(folder / "big.safetensors", 4096)
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


def panel(page: Page, form: str = "generate") -> Locator:
    return page.locator(f"#{form} .lora-panel")


def title(page: Page) -> Locator:
    return panel(page).locator("button.label-wrap > span").first


def unfold(page: Page, form: str = "generate") -> Locator:
    panel(page, form).get_by_role("button", name="LoRAs").click()
    return panel(page, form)


def add(page: Page, name: str, form: str = "generate") -> None:
    panel(page, form).locator(".lora-offer input").click()
    page.get_by_role("option", name=name, exact=True).click()
    expect(row(page, name, form)).to_be_visible()


def row(page: Page, name: str, form: str = "generate") -> Locator:
    return panel(page, form).locator(".lora", has_text=name.split(" (")[0])


def draw(page: Page, app: App, seed: int = 5) -> Path:
    before = len(app.pictures())
    patience = time.monotonic() + PATIENCE / 1000
    write(page, "generate", "a flat fox on a pink background")
    set_number(page.locator("#generate .seed input"), seed)
    expect(page.locator("#generate .lock input")).to_be_checked()
    run(page, "generate")
    while len(app.pictures()) == before:  # the page may still show that the run before is done
        assert time.monotonic() < patience, page.locator("#stage").inner_text()
        page.wait_for_timeout(50)
    expect_finished(page)
    (made,) = app.pictures()[before:]
    return made


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def test_a_lora_changes_the_picture_and_at_weight_0_does_not(folder: Path, page: Page, app: App) -> None:
    plain = draw(page, app)
    expect(panel(page).locator(".lora")).to_have_count(0)
    unfold(page)
    add(page, "ink")
    expect(title(page)).to_have_text("LoRAs (1)")
    changed = draw(page, app)
    expect(page.locator("#notices")).to_contain_text("ink.safetensors (LoRA of rank 4): 8 of 12 tensors fit")
    expect(page.locator("#settings tr", has_text="LoRAs")).to_contain_text("ink (1)")
    set_number(row(page, "ink").locator("input[type=number]"), 0)
    expect(row(page, "ink").locator("input[type=range]")).to_have_value("0")
    at_zero = draw(page, app)
    assert pixels(at_zero) == pixels(plain) != pixels(changed)
    row(page, "ink").get_by_role("button", name="Take ink off").click()
    expect(title(page)).to_have_text("LoRAs")
    again = draw(page, app)
    assert pixels(again) == pixels(plain)
    expect(page.locator("#settings")).not_to_contain_text("LoRAs")


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
    written = metadata.read(made.read_bytes()).record
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
