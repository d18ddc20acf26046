"""Files that are written atomically, hashes, and the types of pictures."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.files.atomic import PRIVATE, SHARED, atomic_write
from flux2_studio.files.hashing import hash_bytes, hash_file
from flux2_studio.files.picture_types import PICTURE_SUFFIXES, detect_picture_type


def test_a_file_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt()])
def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_writers_at_once_do_not_mix(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    start = threading.Barrier(8)

    def write(number: int) -> None:
        start.wait(60)
        for _ in range(20):
            with atomic_write(path) as file:
                for _ in range(10):
                    file.write(bytes([number]) * 100)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert len(data) == 1000 and len(set(data)) == 1 and list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(os.name != "posix", reason="permissions are those of POSIX")
def test_files_are_private_unless_they_are_to_be_shared(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        for mode, expected in ((PRIVATE, 0o600), (SHARED, 0o644)):
            path = tmp_path / f"{mode}"
            with atomic_write(path, mode) as file:
                file.write(b"x")
            assert stat.S_IMODE(path.stat().st_mode) == expected
    finally:
        os.umask(umask)


def test_hashes(tmp_path: Path) -> None:
    data = bytes(range(256)) * 1000
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    assert hash_file(path) == hash_bytes(data) == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_pictures_as_pillow_writes_them(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.new("RGB", (64, 64), "teal").save(path)
    found = detect_picture_type(path.read_bytes())
    assert found is not None and found.suffix == suffix
    assert found.mime == Image.MIME[Image.open(path).format or ""]


@pytest.mark.parametrize("data", [b"", b"RIFF\0\0\0\0WAVE", b"\x89PNG", b"%PDF-1.7", b"\0\0\0\x1cftypheic"])
def test_what_is_none_of_them(data: bytes) -> None:
    assert detect_picture_type(data) is None
