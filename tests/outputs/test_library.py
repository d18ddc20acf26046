"""Pictures are saved whole, under a name of their own, or not at all and with a reason."""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from flux2_studio.errors import SaveError
from flux2_studio.request import ImageFormat, Request
from flux2_studio.storage.library import OutputLibrary

REQUEST = Request(prompt="a fox", negative_prompt="", checkpoint="klein-4b", width=64, height=64, seed=6)
NOON = datetime(2026, 2, 3, 12, 30, 59)


def library(folder: Path, token: int = 1) -> OutputLibrary:
    """A library whose names end in 1, 2, 3, ..., from `token` on."""
    return OutputLibrary(folder, now=lambda: NOON, token=map(str, count(token)).__next__)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize(("format", "ending"), [("png", ".png"), ("jpeg", ".jpg"), ("webp", ".webp")])
def test_a_picture_is_saved_under_its_name(tmp_path: Path, format: ImageFormat, ending: str) -> None:
    data = np.random.default_rng(0).bytes(10_000)
    path = library(tmp_path / "new" / "outputs").save(data, replace(REQUEST, format=format))
    assert path == tmp_path / "new" / "outputs" / "2026-02-03" / f"123059-klein-4b-6-1{ending}"
    assert path.read_bytes() == data


def test_the_clock_is_the_real_one_by_default(tmp_path: Path) -> None:
    before = datetime.now().replace(microsecond=0)
    path = OutputLibrary(tmp_path).save(b"a picture", REQUEST)
    saved = datetime.strptime(f"{path.parent.name} {path.name[:6]}", "%Y-%m-%d %H%M%S")
    assert before <= saved <= datetime.now()


def test_a_name_cannot_be_guessed(tmp_path: Path) -> None:
    names = {OutputLibrary(tmp_path, now=lambda: NOON).save(b"a picture", REQUEST).stem for _ in range(20)}
    assert len({name.removeprefix("123059-klein-4b-6-") for name in names if len(name) >= 28}) == 20


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    saved = [library(tmp_path).save(bytes([n]), REQUEST) for n in range(3)]
    assert [path.name for path in saved] == [f"123059-klein-4b-6-{n}.png" for n in (1, 2, 3)]
    assert [path.read_bytes() for path in saved] == [b"\0", b"\1", b"\2"]


def test_threads_saving_the_same_name_at_once_lose_nothing(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def save(n: int) -> Path:
        together.wait()
        return library(tmp_path).save(bytes([n]), REQUEST)

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            saved = list(pool.map(save, range(8)))
        assert len(set(saved)) == 8
        assert [path.read_bytes() for path in saved] == [bytes([n]) for n in range(8)]
    assert len(files(tmp_path)) == 40  # and no temporary file among them


def test_a_name_that_a_crash_left_taken_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "2026-02-03").mkdir()
    (tmp_path / "2026-02-03" / ".123059-klein-4b-6-1.png.part").touch()
    assert library(tmp_path).save(b"a picture", REQUEST).name == "123059-klein-4b-6-2.png"


def test_a_checkpoints_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    request = Request(prompt="x", checkpoint="../../etc/a b", seed=1)
    path = library(tmp_path).save(b"a picture", request)
    assert path.parent == tmp_path / "2026-02-03" and path.name == "123059-..-..-etc-a-b-1-1.png"


def failing(error: BaseException, folder: Path, seen: list[str]) -> Callable[[Path, Path], Path]:
    """A `Path.replace` that fails at the last moment, having seen what others could see until then."""

    def replace(source: Path, target: Path) -> Path:
        seen.extend(files(folder))
        raise error

    return replace


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (errno.ENOSPC, "no space left"),
        (errno.EDQUOT, "no space left"),
        (errno.EFBIG, "no space left"),
        (errno.EACCES, "may not be saved"),
        (errno.EROFS, "may not be saved"),
        (errno.EIO, "could not be saved"),
    ],
)
def test_a_failure_is_told_in_words_and_leaves_nothing_behind(
    tmp_path: Path, code: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    monkeypatch.setattr(Path, "replace", failing(OSError(code, os.strerror(code)), tmp_path, seen))
    with pytest.raises(SaveError) as error:
        library(tmp_path).save(b"a picture", REQUEST)
    message = str(error.value)
    assert said in message and str(tmp_path) in message and "FLUX2_HOME" in message and "Errno" not in message
    assert seen == ["2026-02-03/.123059-klein-4b-6-1.png.part"]  # what others could see meanwhile: no .png
    assert files(tmp_path) == []


def test_a_defect_is_not_dressed_up_but_leaves_nothing_behind_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "replace", failing(ZeroDivisionError(), tmp_path, []))
    with pytest.raises(ZeroDivisionError):
        library(tmp_path).save(b"a picture", REQUEST)
    assert files(tmp_path) == []


def test_checking_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    library(tmp_path / "new" / "outputs").check_writable()
    assert list((tmp_path / "new" / "outputs").iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    with pytest.raises(SaveError, match=r"could not be saved in .*FLUX2_HOME"):
        library(tmp_path / "outputs").save(b"a picture", REQUEST)
    with pytest.raises(SaveError):
        library(tmp_path / "outputs" / "deeper").save(b"a picture", REQUEST)
    with pytest.raises(SaveError, match=r"could not be saved in .*FLUX2_HOME"):
        library(tmp_path / "outputs" / "deeper").check_writable()


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_the_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    path = library(tmp_path).save(b"a picture", REQUEST)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
