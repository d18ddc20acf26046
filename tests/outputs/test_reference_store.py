"""References are kept once, under their hash, whole or not at all; and only what is still itself is handed out."""

from __future__ import annotations

import errno
import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.errors import SaveError
from flux2_studio.images import reference_store
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.references import READABLE_FORMATS


def picture(format: str = "PNG", colour: str = "teal") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), colour).save(out, format)
    return out.getvalue()


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_what_is_kept_is_found_by_its_hash(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "new" / "references")
    data = picture()
    sha256 = store.save(data)
    assert sha256 == hashlib.sha256(data).hexdigest()
    path = store.find(sha256)
    assert path == tmp_path / "new" / "references" / sha256[:2] / f"{sha256}.png"
    assert path.read_bytes() == data
    assert files(tmp_path) == [f"new/references/{sha256[:2]}/{sha256}.png"]


@pytest.mark.parametrize("format", READABLE_FORMATS)
def test_every_format_has_its_ending_and_is_found(tmp_path: Path, format: str) -> None:
    store = ReferenceStore(tmp_path)
    path = store.find(store.save(picture(format)))
    assert path is not None
    assert Image.registered_extensions()[path.suffix] == format


def test_what_is_no_picture_is_kept_too(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    for data in (b"", b"whatever"):
        path = store.find(store.save(data))
        assert path is not None and path.suffix == ".bin" and path.read_bytes() == data


def test_a_file_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    path = store.find(store.save(picture()))
    assert path is not None
    before = path.stat()
    store.save(picture())
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_an_altered_file_is_not_handed_out_until_it_is_kept_anew(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    data = picture()
    sha256 = store.save(data)
    path = store.find(sha256)
    assert path is not None
    path.write_bytes(data[:-1] + b"x")
    assert store.find(sha256) is None
    store.save(data)
    assert store.find(sha256) == path and path.read_bytes() == data


@pytest.mark.parametrize(
    "sha256",
    ["", "ab", "AB" * 32, "ab" * 32 + "\n", "../" * 21 + "a", "/etc/passwd", "*" * 64, "ab" * 31 + "a\0", "g" * 64],
)
def test_what_is_no_hash_is_not_looked_for(tmp_path: Path, sha256: str) -> None:
    store = ReferenceStore(tmp_path / "references")
    store.save(picture())
    (tmp_path / "references" / sha256[:2].strip("/.*\0") / "x").parent.mkdir(exist_ok=True)
    assert store.find(sha256) is None


def test_an_unknown_hash_and_no_folder_are_none(tmp_path: Path) -> None:
    assert ReferenceStore(tmp_path / "none").find("ab" * 32) is None
    store = ReferenceStore(tmp_path)
    store.save(picture())
    assert store.find("ab" * 32) is None


def test_a_folder_or_a_file_that_cannot_be_read_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sha256 = "ab" * 32
    (tmp_path / "ab" / f"{sha256}.png").mkdir(parents=True)
    assert ReferenceStore(tmp_path).find(sha256) is None
    store = ReferenceStore(tmp_path)
    sha256 = store.save(picture())
    assert store.find(sha256) is not None

    def refuse(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(reference_store, "hash_file", refuse)
    assert store.find(sha256) is None


def test_threads_keeping_the_same_file_at_once(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path)
    data = picture() + bytes(300_000)
    together = threading.Barrier(8)

    def keep(_: int) -> str:
        together.wait()
        return store.save(data)

    with ThreadPoolExecutor(8) as pool:
        hashes = set(pool.map(keep, range(8)))
    assert len(hashes) == 1
    assert len(files(tmp_path)) == 1, "and no temporary file among them"
    path = store.find(hashes.pop())
    assert path is not None and path.read_bytes() == data


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "references").touch()
    with pytest.raises(SaveError, match=r"could not be kept in .*FLUX2_HOME") as error:
        ReferenceStore(tmp_path / "references").save(picture())
    assert "Errno" not in str(error.value)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_no_space_is_told_in_words(tmp_path: Path, code: int) -> None:
    message = ReferenceStore(tmp_path)._reason(OSError(code, "x"))
    assert "no space left" in message and "FLUX2_HOME" in message
