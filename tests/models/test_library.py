"""Checkpoints downloaded, paused, resumed and deleted as the Models tab does it, against a small hub on 127.0.0.1."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flux2_studio.checkpoints import NANO, Part
from flux2_studio.errors import RequestError, WeightsError
from flux2_studio.models.hub.library import DOWNLOAD_DEFECT_MESSAGE, CheckpointLibrary, CheckpointStatus, SharedPart
from flux2_studio.models.hub.repositories import Hub
from tests.models.fake_hub import CHECKPOINT, FLOW, MB, OTHER, TOY, FakeHub, settings, silent
from tests.models.shelves import HELD, LAST, NAME, PATIENCE, reaches, shelf, until, weights


def is_quiet() -> bool:
    return not any(thread.name.startswith(("flux2-shelf", "flux2-download")) for thread in threading.enumerate())


@contextmanager
def held(fake: FakeHub, ours: CheckpointLibrary) -> Iterator[CheckpointStatus]:
    """A download that has come as far as HELD, and goes no further in here."""
    fake.hold_at = HELD
    ours.download(NAME)
    until(lambda: ours.get_status(NAME).bytes_on_disk > HELD)
    yield ours.get_status(NAME)
    fake.hold_at = None
    fake.go.set()


# --- what is here -------------------------------------------------------------------------------------------------


def test_nothing_is_here_and_the_network_is_not_asked(fake: FakeHub, tmp_path: Path) -> None:
    ours, _ = shelf(fake, tmp_path)
    nano, klein, other = ours.list_statuses()
    assert [entry.checkpoint.name for entry in (nano, klein, other)] == ["nano", NAME, "other"]
    assert (klein.state, klein.bytes_on_disk, klein.removable_bytes, klein.fraction) == ("absent", 0, 0, 0.0)
    assert (
        klein.total_bytes == klein.remaining_bytes == 3 * MB + 30 + 3 + 14
    )  # by the table, the previews' decoder included
    assert klein.shared == (
        SharedPart(kind="text encoder", others=(OTHER,)),
        SharedPart(kind="autoencoder", others=(OTHER,)),
    )
    assert klein.licence_urls == () and other.licence_urls == (f"{fake.url}/maker/Gated",)
    assert fake.asked == []


def test_what_ships_with_the_studio_is_on_board(fake: FakeHub, tmp_path: Path) -> None:
    known = replace(settings(tmp_path), assets=Path(__file__).resolve().parents[2] / "assets")
    ours = CheckpointLibrary(known, Hub(known, endpoint=fake.url, cache=tmp_path / "cache"))
    nano = ours.get_status("nano")
    assert (nano.state, nano.is_bundled, nano.is_local_file, nano.remaining_bytes, nano.removable_bytes) == (
        "complete",
        True,
        False,
        0,
        0,
    )
    assert nano.fraction == 1.0 and nano.total_bytes > MB


def test_a_local_copy_that_is_not_there(fake: FakeHub, tmp_path: Path) -> None:
    ours, _ = shelf(fake, tmp_path, TOY_MODEL_PATH=tmp_path / "gone.safetensors")
    entry = ours.get_status(NAME)
    assert entry.state == "failed" and "TOY_MODEL_PATH points to" in entry.failure


def test_an_unknown_name(fake: FakeHub, tmp_path: Path) -> None:
    ours, _ = shelf(fake, tmp_path)
    for ask in (ours.get_status, ours.download, ours.remove):
        with pytest.raises(RequestError, match="There is no checkpoint called 'x'"):
            ask("x")


# --- downloading --------------------------------------------------------------------------------------------------


def test_a_download_tells_bytes_speed_and_time_left(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    with held(fake, ours) as entry:
        assert entry.state == "downloading" and entry.activity == "Downloading Toy-4B" and not entry.fetching_kinds
        assert HELD < entry.bytes_on_disk < HELD + 1000  # the text encoder came before
        assert entry.bytes_on_disk + entry.remaining_bytes == pytest.approx(3 * MB, rel=1e-3)
        assert entry.fraction == pytest.approx(2 / 3, rel=1e-3)
        until(lambda: ours.get_status(NAME).bytes_per_second)
        entry = ours.get_status(NAME)
        assert (
            entry.bytes_per_second and 0 < entry.bytes_per_second < HELD * 2
        )  # in more than a second, or it would not be told
        assert entry.seconds_left == pytest.approx(entry.remaining_bytes / entry.bytes_per_second)
        other = ours.get_status("other")
        assert (other.state, other.bytes_per_second, other.activity) == ("absent", None, "")
    entry = reaches(ours, "complete")
    assert weights(tmp_path) == TOY and all(hub.is_on_disk(part) for part in CHECKPOINT.parts)
    until(is_quiet)
    entry = ours.get_status(NAME)
    assert (entry.remaining_bytes, entry.failure, entry.activity, entry.bytes_per_second) == (0, "", "", None)
    assert entry.bytes_on_disk == entry.total_bytes == entry.removable_bytes and entry.fraction == 1.0
    assert hub.is_on_disk(CHECKPOINT.tiny_autoencoder)


def test_previews_that_are_off_are_not_downloaded_for(fake: FakeHub, tmp_path: Path) -> None:
    known = replace(settings(tmp_path), checkpoints=(NANO, CHECKPOINT), preview="off")
    hub = Hub(known, endpoint=fake.url, cache=tmp_path / "cache", free_space=lambda _: 10**12)
    ours = CheckpointLibrary(known, hub)
    assert ours.get_status(NAME).total_bytes == 3 * MB + 30 + 3
    ours.download(NAME)
    reaches(ours, "complete")
    until(is_quiet)
    assert not hub.is_on_disk(CHECKPOINT.tiny_autoencoder)


def test_pause_and_resume(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    with held(fake, ours):
        ours.pause(NAME)
        ours.pause(NAME)  # somebody else's click
        assert ours.get_status(NAME).state == "paused"
        until(lambda: hub.download_progress(FLOW) is None)
    until(is_quiet)
    entry, there = ours.get_status(NAME), hub.size_on_disk(FLOW)
    assert entry.state == "paused" and not entry.activity and not entry.failure
    assert HELD <= there < 3 * MB and there < entry.bytes_on_disk and entry.fraction < 1.0
    fake.sent.clear()
    ours.download(NAME)
    reaches(ours, "complete")
    assert weights(tmp_path) == TOY
    assert ("toy.safetensors", f"bytes={there}-{LAST}") in fake.sent
    ours.pause(NAME)
    assert ours.get_status(NAME).state == "complete"


def test_resumed_before_the_pause_has_taken_effect(fake: FakeHub, tmp_path: Path) -> None:
    ours, _ = shelf(fake, tmp_path)
    with held(fake, ours):
        for _ in range(3):
            ours.pause(NAME)
            ours.download(NAME)
        assert ours.get_status(NAME).state == "downloading"
    reaches(ours, "complete")
    assert weights(tmp_path) == TOY and ours.get_status(NAME).failure == ""


def test_several_users_and_a_run_share_one_download(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    with held(fake, ours):
        users = [threading.Thread(target=ours.download, args=(NAME,)) for _ in range(8)]
        found: list[Path] = []
        run = threading.Thread(target=lambda: found.append(hub.find_or_download(FLOW, silent).weights))
        for thread in (*users, run):
            thread.start()
        for thread in users:
            thread.join(PATIENCE)
    run.join(PATIENCE)
    assert found and found[0].read_bytes() == TOY
    reaches(ours, "complete")
    assert [name for name, _ in fake.sent].count("toy.safetensors") == 1


def test_pausing_does_not_take_it_from_a_run(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    heard = threading.Event()
    with held(fake, ours):
        run = threading.Thread(target=hub.find_or_download, args=(FLOW, lambda *_: heard.set()))
        run.start()
        assert heard.wait(PATIENCE)
        ours.pause(NAME)
        until(lambda: ours.get_status(NAME).fetching_kinds)
        entry = ours.get_status(NAME)
        assert (entry.state, entry.fetching_kinds) == ("paused", ("transformer",))
    run.join(PATIENCE)
    assert weights(tmp_path) == TOY
    assert [name for name, _ in fake.sent].count("toy.safetensors") == 1


# --- what goes wrong ----------------------------------------------------------------------------------------------


def test_a_full_disk(fake: FakeHub, tmp_path: Path) -> None:
    ours, _ = shelf(fake, tmp_path, free=100 * MB)
    ours.download(NAME)
    entry = reaches(ours, "failed")
    assert entry.failure.startswith("There is no room for FLUX.2 klein 4B in ") and "HF_HOME" in entry.failure
    assert ours.free_space() == (str(tmp_path / "cache"), 100 * MB)
    assert fake.sent == []


def test_a_gate(fake: FakeHub, tmp_path: Path) -> None:
    fake.refusals["maker/Gated"] = (403, "GatedRepo", "not in the authorized list")
    ours, _ = shelf(fake, tmp_path)
    ours.download("other")
    entry = reaches(ours, "failed", "other")
    assert f"accept its licence at {fake.url}/maker/Gated" in entry.failure
    assert fake.sent == [] and entry.bytes_on_disk == 0  # it is asked before the text encoder comes
    fake.refusals.clear()
    ours.download("other")  # once it was accepted
    entry = reaches(ours, "complete", "other")
    assert entry.failure == ""


def test_a_defect_of_ours_is_logged_and_told(fake: FakeHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Hub):
        def download(self, *_: object) -> None:
            raise ZeroDivisionError

    known = replace(settings(tmp_path), checkpoints=(CHECKPOINT,), default_checkpoint=NAME)
    ours = CheckpointLibrary(known, Broken(known, endpoint=fake.url, cache=tmp_path / "cache"))
    ours.download(NAME)
    assert reaches(ours, "failed").failure == DOWNLOAD_DEFECT_MESSAGE
    assert "ZeroDivisionError" in caplog.text


# --- deleting -----------------------------------------------------------------------------------------------------


def complete(ours: CheckpointLibrary, *names: str) -> None:
    for name in names:
        ours.download(name)
    for name in names:
        reaches(ours, "complete", name)
    until(is_quiet)


def test_delete_keeps_what_others_need(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    complete(ours, NAME, "other")
    assert ours.get_status(NAME).removable_bytes == 3 * MB
    assert ours.remove(NAME) == (
        "3.0 MB freed. The text encoder, the autoencoder and the small decoder of the previews stay, for Other."
    )
    entry = ours.get_status(NAME)
    assert (entry.state, entry.remaining_bytes, entry.removable_bytes) == ("absent", 3 * MB, 0)
    assert ours.get_status("other").state == "complete"
    assert not hub.is_on_disk(FLOW) and hub.is_on_disk(CHECKPOINT.text)
    assert (
        ours.get_status("other").removable_bytes == ours.get_status("other").bytes_on_disk
    )  # nobody else needs any of it now
    assert "freed" in ours.remove("other")
    assert [entry.bytes_on_disk for entry in ours.list_statuses()] == [0, 0, 0]
    assert list((tmp_path / "cache").glob("models--*")) == []
    assert ours.remove("other") == "There is nothing to delete of Other alone."


def test_delete_takes_nothing_from_a_download_that_was_asked_for(fake: FakeHub, tmp_path: Path) -> None:
    ours, hub = shelf(fake, tmp_path)
    complete(ours, "other")
    with held(fake, ours):  # the text encoder is here already, and needed as soon as the rest has come
        assert ours.get_status("other").removable_bytes == len(b"precious")
        assert "The text encoder, the autoencoder and the small decoder of the previews stay" in ours.remove("other")
        with pytest.raises(WeightsError, match=r"FLUX\.2 klein 4B is being downloaded: pause that first"):
            ours.remove(NAME)
        ours.pause(NAME)
        until(lambda: hub.download_progress(FLOW) is None)
    until(is_quiet)
    assert ours.get_status(NAME).state == "paused" and hub.is_on_disk(CHECKPOINT.text)
    complete(ours, "other")
    assert "stay, for FLUX.2 klein 4B." in ours.remove("other")  # a paused one still wants it
    assert "freed" in ours.remove(NAME)
    assert [entry.state for entry in ours.list_statuses()[1:]] == ["absent", "absent"]
    assert list((tmp_path / "cache").glob("models--*")) == []


def test_a_users_own_file_stays(fake: FakeHub, tmp_path: Path) -> None:
    file = tmp_path / "mine.safetensors"
    file.write_bytes(b"mine")
    own = replace(
        CHECKPOINT, name="mine", label="mine", flow=Part(kind="flow", repo=None, path=str(file), size=4), licence="?"
    )
    ours, _ = shelf(fake, tmp_path, CHECKPOINT, own)
    entry = ours.get_status("mine")
    assert (
        entry.is_local_file
        and not entry.is_bundled
        and entry.state == "absent"
        and entry.total_bytes - entry.remaining_bytes == 4
    )
    complete(ours, "mine")
    assert ours.get_status("mine").removable_bytes == ours.get_status("mine").bytes_on_disk > 0
    assert "freed" in ours.remove("mine")
    assert file.read_bytes() == b"mine"
    file.unlink()
    assert "put it back" in ours.get_status("mine").failure
