"""References are decoded once, however often the page and the runs need them."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.errors import ReferenceImageError
from flux2_studio.events import Drafted, Result
from flux2_studio.images import picture_cache
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.references import decode_reference, fit, load_reference
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from flux2_studio.ui.forms.reference_panel import examine
from flux2_studio.ui.stage.compare import load_original
from tests.scripted_studio import follow, journal_of


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were decoded, in order."""
    names: list[str] = []

    def counted(data: bytes, sha256: str, name: str, background: str) -> object:
        names.append(name)
        return decode_reference(data, sha256, name, background)

    monkeypatch.setattr(picture_cache, "decode_reference", counted)
    return names


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """12 megapixels."""
    small = np.random.default_rng(5).integers(0, 256, (30, 40, 3), np.uint8)
    path = tmp_path / "photo.jpg"
    Image.fromarray(small).resize((4000, 3000), Image.Resampling.BICUBIC).save(path)
    return path


def test_a_photo_is_decoded_once_from_upload_to_saved_picture(tmp_path: Path, photo: Path, decoded: list[str]) -> None:
    studio = Studio(Settings(home=tmp_path / "home", device="cpu", safety="off", preview="off"))
    other = tmp_path / "other.png"
    Image.new("RGB", (96, 96), "teal").save(other)
    nano = studio.settings.checkpoint(NANO.name)
    jobs = JobQueue(studio, journal_of(tmp_path / "home"))
    assert examine([photo], nano, 4, studio.pictures).usable == (photo,)
    examine([photo, other], nano, 4, studio.pictures)
    examine([other, photo], nano, 4, studio.pictures)  # moved
    examine([photo], nano, 4, studio.pictures)  # the other one deleted
    job = jobs.submit(Request(prompt="make it blue", references=(photo,), steps=nano.steps, seed=1))
    result = follow(job)[-1]
    assert isinstance(result, Result)
    assert load_original(replace(job.request, references=(photo,)), nano, studio.pictures) is not None
    for prompt in ("make it r", "make it re", "make it red"):  # typed in Live
        drafts = list(studio.draft(Request(prompt=prompt, references=(photo,), seed=1)))
        assert isinstance(drafts[-1], Drafted)
    jobs.close()
    assert decoded == ["photo.jpg", "other.png"]


def test_the_pictures_are_those_of_the_files(photo: Path, decoded: list[str]) -> None:
    pictures = PictureCache()
    expected = load_reference(photo)
    for _ in range(2):
        loaded, fitted = pictures.load(photo), pictures.fitted(photo, 256 * 256)
        assert loaded.image.tobytes() == expected.image.tobytes() and loaded.data == photo.read_bytes()
        assert fitted.image.tobytes() == fit(expected.image, 256 * 256).tobytes()
        assert (fitted.full_size, fitted.sha256, fitted.data) == ((4000, 3000), expected.sha256, loaded.data)
    assert decoded == ["photo.jpg"]


def test_a_file_is_recognised_by_its_content_and_a_changed_one_is_read_anew(tmp_path: Path, decoded: list[str]) -> None:
    path, copy, link = (tmp_path / folder / "a.png" for folder in ("a", "b", "c"))
    for file in (path, copy, link):
        file.parent.mkdir()
    Image.new("RGB", (64, 64), "teal").save(path)
    copy.write_bytes(path.read_bytes())
    os.link(path, link)
    pictures = PictureCache()
    for file in (path, copy, link):
        pictures.load(file)
    assert decoded == ["a.png"]
    Image.new("RGB", (64, 64), "red").save(path)
    assert pictures.load(path).image.getpixel((0, 0)) == (255, 0, 0)
    assert pictures.load(copy).image.getpixel((0, 0)) == (0, 128, 128)
    assert decoded == ["a.png"] * 2


def test_errors_and_notes_call_a_file_by_its_name_and_nothing_is_kept_of_a_file_that_is_gone(tmp_path: Path) -> None:
    pictures = PictureCache()
    first, second = tmp_path / "first.gif", tmp_path / "second.gif"
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("teal", "red")]
    for path in (first, second):
        frames[0].save(path, save_all=True, append_images=frames[1:])
        assert pictures.load(path).notes == (f"{path.name} holds several pictures or frames: the first one is used.",)
    first.unlink()
    with pytest.raises(ReferenceImageError, match=r"There is no picture first\.gif"):
        pictures.load(first)


def test_transparent_parts_have_the_colour_that_was_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "clear.png"
    Image.new("RGBA", (64, 64), (9, 9, 9, 0)).save(path)
    pictures = PictureCache()
    for colour, expected in (("white", (255, 255, 255)), ("black", (0, 0, 0)), ("white", (255, 255, 255))):
        assert pictures.load(path, colour).image.getpixel((0, 0)) == expected


def test_no_more_is_kept_than_there_is_room_for(tmp_path: Path, decoded: list[str]) -> None:
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(files):
        Image.new("RGB", (64, 64), (number, 0, 0)).save(path)
    pictures = PictureCache(max_bytes=2 * (3 * 64 * 64 + 1000))
    for path in files:
        pictures.load(path)
    pictures.load(files[2])
    pictures.load(files[1])
    assert decoded == ["0.png", "1.png", "2.png"]
    pictures.load(files[0])
    assert decoded[3:] == ["0.png"]


def test_a_cached_picture_does_not_wait_while_another_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, slow = tmp_path / "here.png", tmp_path / "slow.png"
    for number, path in enumerate((here, slow)):
        Image.new("RGB", (96, 96), (number, 0, 0)).save(path)
    pictures = PictureCache()
    pictures.load(here)
    pictures.fitted(here, 64 * 64)
    begun, go = threading.Event(), threading.Event()

    def waits(data: bytes, sha256: str, name: str, background: str) -> object:
        begun.set()
        assert go.wait(60)
        return decode_reference(data, sha256, name, background)

    monkeypatch.setattr(picture_cache, "decode_reference", waits)
    with ThreadPoolExecutor(2) as threads:
        decoding = threads.submit(pictures.load, slow)
        assert begun.wait(60)
        try:
            assert threads.submit(pictures.load, here).result(30).sha256
            assert threads.submit(pictures.fitted, here, 64 * 64).result(30).image.size == (64, 64)
            assert not decoding.done()
        finally:
            go.set()
        assert decoding.result(60).image.getpixel((0, 0)) == (1, 0, 0)
