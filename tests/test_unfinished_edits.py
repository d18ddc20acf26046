"""A preview of an edit that was stopped, kept as a picture: outside the mask every pixel is the original's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from flux2_studio.events import Preview, Saved, Stopped
from flux2_studio.request import Outpaint, Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio

SIZE = (96, 80)
BOX = (20, 16, 60, 56)
FOX = Path(__file__).resolve().parent.parent / "assets" / "examples" / "fox.png"


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    path = tmp_path / "fox.png"
    Image.open(FOX).convert("RGB").resize(SIZE, Image.Resampling.LANCZOS).save(path)
    return path


@pytest.fixture
def mask(tmp_path: Path) -> Path:
    path = tmp_path / "mask.png"
    picture = Image.new("L", SIZE)
    ImageDraw.Draw(picture).rectangle(BOX, fill=255)
    picture.save(path)
    return path


def stopped_and_kept(home: Path, **fields: Any) -> Saved:
    """The preview after step 2 of a run that ends there, saved."""
    studio = Studio(Settings(home=home, device="cpu", safety="off"))
    preview = None
    events = studio.generate(
        Request(prompt="make the background yellow", seed=3, **fields),
        lambda: preview is not None and preview.step == 2,
    )
    for event in events:
        if isinstance(event, Preview):
            preview = event
    assert isinstance(event, Stopped) and preview is not None
    saved, _ = studio.save_preview(preview.unfinished[0])
    return saved


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_outside_the_mask_nothing_changes(fox: Path, mask: Path, tmp_path: Path) -> None:
    saved = stopped_and_kept(tmp_path / "home", references=(fox,), mask=mask)
    inside = np.asarray(Image.open(mask)) > 0
    before, after = pixels(fox), pixels(saved.image)
    assert np.array_equal(before[~inside], after[~inside])
    assert not np.array_equal(before[inside], after[inside])
    assert saved.record is not None and saved.record.mask and saved.record.unfinished == (2, 4)


def test_new_edges_surround_the_original(fox: Path, tmp_path: Path) -> None:
    saved = stopped_and_kept(tmp_path / "home", references=(fox,), outpaint=Outpaint(left=32, top=16))
    after = pixels(saved.image)
    assert after.shape[:2] == (SIZE[1] + 16, SIZE[0] + 32)
    assert np.array_equal(after[16:, 32:], pixels(fox))
