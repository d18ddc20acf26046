"""The Inspect tab in a real browser: what a picture says, and back to the form that made it."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page, expect

from flux2_studio.checkpoints import NANO
from flux2_studio.outputs import metadata
from flux2_studio.record import Record
from flux2_studio.request import Request
from tests.browser.conftest import App
from tests.browser.steps import EXAMPLES, expect_finished, open_tab, run, set_count, set_size, upload, write


def inspect(page: Page, file: Path) -> None:
    open_tab(page, "Inspect")
    page.locator("#inspect input[type=file]").set_input_files(str(file))


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def changed(data: bytes) -> bytes:
    """A signed PNG with one pixel changed, its credentials as they were."""
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        image.putpixel((3, 3), (1, 2, 3))
        out = io.BytesIO()
        info = PngInfo()
        info.add_text("parameters", image.text["parameters"])  # type: ignore[attr-defined]
        image.save(out, "PNG", pnginfo=info)
    start = data.index(b"caBX") - 4
    length = int.from_bytes(data[start : start + 4], "big") + 12
    bare = out.getvalue()
    return bare[:33] + data[start : start + length] + bare[33:]  # behind IHDR, as it was


def test_a_picture_says_all_of_itself_and_is_made_again(page: Page, app: App) -> None:
    write(page, "generate", "a flat <b>fox</b> on a pink background")
    set_size(page, "generate", 256, 256)
    run(page, "generate")
    expect_finished(page)
    first = app.pictures()[-1]
    page.reload()
    inspect(page, first)
    report = page.locator("#inspect")
    expect(report).to_contain_text("a flat <b>fox</b> on a pink background")
    expect(report).to_contain_text("Watermark found: 46 of the 46 bits")
    expect(report).to_contain_text("unchanged since this installation signed it")
    page.locator("#inspect-restore").click()
    prompt = page.locator("#generate .prompt textarea")
    expect(prompt).to_be_visible()
    expect(prompt).to_have_value("a flat <b>fox</b> on a pink background")
    run(page, "generate")
    expect_finished(page)
    again = app.pictures()[-1]
    assert again != first
    np.testing.assert_array_equal(pixels(again), pixels(first))


def test_an_edit_of_a_batch_comes_back_with_its_reference(page: Page, app: App, tmp_path: Path) -> None:
    reference = tmp_path / "mine.png"
    reference.write_bytes((EXAMPLES / "penguin.png").read_bytes())
    open_tab(page, "Edit")
    upload(page, "edit", reference)
    expect(page.locator("#edit .references img")).to_be_visible()
    write(page, "edit", "make the background green")
    set_count(page, "edit", 2)
    run(page, "edit")
    expect_finished(page, 2)
    *_, _, second = app.pictures()
    reference.unlink()
    page.reload()
    inspect(page, second)
    page.locator("#inspect-restore").click()
    expect(page.locator("#edit .references img")).to_be_visible()
    expect(page.locator("#edit .prompt textarea")).to_have_value("make the background green")
    run(page, "edit")
    expect_finished(page, 2)
    again = app.pictures()[-1]
    assert again != second
    np.testing.assert_array_equal(pixels(again), pixels(second))


def test_one_changed_pixel_is_told(page: Page, app: App, tmp_path: Path) -> None:
    write(page, "generate", "a flat fox")
    run(page, "generate")
    expect_finished(page)
    forged = tmp_path / "forged.png"
    forged.write_bytes(changed(app.pictures()[-1].read_bytes()))
    inspect(page, forged)
    expect(page.locator("#inspect")).to_contain_text("The picture was changed after it was signed")


GOOD = metadata.as_dict(
    Record(
        request=Request(prompt="a fox", width=64, height=64, seed=1).resolve(NANO),
        label=NANO.label,
    )
)
HTML = "<img src=x onerror='window.hacked=1'>"
HOSTILE = {  # what stands in the file, and what is said of it
    "html": (json.dumps(GOOD | {"checkpoint": {"name": HTML, "label": HTML, "sha256": ""}}), HTML),
    "path": (json.dumps(GOOD | {"references": ["../../../../etc/passwd"]}), "something that is no SHA-256"),
    "deep": ("[" * 50_000, "settings of another program"),
    "huge": (json.dumps(GOOD | {"original_prompt": "a" * 2_000_000}), "damaged or incomplete"),
}


def test_a_hostile_picture_is_ignored_with_a_message(page: Page, tmp_path: Path) -> None:
    for kind, (written, said) in HOSTILE.items():
        info = PngInfo()
        info.add_text("parameters", written, zip=True)
        file = tmp_path / f"{kind}<img src=x onerror=window.hacked=2>.png"
        Image.new("RGB", (64, 64), "teal").save(file, pnginfo=info)
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        inspect(page, file)
        expect(page.locator("#inspect-report")).to_contain_text("SHA-256")
        expect(page.locator("#inspect-report")).to_contain_text(sha256)
        expect(page.locator("#inspect")).to_contain_text(said)
        expect(page.locator("#inspect-restore")).to_be_hidden()
        assert page.evaluate("window.hacked === undefined")
        assert page.locator("#inspect img[src=x]").count() == 0


def test_rubbish_is_told_and_what_cannot_be_restored_explained(page: Page, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"not a picture")
    inspect(page, rubbish)
    expect(page.locator("#inspect")).to_contain_text("not a picture")
    expect(page.locator("#inspect-restore")).to_be_hidden()
    info = PngInfo()
    info.add_text("parameters", json.dumps(GOOD | {"checkpoint": {"name": "sdxl", "label": "SDXL", "sha256": ""}}))
    file = tmp_path / "unknown.png"
    Image.new("RGB", (64, 64), "teal").save(file, pnginfo=info)
    inspect(page, file)
    expect(page.get_by_text("this studio has no checkpoint called 'sdxl'")).to_be_visible()


def test_formats_and_marks_are_chosen_on_the_page_and_it_says_its_safety_policy(page: Page, app: App) -> None:
    expect(page.locator("#policy")).to_have_text(
        "Safety check: warnings only. What it flags is told, and shown all the same."
    )
    write(page, "generate", "a flat fox")
    marks = page.locator("#generate .marks")
    marks.locator(".label-wrap").first.click()
    expect(marks).to_contain_text("it does not prove who made it")
    marks.get_by_label("JPEG").check()
    marks.get_by_label("Content credentials").uncheck()
    run(page, "generate")
    expect_finished(page)
    newest = max((app.home / "outputs").rglob("*.jpg"), key=lambda path: path.stat().st_mtime_ns)
    data = newest.read_bytes()
    assert Image.open(newest).format == "JPEG" and b"c2pa" not in data and b"a flat fox" in data
