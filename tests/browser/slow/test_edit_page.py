"""What a person does to change a part of a picture: paints, loads or types a mask, outpaints, compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Page, expect

from tests.browser.pages.masks import KEPT, changed, downloaded, panel, said
from tests.browser.steps import expect_finished, open_tab, run, settings, upload, write
from tests.browser.studio import ROOT, App


def test_an_edit_has_the_size_of_its_picture_and_lies_over_it(page: Page, fox: Path, tmp_path: Path) -> None:
    open_tab(page, "Edit")
    upload(page, "edit", fox)
    expect(page.locator("#edit")).to_contain_text("As image 1: 157 x 211 pixels")
    write(page, "edit", "make the background yellow")
    run(page, "edit")
    assert downloaded(page, tmp_path).shape == (211, 157, 3)
    assert settings(page)["Size"] == "157 x 211"
    pictures = page.locator("#compare img")
    expect(pictures).to_have_count(2)
    expect(pictures.first).to_be_visible()
    clip = "getComputedStyle(document.querySelector('#compare img.fixed')).clipPath"
    assert "100%" not in page.evaluate(clip)
    hold = page.get_by_role("button", name="Hold to see the original")
    hold.scroll_into_view_if_needed()
    hold.hover()
    page.mouse.down()
    assert "100%" in page.evaluate(clip)
    page.mouse.up()
    assert "100%" not in page.evaluate(clip)
    open_tab(page, "Generate")
    write(page, "generate", "a lemon")
    run(page, "generate")
    expect_finished(page)
    expect(page.locator("#comparison")).to_be_hidden()


def test_a_rectangle_inverted_and_cleared(page: Page, fox: Path, tmp_path: Path) -> None:
    edits = panel(page, fox)
    for label, value in (("Left", 31), ("Top", 17), ("Width", 70), ("Height", 90)):
        edits.locator(".rectangle").get_by_label(label).fill(str(value))
    edits.get_by_role("button", name="Add rectangle").click()
    expect(said(edits)).to_contain_text(KEPT)
    run(page, "edit")
    first = changed(downloaded(page, tmp_path), fox)
    inside = np.zeros_like(first)
    inside[17:107, 31:101] = True
    assert not first[~inside].any() and first[inside].mean() > 0.5
    edits.get_by_role("button", name="Invert").click()
    run(page, "edit")
    second = changed(downloaded(page, tmp_path), fox)
    assert not second[inside].any() and second[~inside].mean() > 0.5
    edits.get_by_role("button", name="Clear").click()
    expect(said(edits)).to_contain_text("Without a mask all of it may")


def test_a_mask_is_loaded_and_goes_with_its_picture(page: Page, fox: Path, tmp_path: Path) -> None:
    edits = panel(page, fox)
    mask, wrong, rubbish = tmp_path / "mask.png", tmp_path / "wide.png", tmp_path / "rubbish.png"
    white = Image.new("L", (314, 422), 0)  # twice as large
    white.paste(255, (0, 0, 314, 200))
    white.save(mask)
    Image.new("L", (300, 100), 255).save(wrong)
    rubbish.write_bytes(b"rubbish")
    load = edits.locator(".load input")
    load.set_input_files(str(rubbish))
    expect(said(edits)).to_contain_text("rubbish.png cannot be read as a mask")
    load.set_input_files(str(wrong))
    expect(said(edits)).to_contain_text("wide.png has another shape")
    load.set_input_files(str(mask))
    expect(said(edits)).to_contain_text(KEPT)
    run(page, "edit")
    now = changed(downloaded(page, tmp_path), fox)
    assert now[:99].mean() > 0.5 and not now[101:].any()
    upload(page, "edit", ROOT / "assets" / "examples" / "car.png")
    expect(said(edits)).to_contain_text("its mask was cleared")


def test_outpainting_by_pixels_and_to_a_shape(page: Page, fox: Path, tmp_path: Path) -> None:
    edits = panel(page, fox)
    edits.locator(".outpaint select").select_option("1:1")
    expect(edits.locator(".outpaint .said")).to_contain_text("grows to 211 x 211 pixels")
    edits.locator(".outpaint").get_by_label("Top").fill("9")
    expect(edits.locator(".outpaint .said")).to_contain_text("grows to 211 x 220 pixels")
    run(page, "edit")
    after = downloaded(page, tmp_path)
    assert after.shape == (220, 211, 3)
    assert (after[9:, 27:184] == np.asarray(Image.open(fox).convert("RGB"))).all()
    assert settings(page)["Outpainted by"] == "27 on the left, 9 on the top, 27 on the right"


def test_restoring_puts_mask_and_margins_back(page: Page, app: App, fox: Path, tmp_path: Path) -> None:
    edits = panel(page, fox)
    edits.get_by_role("button", name="Add rectangle").click()
    edits.locator(".outpaint").get_by_label("Left").fill("20")
    edits.get_by_label("Match colours").check()
    run(page, "edit")
    before = downloaded(page, tmp_path)
    made = app.pictures()[-1]
    page.reload()
    open_tab(page, "Inspect")
    page.locator("#inspect-picture input[type=file]").set_input_files(str(made))
    page.locator("#inspect-restore").click()
    expect(said(page.locator("#edit .edits"))).to_contain_text(KEPT)
    expect(page.locator("#edit .outpaint").get_by_label("Left")).to_have_value("20")
    run(page, "edit")
    np.testing.assert_array_equal(downloaded(page, tmp_path), before)
