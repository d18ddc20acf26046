"""Downloads that break off and go on, are shared, and are checked, against a small hub of our own on 127.0.0.1."""

from __future__ import annotations

import hashlib
import random
import re
import threading
from pathlib import Path

import pytest

from flux2_studio.checkpoints import GB
from flux2_studio.errors import DownloadError
from flux2_studio.models.hub.cache import RemoteFile
from flux2_studio.models.hub.downloads import ActiveDownload, Downloads, DownloadSpeed, format_time_left
from flux2_studio.models.hub.transfer import CHECKING, DOWNLOADING, RETRYING
from tests.models.downloading import (
    ETAG,
    HELD,
    LAST,
    Enough,
    Waiting,
    arrived,
    blobs,
    downloads,
    partial,
    toy,
    until,
)
from tests.models.fake_hub import FLOW, MB, NEWER, TEXT, TOY, VAE, FakeHub, silent


def refused(ours: Downloads) -> str:
    with pytest.raises(DownloadError) as error:
        ours.download(FLOW, silent)
    return str(error.value)


def test_a_connection_that_breaks_is_taken_up_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.breaks = 5
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY and len(fake.sent) == 6
    starts = [int(match[1]) for _, span in fake.sent[1:] if (match := re.match(r"bytes=(\d+)-", span or ""))]
    assert len(starts) == 5 and starts == sorted(set(starts))


def test_a_hub_that_is_busy_is_asked_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.busy = 2
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY
    fake.busy = 3
    fake.repos["maker/Toy-4B"]["toy.safetensors"] = b"other"
    assert "The hub has trouble at the moment (HTTP 503): try again later" in refused(downloads(fake, tmp_path))


def test_a_connection_that_brings_nothing_is_given_up(fake: FakeHub, tmp_path: Path) -> None:
    fake.repos["maker/Toy-4B"]["toy.safetensors"] = b"a"
    fake.breaks = 3  # in the middle of a byte
    message = refused(downloads(fake, tmp_path))
    assert message == (
        f"maker/Toy-4B/toy.safetensors could not be downloaded, because {fake.url} cannot be reached or the connection "
        f"broke: check it and try again, or set TOY_MODEL_PATH to a local copy."
    )
    assert len(fake.sent) == 3


def test_a_hub_that_falls_silent_is_asked_again(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    downloads(fake, tmp_path, patience=1).download(FLOW, silent)
    assert toy(tmp_path) == TOY and len(fake.sent) > 1


def test_a_large_file_is_asked_for_in_stretches(fake: FakeHub, tmp_path: Path) -> None:
    downloads(fake, tmp_path, stretch=MB).download(FLOW, silent)
    assert toy(tmp_path) == TOY
    assert [span for _, span in fake.sent] == [f"bytes={i * MB}-{(i + 1) * MB - 1}" for i in range(3)]


@pytest.mark.parametrize("there", [0, 1, MB, 3 * MB])
def test_what_is_there_is_not_asked_for_again(fake: FakeHub, tmp_path: Path, there: int) -> None:
    partial(tmp_path, TOY[:there])
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY
    spans = {0: [None], 3 * MB: []}.get(there, [f"bytes={there}-{LAST}"])
    assert [span for _, span in fake.sent] == spans


def test_a_hub_without_ranges(fake: FakeHub, tmp_path: Path) -> None:
    fake.ranges = False
    partial(tmp_path, TOY[:MB])
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY
    assert fake.sent == [("toy.safetensors", f"bytes={MB}-{LAST}")]  # which it answered with everything


def test_a_file_that_has_changed_starts_anew(fake: FakeHub, tmp_path: Path) -> None:
    ours = downloads(fake, tmp_path)
    fake.hold_at = HELD
    somebody = Waiting(ours)
    until(lambda: arrived(tmp_path) > MB // 2)
    somebody.give_up.set()
    assert isinstance(somebody.end(), Enough)
    fake.go.set()
    fake.hold_at = None
    until(no_thread_is_left)
    assert arrived(tmp_path) > 0
    new = random.Random(2).randbytes(MB)
    fake.repos["maker/Toy-4B"]["toy.safetensors"] = new
    fake.commits["maker/Toy-4B"] = NEWER
    fake.sent.clear()
    ours.download(FLOW, silent)
    assert (blobs(tmp_path) / hashlib.sha256(new).hexdigest()).read_bytes() == new
    assert fake.sent == [("toy.safetensors", None)]
    assert not partial(tmp_path).exists()  # nobody will ever need it


def no_thread_is_left() -> bool:
    return not any(thread.name == "flux2-download" for thread in threading.enumerate())


# --- only what the hub announced ----------------------------------------------------------------------------------


def test_a_wrong_hash(fake: FakeHub, tmp_path: Path) -> None:
    fake.lies["toy.safetensors"] = bytes(3 * MB)
    assert refused(downloads(fake, tmp_path)) == (
        f"What the hub sends as maker/Toy-4B/toy.safetensors is not what it announced (its size or hash is wrong), so "
        f"it was thrown away: try again; if that does not help, look for a proxy that changes downloads, and at "
        f"{fake.url}/maker/Toy-4B, or set TOY_MODEL_PATH to a local copy."
    )
    assert list(blobs(tmp_path).iterdir()) == []
    fake.lies.clear()
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY


def test_a_small_file_with_a_wrong_hash(fake: FakeHub, tmp_path: Path) -> None:
    fake.lies["tokenizer/tokenizer_config.json"] = b"[ ]"
    with pytest.raises(DownloadError, match=r"tokenizer/tokenizer_config\.json is not what it announced"):
        downloads(fake, tmp_path).download(TEXT, silent)


@pytest.mark.parametrize("content", [TOY[:-1], TOY + b"x"], ids=["short", "long"])
def test_a_wrong_size(fake: FakeHub, tmp_path: Path, content: bytes) -> None:
    fake.lies["toy.safetensors"] = content
    assert "is not what it announced" in refused(downloads(fake, tmp_path))
    assert list(blobs(tmp_path).iterdir()) == []


@pytest.mark.parametrize("there", [bytes(MB), bytes(3 * MB), bytes(4 * MB)], ids=["part", "all", "more"])
def test_damage_in_what_was_there_is_found(fake: FakeHub, tmp_path: Path, there: bytes) -> None:
    partial(tmp_path, there)
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY
    assert fake.sent[-1] == ("toy.safetensors", None)  # from the start


def test_a_blob_of_a_wrong_size_is_replaced(fake: FakeHub, tmp_path: Path) -> None:
    blobs(tmp_path).mkdir(parents=True)
    (blobs(tmp_path) / ETAG).write_bytes(TOY[:10])
    downloads(fake, tmp_path).download(FLOW, silent)
    assert toy(tmp_path) == TOY


def test_a_listing_that_points_out_of_the_cache(fake: FakeHub, tmp_path: Path) -> None:
    for name in ("../../../outside", f"{tmp_path}/outside", "a\\..\\outside"):
        fake.repos["maker/Toy-4B"][f"{name}.safetensors"] = b"vae"  # contents that are in the cache
    ours = downloads(fake, tmp_path)
    ours.download(VAE, silent)
    fake.commits["maker/Toy-4B"] = NEWER  # what is there already gets its names at the new commit
    ours.download(TEXT, silent)
    assert (blobs(tmp_path).parent / "snapshots" / NEWER / VAE.path).read_bytes() == b"vae"
    assert not list(tmp_path.rglob("*outside*"))
    fake.commits["maker/Toy-4B"] = "../../../outside"
    with pytest.raises(DownloadError, match="is not what it announced"):
        ours.download(FLOW, silent)


# --- several who want the same ------------------------------------------------------------------------------------


def test_two_share_one_download_and_one_may_leave(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    ours = downloads(fake, tmp_path)
    one, other = Waiting(ours), Waiting(ours)
    until(lambda: one.sees("2.0 of 3.0 MB") and other.sees("2.0 of 3.0 MB"))
    one.give_up.set()
    assert isinstance(one.end(), Enough)
    assert ours.progress_of(FLOW)
    fake.go.set()
    assert other.end() is None
    assert toy(tmp_path) == TOY and len(fake.sent) == 1
    assert other.told[0] == ("Downloading Toy-4B", None)
    assert other.told[-1] == ("Downloading Toy-4B: 3.0 of 3.0 MB", 1.0)
    assert not ours.progress_of(FLOW)


def test_the_last_to_leave_pauses_it(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    ours = downloads(fake, tmp_path)
    both = Waiting(ours), Waiting(ours)
    until(lambda: arrived(tmp_path) == HELD and all(one.told for one in both))
    for one in both:
        one.give_up.set()
        assert isinstance(one.end(), Enough)
    assert not ours.progress_of(FLOW)
    fake.go.set()
    until(no_thread_is_left)
    there = arrived(tmp_path)
    assert HELD <= there < 3 * MB
    fake.hold_at = None
    ours.download(FLOW, silent)
    assert toy(tmp_path) == TOY
    assert fake.sent == [("toy.safetensors", None), ("toy.safetensors", f"bytes={there}-{LAST}")]


def test_a_refusal_reaches_everyone_who_waits(fake: FakeHub, tmp_path: Path) -> None:
    fake.hold_at = HELD
    fake.lies["toy.safetensors"] = bytes(3 * MB)
    ours = downloads(fake, tmp_path)
    both = Waiting(ours), Waiting(ours)
    until(lambda: all(one.sees("2.0 of 3.0 MB") for one in both))
    fake.hold_at = None
    fake.go.set()
    errors = [one.end() for one in both]
    assert all(isinstance(error, DownloadError) and "not what it announced" in str(error) for error in errors)
    assert errors[0] is not errors[1]


@pytest.mark.parametrize("error", [Enough, KeyboardInterrupt])
def test_what_the_first_word_raises_starts_nothing(fake: FakeHub, tmp_path: Path, error: type[BaseException]) -> None:
    def interrupt(text: str, fraction: float | None) -> None:
        raise error

    ours = downloads(fake, tmp_path)
    with pytest.raises(error):
        ours.download(VAE, interrupt)
    assert fake.asked == [] and not ours.progress_of(VAE)


# --- how it is told -----------------------------------------------------------------------------------------------


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_speed_is_the_mean_of_the_last_ten_seconds() -> None:
    clock = Clock()
    speed = DownloadSpeed(clock)
    speed.add(10 * MB)
    assert speed.bytes_per_second() is None  # too early to tell
    for _ in range(40):
        clock.now += 0.5
        speed.add(MB)
    assert speed.bytes_per_second() == pytest.approx(2 * MB)
    for _ in range(40):
        clock.now += 0.5
        speed.add(4 * MB)
    assert speed.bytes_per_second() == pytest.approx(8 * MB)
    clock.now += 60
    assert speed.bytes_per_second() == 0


def test_what_is_told() -> None:
    clock = Clock()
    running = ActiveDownload("Toy-4B", clock)
    file = RemoteFile(repo="a/b", commit="c", name="d", size=10 * GB, etag="e", digest="sha256", git_id="f")
    assert running.progress().status == ("Downloading Toy-4B", None) and running.remaining_bytes == 0
    running.set_files({file: 2 * GB})
    assert running.progress().status == ("Downloading Toy-4B: 2.0 of 10.0 GB", 0.2)
    running.update(file, CHECKING, GB)
    assert running.progress().status == ("Checking what is here of Toy-4B: 1.0 of 2.0 GB", 0.5)
    for second in range(1, 21):
        clock.now += 1
        running.update(file, DOWNLOADING, 2 * GB + second * 100 * MB)
    assert running.progress().status == ("Downloading Toy-4B: 4.0 of 10.0 GB, 100.0 MB/s, 1 min left", 0.4)
    assert running.remaining_bytes == 6 * GB
    running.update(file, RETRYING, 4 * GB)
    assert running.progress().status == ("The connection broke: trying again to download Toy-4B: 4.0 of 10.0 GB", 0.4)


def test_durations() -> None:
    assert [format_time_left(seconds) for seconds in (4.4, 59.4, 61, 3599, 7500)] == [
        "4 s",
        "59 s",
        "1 min",
        "1 h 0 min",
        "2 h 5 min",
    ]
