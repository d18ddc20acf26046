"""The journal: what it keeps of a run, and what the next studio makes of what a killed one left."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flux2_studio.checkpoints import NANO
from flux2_studio.errors import SaveError
from flux2_studio.events import Failed, Preview, PromptEnhanced, Result, Saved, Status, Stopped, Withheld
from flux2_studio.jobs import journal as journals
from flux2_studio.jobs.journal import INTERRUPTED_MESSAGE, KEY_LOST, Journal
from flux2_studio.record import Record
from flux2_studio.request import Request, Upsampling
from flux2_studio.storage.database import Database

Open = Callable[[], Journal]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Open]:
    """Opens a journal, as a studio does; those that are left open at the end are closed."""
    made: list[Journal] = []

    def opened() -> Journal:
        made.append(Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue"))
        return made[-1]

    yield opened
    for journal in made:
        journal.close()


def request(**changes: object) -> Request:
    given: dict[str, object] = {"prompt": "a fox", "seed": 5, "count": 4, **changes}
    return Request(**given).resolve(NANO)  # type: ignore[arg-type]


def saved(tmp_path: Path, index: int, seed: int) -> Saved:
    file = tmp_path / f"{seed}.png"
    file.write_bytes(b"picture")
    return Saved(index=index, image=file, seed=seed, record=Record(request=Request(prompt="a fox"), label="Nano"))


def test_a_run_that_ended_is_told_as_it_was(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    asked = request(count=2)
    journal.add("one", "me", asked)
    journal.start("one")
    pictures = [saved(tmp_path, index, 5 + index) for index in range(2)]
    enhanced = PromptEnhanced(original="a fox", prompt="A red fox.", by="somebody")
    for event in (Status(text="x"), enhanced, *pictures):
        journal.record_event("one", event)
    drawn = request(count=2, prompt="A red fox.")
    end = Result(
        request=drawn,
        images=tuple(it.image for it in pictures),
        seeds=(5, 6),
        seconds=2.5,
        provenance=("It is signed.",),
    )
    journal.record_event("one", end)
    entry = journal.latest_unseen("me")
    assert entry is not None and entry.state == "done" and entry.request == asked
    assert entry.final_events() == (enhanced, end)
    assert journal.latest_unseen("somebody else") is None and journal.entry("one", "somebody else") is None
    journal.mark_seen("one")
    assert journal.latest_unseen("me") is None


def test_deleted_pictures_are_not_told_of(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    journal.add("one", "me", request(count=1))
    picture = saved(tmp_path, 0, 5)
    journal.record_event("one", picture)
    journal.record_event("one", Result(request=request(count=1), images=(picture.image,), seeds=(5,), seconds=1.0))
    picture.image.unlink()
    entry = journal.entry("one", "me")
    assert entry is not None and entry.final_events() == ()


def test_a_failure_is_told_with_the_pictures_before_it(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    journal.add("one", "me", request())
    picture = saved(tmp_path, 0, 5)
    journal.record_event("one", picture)
    journal.record_event("one", Failed(message="The disk is full."))
    entry = journal.latest_unseen("me")
    assert entry is not None
    assert entry.final_events() == (Stopped(images=(picture.image,), seeds=(5,)), Failed(message="The disk is full."))


def test_what_its_owner_stopped_is_no_news(opened: Open) -> None:
    journal = opened()
    journal.add("one", "me", request())
    journal.record_event("one", Stopped())
    assert journal.latest_unseen("me") is None


def test_only_the_next_studio_takes_over_and_only_from_one_that_is_gone(opened: Open) -> None:
    first = opened()
    for name in ("runs", "second", "third"):
        first.add(name, "me", request(prompt=name))
    first.start("runs")
    first.reorder(["third", "second"])
    beside = opened()
    assert beside.take_over_orphaned() == (), "the first one lives"
    first.close()
    assert [entry.id for entry in beside.take_over_orphaned()] == ["third", "second"]
    (cut,) = beside.interrupted("me")
    assert (cut.id, cut.message) == ("runs", INTERRUPTED_MESSAGE)
    late = opened()
    assert late.take_over_orphaned() == (), "now they are another's"


def test_the_rest_of_an_interrupted_run(opened: Open, tmp_path: Path) -> None:
    first = opened()
    first.add("one", "me", request(upsampling=Upsampling(by="openrouter", model="x/y")), keyed=True)
    first.start("one")
    first.record_event("one", PromptEnhanced(original="a fox", prompt="A red fox.", by="x/y"))
    first.record_event("one", saved(tmp_path, 0, 5))
    first.record_event("one", Withheld(index=1))
    first.close()
    second = opened()
    second.take_over_orphaned()
    (entry,) = second.interrupted("me")
    assert not entry.needs_key, "its prompt has been enhanced"
    assert entry.pictures == (tmp_path / "5.png",) and entry.message == INTERRUPTED_MESSAGE
    assert entry.remaining_request() == request(prompt="A red fox.", seed=7, count=2)


def test_a_run_that_was_killed_after_its_last_picture_is_done(opened: Open, tmp_path: Path) -> None:
    first = opened()
    first.add("one", "me", request(count=1))
    first.start("one")
    first.record_event("one", saved(tmp_path, 0, 5))
    first.close()
    second = opened()
    second.take_over_orphaned()
    entry = second.latest_unseen("me")
    assert second.interrupted("me") == () and entry is not None
    (end,) = entry.final_events()
    assert isinstance(end, Result) and end.images == (tmp_path / "5.png",) and end.seconds >= 0


def test_what_waited_with_a_key_cannot_go_on(opened: Open, tmp_path: Path) -> None:
    first = opened()
    first.add("one", "me", request(upsampling=Upsampling(by="openrouter", model="x/y")), keyed=True)
    first.close()
    second = opened()
    assert second.take_over_orphaned() == ()
    (entry,) = second.interrupted("me")
    assert entry.message == KEY_LOST and entry.needs_key
    assert entry.remaining_request() == request()


def test_references_stay_until_the_run_is_over(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    upload = tmp_path / "uploads" / "photo.jpg"
    upload.parent.mkdir()
    upload.write_bytes(b"a photo")
    kept = journal.add("one", "me", request(references=(upload,)))
    (copy,) = kept.references
    assert copy.name == "photo.jpg" and copy != upload
    upload.unlink()
    assert copy.read_bytes() == b"a photo"
    entry = journal.entry("one", "me")
    assert entry is not None and entry.request == kept
    journal.record_event("one", Stopped())
    assert not copy.exists()


def test_references_that_cannot_be_kept_are_told(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    with pytest.raises(SaveError, match="where runs wait"):
        journal.add("one", "me", request(references=(tmp_path / "gone.png",)))
    assert journal.entry("one", "me") is None and not (tmp_path / "queue" / "one").exists()


def test_passing_events_are_not_written(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    journal.add("one", "me", request())
    with sqlite3.connect(tmp_path / "studio.sqlite3") as reader:
        before = reader.execute("PRAGMA data_version").fetchone()
        journal.record_event("one", Preview(step=1, steps=4, images=(), first_index=0, count=1, seconds_left=None))
        assert reader.execute("PRAGMA data_version").fetchone() == before
        journal.record_event("one", Withheld(index=0))
        assert reader.execute("PRAGMA data_version").fetchone() != before


def test_old_runs_are_forgotten_but_none_that_is_still_to_be_done(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    journal.add("waits", "me", request())
    database = Database(tmp_path / "studio.sqlite3")
    with database.transaction() as connection:
        template = dict(connection.execute("SELECT * FROM runs").fetchone())
        for number in range(journals.MAX_FINISHED_RUNS + 5):
            row = template | {"id": f"old {number}", "state": "done", "ended": float(number)}
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO runs ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))
    journal.add("new", "me", request())
    journal.record_event("new", Stopped())
    assert journal.entry("old 5", "me") is None and journal.entry("old 6", "me") is not None
    assert journal.entry("waits", "me") is not None and journal.entry("new", "me") is not None


def test_runs_of_another_version_are_left_out(opened: Open, tmp_path: Path) -> None:
    journal = opened()
    journal.add("one", "me", request())
    with Database(tmp_path / "studio.sqlite3").transaction() as connection:
        fields = json.dumps({"prompt": "a fox", "hologram": True})
        connection.execute("UPDATE runs SET request = ?, state = 'interrupted'", (fields,))
    assert journal.interrupted("me") == ()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "queue").write_text("a file")
    with pytest.raises(SaveError, match="where runs wait"):
        Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue")
