"""What of a picture may change: masks read, regions laid over each other, colours matched. Nothing is drawn here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.masks import composite_within, feather_weights, load_mask, make_edit_region, match_colours
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.references import MAX_REFERENCE_PIXELS
from flux2_studio.request import Outpaint, Request

SIZE = (157, 211)
PICTURES = PictureCache()


def speckle(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(values)


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return mask


def saved(tmp_path: Path, image: Image.Image, name: str = "mask.png") -> Path:
    path = tmp_path / name
    image.save(path)
    return path


def test_white_changes_in_whatever_mode_a_mask_comes(tmp_path: Path) -> None:
    box = (20, 30, 90, 100)
    grey = rectangle(SIZE, box)
    white_on_nothing = Image.new("RGBA", SIZE, (255, 255, 255, 0))
    white_on_nothing.paste((255, 255, 255, 255), box)
    for image in (grey, grey.convert("1"), grey.convert("RGB"), grey.convert("P"), white_on_nothing):
        assert load_mask(saved(tmp_path, image), SIZE, PICTURES).edit_mask.tobytes() == grey.tobytes(), image.mode
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    assert load_mask(saved(tmp_path, deep), SIZE, PICTURES).edit_mask.tobytes() == grey.tobytes()


def test_a_mask_of_the_same_shape_is_scaled(tmp_path: Path) -> None:
    large = load_mask(saved(tmp_path, rectangle((471, 633), (90, 90, 300, 300))), SIZE, PICTURES).edit_mask
    assert large.size == SIZE and large.getbbox() == (30, 30, 100, 100)
    # As large as the picture was before it was scaled to a cap, which cuts sides to whole pixels.
    scaled = load_mask(saved(tmp_path, rectangle((4000, 3000), (0, 0, 2000, 3000))), (1182, 886), PICTURES)
    assert scaled.edit_mask.size == (1182, 886)


@pytest.mark.parametrize("size", [(211, 157), (157, 200), (200, 211)])
def test_a_mask_of_another_shape_is_refused_in_words(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ReferenceImageError, match=r"mask\.png has another shape than the picture .* same aspect ratio"):
        load_mask(saved(tmp_path, rectangle(size, (0, 0, 50, 50))), SIZE, PICTURES)


def test_hostile_masks_are_refused_in_words(tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"\x89PNG\r\n\x1a\n" + b"rubbish" * 99)
    bomb = saved(tmp_path, Image.new("1", (10_000, MAX_REFERENCE_PIXELS // 10_000 + 1)), "bomb.png")
    for path, said in (
        (rubbish, "rubbish.png"),
        (bomb, "megapixels: scale it down"),
        (tmp_path / "nowhere.png", "There is no picture nowhere.png"),
        (tmp_path, "is a folder"),
        (saved(tmp_path, Image.new("L", SIZE, 100), "grey.png"), "grey.png has no white"),
    ):
        with pytest.raises(ReferenceImageError, match=said):
            load_mask(path, SIZE, PICTURES)


def test_the_latents_mask_loses_no_pixel(tmp_path: Path) -> None:
    path = saved(tmp_path, rectangle(SIZE, (31, 16, 33, 17)))
    region = make_edit_region(Request(prompt="a", references=(path,), mask=path), speckle(SIZE), PICTURES)
    assert region is not None
    tokens = region.token_mask
    assert tokens.shape == (14, 10)
    assert sorted(zip(*np.nonzero(tokens), strict=True)) == [(1, 1), (1, 2)]
    at_the_end = saved(tmp_path, rectangle(SIZE, (156, 210, 157, 211)))
    region = make_edit_region(Request(prompt="a", references=(path,), mask=at_the_end), speckle(SIZE), PICTURES)
    assert region is not None and region.token_mask.sum() == 1 and region.token_mask[-1, -1]


@pytest.mark.parametrize("shape", ["rectangle", "scattered", "whole"])
def test_outside_every_byte_is_the_pictures(tmp_path: Path, shape: str) -> None:
    before, drawn = speckle(SIZE, 1), speckle(SIZE, 2)
    mask = rectangle(SIZE, (0, 50, 157, 140))
    if shape == "scattered":
        mask = Image.fromarray((np.random.default_rng(3).random((SIZE[1], SIZE[0])) > 0.9).astype(np.uint8) * 255)
    if shape == "whole":
        mask = Image.new("L", SIZE, 255)
    path = saved(tmp_path, mask)
    region = make_edit_region(Request(prompt="a", references=(path,), mask=path), before, PICTURES)
    assert region is not None
    result, old, new = (np.asarray(image) for image in (composite_within(drawn, region), before, drawn))
    inside = np.asarray(mask) > 0
    assert (result[~inside] == old[~inside]).all()
    if shape == "rectangle":
        assert (result[60:130] == new[60:130]).all(), "beyond the feather all is new, at the picture's edge too"
    if shape == "whole":
        assert (result == new).all()


def test_a_thin_stroke_changes_in_its_middle() -> None:
    inside = np.zeros((40, 40), dtype=bool)
    inside[10:13] = True
    inside[20:40] = True
    share = feather_weights(inside, 8)
    assert (share[~inside] == 0).all() and (share[inside] > 0).all()
    assert (share[11] == 1).all()
    assert (np.diff(share[20:28, 5]) >= 0).all() and share[20, 5] < 0.2 and share[39, 5] == 1


def test_outpainting_keeps_the_picture_and_what_its_mask_allows(tmp_path: Path) -> None:
    before = speckle(SIZE)
    path = saved(tmp_path, rectangle(SIZE, (0, 0, 20, 20)))
    request = Request(prompt="a", references=(path,), mask=path, outpaint=Outpaint(left=30, bottom=9))
    region = make_edit_region(request, before, PICTURES)
    assert region is not None
    assert region.original.size == region.edit_mask.size == (187, 220)
    assert region.original.crop((30, 0, 187, 211)).tobytes() == before.tobytes()
    pixels, change = np.asarray(region.original), np.asarray(region.edit_mask)
    assert (pixels[:211, :30] == np.asarray(before)[:, :1]).all()
    assert change[:, :30].all() and change[211:].all() and change[:20, 30:50].all()
    assert not change[20:211, 50:].any()
    result = np.asarray(composite_within(speckle((187, 220), 5), region))
    assert (result[change == 0] == pixels[change == 0]).all()


def test_colours_are_matched_by_what_stays() -> None:
    before = speckle(SIZE).resize(SIZE, Image.Resampling.BICUBIC)
    darker = Image.fromarray((np.asarray(before) * 0.6 + 20).astype(np.uint8))
    change = rectangle(SIZE, (0, 0, 157, 100))
    odd = darker.copy()
    odd.paste((255, 0, 0), (0, 0, 157, 100))  # what is new does not count
    for image, mask in ((darker, None), (odd, change)):
        matched = match_colours(image, before, mask)
        assert matched is not None
        now, wanted = (np.asarray(it).astype(float)[100:] for it in (matched, before))
        assert np.abs(now.mean((0, 1)) - wanted.mean((0, 1))).max() < 2.5
        assert np.abs(now.std((0, 1)) - wanted.std((0, 1))).max() < 4
    same = match_colours(before, before)
    assert same is not None and np.abs(np.asarray(same).astype(int) - np.asarray(before)).max() <= 1
    assert match_colours(darker, before, Image.new("L", SIZE, 255)) is None
    flat = match_colours(Image.new("RGB", SIZE, "grey"), before)
    assert flat is not None, "a picture without any contrast can be matched too"
