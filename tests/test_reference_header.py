"""The size of a reference is read from its header: neither the pixels nor the rest of a large file."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.references import MAX_REFERENCE_BYTES, reference_size


@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "gif", "bmp"])
def test_a_large_file_is_not_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"large.{ending}"
    Image.new("RGB", (160, 96), "teal").save(path)
    with path.open("ab") as file:
        file.truncate(MAX_REFERENCE_BYTES)  # sparse: no room is taken on disk
    tracemalloc.start()
    try:
        assert reference_size(path) == (160, 96)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_what_is_no_file_or_too_large_is_refused(tmp_path: Path) -> None:
    large, empty = tmp_path / "large.png", tmp_path / "empty.png"
    empty.touch()
    Image.new("RGB", (64, 64)).save(large)
    with large.open("ab") as file:
        file.truncate(MAX_REFERENCE_BYTES + 1)
    for path, why in ((large, "larger than 200 MB"), (empty, "is empty"), (tmp_path, "is a folder")):
        with pytest.raises(ReferenceImageError, match=why):
            reference_size(path)
