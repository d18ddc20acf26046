"""Where the larger picture classifier is looked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.errors import ClassifierError
from flux2_studio.models.hub.classifier import find_classifier


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"x")
    return folder


def test_nowhere(tmp_path: Path) -> None:
    assert find_classifier(None, tmp_path) is None


def test_in_the_hubs_cache(tmp_path: Path) -> None:
    repo = tmp_path / "models--Falconsai--nsfw_image_detection"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("abc", "utf-8")
    snapshot = fill(repo / "snapshots" / "abc", "config.json", "pytorch_model.bin")
    assert find_classifier(None, tmp_path) is None, "safetensors only"
    fill(snapshot, "model.safetensors")
    assert find_classifier(None, tmp_path) == snapshot


def test_ones_own_copy(tmp_path: Path) -> None:
    own = fill(tmp_path / "own", "config.json", "model.safetensors")
    assert find_classifier(own, tmp_path) == own
    (own / "model.safetensors").unlink()
    with pytest.raises(ClassifierError, match="FLUX2_NSFW_MODEL_PATH points to"):
        find_classifier(own, tmp_path)
