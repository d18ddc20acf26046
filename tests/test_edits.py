"""Edits that keep what they should, through `Studio.generate`: sizes, masks, outpainting, marks, and made again."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.engine.weights.loading import load_autoencoder
from flux2_studio.errors import ReferenceImageError
from flux2_studio.events import Event, Notice, Preview, Result, Saved
from flux2_studio.images.masks import load_mask
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.references import fit, pad_to_multiple
from flux2_studio.images.tensors import images_from_pixels, pixels_from_image
from flux2_studio.provenance import metadata
from flux2_studio.provenance.inspect import inspect_picture
from flux2_studio.provenance.metadata import request_to_reproduce
from flux2_studio.record import Record
from flux2_studio.request import Outpaint, Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from flux2_studio.ui.inspect_tab import plan_restoration
from tests.test_masks import rectangle
from tests.tiny import Toys

SIZE = (157, 211)
FOX = Path(__file__).resolve().parent.parent / "assets" / "examples" / "fox.png"


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(home=tmp_path_factory.mktemp("home"), device="cpu", preview="off", safety="off")


@pytest.fixture(scope="module")
def studio(settings: Settings) -> Studio:
    return Studio(settings, reference_store=ReferenceStore(settings.references))


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    path = tmp_path / "fox.png"
    Image.open(FOX).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    rectangle(SIZE, (20, 30, 100, 130)).save(path)
    return path


def run(studio: Studio, **fields: Any) -> tuple[list[Event], Result]:
    events = list(studio.generate(Request(**{"prompt": "make the background yellow", "seed": 3, **fields})))
    assert isinstance(events[-1], Result)
    return events, events[-1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def record_in(path: Path) -> Record:
    found = metadata.read_settings(path.read_bytes())
    assert found.record is not None, found.problem
    return found.record


def notices(events: list[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


def shift(one: np.ndarray, other: np.ndarray) -> tuple[int, int]:
    """By how many (rows, columns) `other` is moved against `one`: the peak of their phase correlation."""
    window = np.hanning(one.shape[0])[:, None] * np.hanning(one.shape[1])[None]
    grey = [(it.mean(-1) - it.mean()) * window for it in (one, other)]
    product = np.conj(np.fft.fft2(grey[0])) * np.fft.fft2(grey[1])
    peak = np.unravel_index(np.argmax(np.fft.ifft2(product / (np.abs(product) + 1e-9)).real), one.shape[:2])
    rows, columns = (int(at) if at <= size // 2 else int(at) - size for at, size in zip(peak, one.shape, strict=False))
    return rows, columns


@pytest.mark.parametrize("size", [SIZE, (95, 130), (128, 96), (143, 150)])
def test_through_the_autoencoder_and_back_nothing_moves(settings: Settings, size: tuple[int, int]) -> None:
    image = Image.open(FOX).convert("RGB").resize(size, Image.Resampling.LANCZOS)
    weights = settings.assets / "nano" / "ae.safetensors"
    autoencoder = load_autoencoder(weights, device=torch.device("cpu"), dtype=torch.float32)
    (back,) = images_from_pixels(autoencoder.decode(autoencoder.encode(pixels_from_image(pad_to_multiple(image)))))
    before, after = np.asarray(image), np.asarray(back.crop((0, 0, *size)))
    assert shift(before, after) == (0, 0)
    assert shift(before, np.roll(after, (3, -5), (0, 1))) == (3, -5), "the test would see it"


def test_an_edit_has_the_size_of_its_reference(studio: Studio, fox: Path) -> None:
    events, result = run(studio, references=(fox,))
    assert Image.open(result.images[0]).size == SIZE == (result.request.width, result.request.height)
    assert "rounded" not in notices(events) and "cropped" not in notices(events)
    assert inspect_picture(result.images[0], studio.signer, studio.messages).width == 157


def test_a_reference_over_the_cap_is_scaled_once_and_the_size_is_told(studio: Studio, tmp_path: Path) -> None:
    path = tmp_path / "large.png"
    Image.open(FOX).convert("RGB").resize((700, 501)).save(path)
    events, result = run(studio, references=(path,))
    assert Image.open(result.images[0]).size == (302, 216)
    assert "Image 1 was scaled from 700 x 501 to 302 x 216." in notices(events)


def test_previews_are_cropped_too(settings: Settings, fox: Path) -> None:
    events, _ = run(Studio(replace(settings, preview="tiny")), references=(fox,))
    assert {event.images[0].size for event in events if isinstance(event, Preview)} == {SIZE}


@pytest.mark.parametrize("references", [1, 2])
def test_outside_the_mask_every_pixel_stays(studio: Studio, fox: Path, mask: Path, references: int) -> None:
    events, result = run(studio, references=(fox, FOX)[:references], mask=mask, count=2)
    # Several references have a smaller cap: what stays are the pixels of the first as it was scaled, once.
    before = np.asarray(fit(Image.open(fox).convert("RGB"), NANO.max_pixels_per_reference(references)))
    inside = np.asarray(load_mask(mask, before.shape[1::-1], PictureCache()).edit_mask) > 0
    assert len(result.images) == 2
    for path in result.images:
        after = pixels(path)
        assert after.shape == before.shape
        assert (after[~inside] == before[~inside]).all()
        assert (after[inside] != before[inside]).any(-1).mean() > 0.5
    assert "is too small to hold" in notices(events)


def test_an_upright_phone_photo_keeps_its_pixels(studio: Studio, tmp_path: Path, mask: Path) -> None:
    lying = Image.Exif()
    lying[0x0112] = 6
    path = tmp_path / "phone.png"
    Image.open(FOX).convert("RGB").resize((211, 157)).save(path, exif=lying)
    _, result = run(studio, references=(path,), mask=mask, match_colours=True)
    before = np.rot90(pixels(path), -1)
    inside = np.asarray(Image.open(mask)) > 0
    assert (pixels(result.images[0])[~inside] == before[~inside]).all()


def test_outpainting_leaves_the_picture_as_it_is(studio: Studio, fox: Path) -> None:
    margins = Outpaint(left=40, top=3, right=30)
    _, result = run(studio, references=(fox,), outpaint=margins)
    after = pixels(result.images[0])
    assert after.shape == (214, 227, 3)
    assert (after[3:, 40:197] == pixels(fox)).all()
    # Next to the picture the new begins where its edge ends.
    step = np.abs(after[3:, 39].astype(int) - after[3:, 40]).mean()
    assert step < 12
    assert record_in(result.images[0]).request.outpaint == margins


def test_a_mask_that_cannot_serve_is_told_when_the_run_is_asked_for(studio: Studio, fox: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wide.png"
    rectangle((200, 100), (0, 0, 9, 9)).save(wrong)
    with pytest.raises(ReferenceImageError, match=r"The mask wide\.png has another shape"):
        studio.resolve(Request(prompt="a fox", references=(fox,), mask=wrong))


def test_a_mask_of_everything_leaves_no_colours_to_match(studio: Studio, fox: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.new("L", SIZE, 255).save(whole)
    events, _ = run(studio, references=(fox,), mask=whole, match_colours=True)
    assert "The colours were not matched" in notices(events)


def test_matched_colours(studio: Studio, fox: Path) -> None:
    _, plain = run(studio, references=(fox,))
    _, matched = run(studio, references=(fox,), match_colours=True)
    wanted = pixels(fox).astype(float).mean((0, 1))
    far, near = (np.abs(pixels(it.images[0]).mean((0, 1)) - wanted).max() for it in (plain, matched))
    assert near < 12 < far


@pytest.mark.parametrize(
    "fields", [{}, {"mask": True}, {"mask": True, "outpaint": Outpaint(left=21, top=5), "count": 2}]
)
def test_restoring_gives_the_same_bits(
    studio: Studio, settings: Settings, tmp_path: Path, fox: Path, mask: Path, fields: dict[str, Any]
) -> None:
    if "mask" in fields:
        fields = {**fields, "mask": mask, "match_colours": True}
    events, result = run(studio, references=(fox,), **fields)
    path = result.images[-1]
    record = record_in(path)
    assert [event.record for event in events if isinstance(event, Saved)][-1] == record
    assert record.mask == (hashlib.sha256(mask.read_bytes()).hexdigest() if "mask" in fields else "")
    assert request_to_reproduce(record).mask is None
    fox.unlink()
    mask.unlink()
    plan = plan_restoration(record, studio, studio.reference_store)
    assert (plan.request is not None and plan.notes == ()) or "drawn together" in plan.notes[0]
    assert plan.request is not None and plan.checkpoint is not None
    assert (plan.request.width, plan.request.height) == Image.open(path).size
    again = Studio(replace(settings, home=tmp_path))
    events = list(again.generate(plan.request))
    assert isinstance(events[-1], Result)
    np.testing.assert_array_equal(pixels(path), pixels(events[-1].images[record.place]))


def test_a_mask_that_is_not_kept_is_named(studio: Studio, fox: Path, mask: Path) -> None:
    _, result = run(studio, references=(fox,), mask=mask)
    record = replace(record_in(result.images[0]), mask="0" * 64)
    assert (
        "Its mask is not kept here: paint or load it again."
        in plan_restoration(record, studio, studio.reference_store).notes
    )


@pytest.fixture(scope="module")
def klein(toys: Toys, tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """A toy whose references may be large enough for a watermark."""
    home = tmp_path_factory.mktemp("klein")
    return Studio(toys.settings(home, ["klein-4b"], preview="off", safety="off"))


@pytest.mark.parametrize("box", [(40, 16, 360, 310), (0, 0, 419, 333)])
def test_the_watermark_lies_in_what_was_edited(klein: Studio, tmp_path: Path, box: tuple[int, int, int, int]) -> None:
    size = (419, 333)
    picture, mask = tmp_path / "picture.png", tmp_path / "mask.png"
    Image.open(FOX).convert("RGB").resize(size).save(picture)
    rectangle(size, box).save(mask)
    _, result = run(klein, references=(picture,), mask=mask)
    path = result.images[0]
    inside = np.asarray(Image.open(mask)) > 0
    assert (pixels(path)[~inside] == pixels(picture)[~inside]).all()
    record, seen = record_in(path), inspect_picture(path, klein.signer, klein.messages)
    whole = box == (0, 0, *size)
    assert record.marked == (None if whole else box) == seen.watermark_box
    assert seen.watermark is not None and seen.watermark.found
    assert any("in the part that was edited" in finding for finding in seen.findings) is not whole
    told = next(text for text in result.provenance if text.startswith("Invisible watermark"))
    assert ("Inspect finds it by the file's settings" in told) is not whole
    _, bare = run(klein, references=(picture,), mask=mask, metadata=False)
    assert any("nothing in the file says so" in text for text in bare.provenance) is not whole
