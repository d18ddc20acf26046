"""The presets' example pictures are what the studio draws, and one command makes them anew."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.settings import PRESETS
from tools.presets import examples


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGBA")).astype(float)


def test_the_same_pictures_come_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert examples.main(["--out", str(tmp_path), "--only", "icon-flat", "--only", "icon-onto"]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["icon-flat.webp", "icon-onto.webp"]
    for path in tmp_path.iterdir():
        # Other processors add in another order, by which a shade may differ.
        assert np.abs(pixels(path) - pixels(PRESETS / "examples" / path.name)).mean() < 3
