"""Pictures are saved whole, under a name of their own, with their parameters, or not at all and with a reason."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2_studio.errors import SaveError
from flux2_studio.outputs.metadata import read
from flux2_studio.outputs.save import Library
from flux2_studio.request import Request

REQUEST = Request(prompt="a fox", negative_prompt="", checkpoint="klein-4b", width=64, height=64, seed=6)
NOON = datetime(2026, 2, 3, 12, 30, 59)


def library(folder: Path, token: int = 1) -> Library:
    """A library whose names end in 1, 2, 3, ..., from `token` on."""
    return Library(folder, now=lambda: NOON, token=map(str, count(token)).__next__)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_picture_is_saved_with_its_pixels_its_name_and_its_parameters(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = library(tmp_path / "new" / "outputs").save(Image.fromarray(pixels), REQUEST, ("cd" * 32,))
    assert path == tmp_path / "new" / "outputs" / "2026-02-03" / "123059-klein-4b-6-1.png"
    np.testing.assert_array_equal(np.asarray(Image.open(path)), pixels)
    parameters = read(path)
    assert parameters is not None
    assert (parameters["seed"], parameters["count"], parameters["references"]) == (6, 1, ["cd" * 32])


def test_the_clock_is_the_real_one_by_default(tmp_path: Path) -> None:
    before = datetime.now().replace(microsecond=0)
    path = Library(tmp_path).save(Image.new("RGB", (64, 64)), REQUEST)
    saved = datetime.strptime(f"{path.parent.name} {path.name[:6]}", "%Y-%m-%d %H%M%S")
    assert before <= saved <= datetime.now()


def test_a_name_cannot_be_guessed(tmp_path: Path) -> None:
    names = {Library(tmp_path, now=lambda: NOON).save(Image.new("RGB", (64, 64)), REQUEST).stem for _ in range(20)}
    assert len({name.removeprefix("123059-klein-4b-6-") for name in names if len(name) >= 28}) == 20


def test_nothing_is_ever_overwritten(tmp_path: Path) -> None:
    saved = [library(tmp_path).save(Image.new("RGB", (64, 64), (n, 0, 0)), REQUEST) for n in range(3)]
    assert [path.name for path in saved] == [f"123059-klein-4b-6-{n}.png" for n in (1, 2, 3)]
    assert [Image.open(path).getpixel((0, 0)) for path in saved] == [(0, 0, 0), (1, 0, 0), (2, 0, 0)]


def test_threads_saving_the_same_name_at_once_lose_nothing(tmp_path: Path) -> None:
    together = threading.Barrier(8)

    def save(n: int) -> Path:
        together.wait()
        return library(tmp_path).save(Image.new("RGB", (64, 64), (n, 0, 0)), REQUEST)

    for _ in range(5):
        with ThreadPoolExecutor(8) as pool:
            saved = list(pool.map(save, range(8)))
        assert len(set(saved)) == 8
        assert [Image.open(path).getpixel((0, 0)) for path in saved] == [(n, 0, 0) for n in range(8)]
    assert len(files(tmp_path)) == 40  # and no temporary file among them


def test_a_name_that_a_crash_left_taken_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "2026-02-03").mkdir()
    (tmp_path / "2026-02-03" / ".123059-klein-4b-6-1.png.part").touch()
    assert library(tmp_path).save(Image.new("RGB", (64, 64)), REQUEST).name == "123059-klein-4b-6-2.png"


def test_a_checkpoints_name_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    request = Request(prompt="x", checkpoint="../../etc/a b", seed=1)
    path = library(tmp_path).save(Image.new("RGB", (64, 64)), request)
    assert path.parent == tmp_path / "2026-02-03" and path.name == "123059-..-..-etc-a-b-1-1.png"


class Failing(Image.Image):
    """A picture whose writing begins and then fails."""

    def __init__(self, error: BaseException, folder: Path) -> None:
        super().__init__()
        self.error, self.folder = error, folder
        self.seen: list[str] = []

    def save(self, fp: Any, format: str | None = None, **params: Any) -> None:
        fp.write(b"\x89PNG half a picture")
        fp.flush()
        self.seen = files(self.folder)
        raise self.error


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
def test_a_failure_is_told_in_words_and_leaves_nothing_behind(tmp_path: Path, code: int, said: str) -> None:
    image = Failing(OSError(code, os.strerror(code)), tmp_path)
    with pytest.raises(SaveError) as error:
        library(tmp_path).save(image, REQUEST)
    message = str(error.value)
    assert said in message and str(tmp_path) in message and "FLUX2_HOME" in message and "Errno" not in message
    assert image.seen == ["2026-02-03/.123059-klein-4b-6-1.png.part"]  # what others could see meanwhile: no .png
    assert files(tmp_path) == []


def test_a_defect_is_not_dressed_up_but_leaves_nothing_behind_either(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        library(tmp_path).save(Failing(ZeroDivisionError(), tmp_path), REQUEST)
    assert files(tmp_path) == []


@pytest.mark.parametrize("call", ["save(Image.effect_noise((512, 512), 50), REQUEST)", "check()"])
def test_a_disk_that_is_really_full(tmp_path: Path, call: str) -> None:
    """Then closing the half-written file fails as well."""
    program = f"""
import resource
from pathlib import Path
from PIL import Image
from flux2_studio.errors import SaveError
from tests.outputs.test_save import REQUEST, library
before = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
try:
    library(Path({str(tmp_path)!r})).{call}
except SaveError as error:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    print(error)
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"There is no space left to save the picture in {tmp_path}")
    assert done.stderr == ""
    assert files(tmp_path) == []


def test_checking_makes_the_folder_and_leaves_nothing_in_it(tmp_path: Path) -> None:
    library(tmp_path / "new" / "outputs").check()
    assert list((tmp_path / "new" / "outputs").iterdir()) == []


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "outputs").touch()
    with pytest.raises(SaveError, match=r"could not be saved in .*FLUX2_HOME"):
        library(tmp_path / "outputs").save(Image.new("RGB", (64, 64)), REQUEST)
    with pytest.raises(SaveError):
        library(tmp_path / "outputs" / "deeper").save(Image.new("RGB", (64, 64)), REQUEST)
    with pytest.raises(SaveError, match=r"could not be saved in .*FLUX2_HOME"):
        library(tmp_path / "outputs" / "deeper").check()


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def test_the_file_follows_the_umask(tmp_path: Path, umask: int) -> None:
    path = library(tmp_path).save(Image.new("RGB", (64, 64)), REQUEST)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask
