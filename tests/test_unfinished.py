"""The last preview of a run that ended early, kept as a picture: real runs of nano through the queue."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux2_studio.errors import SafetyError, SaveError, StudioError
from flux2_studio.events import FINAL_EVENTS, Event, Failed, Preview, Result, Saved, Stopped, Withheld
from flux2_studio.jobs.queue import MAX_UNFINISHED_RUNS, JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.jobs.unfinished import UnfinishedPictures
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.provenance import metadata
from flux2_studio.provenance.inspect import inspect_picture, setting_rows
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.safety.policy import Verdict
from flux2_studio.settings import Settings
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from flux2_studio.storage.library import OutputLibrary
from flux2_studio.studio import Studio
from flux2_studio.ui.inspect_tab import plan_restoration

NOBODY: Callable[[Saved], str | None] = lambda saved: None  # noqa: E731 - remembers nothing, and is fine with that


class Interrupted(Studio):
    """Ends each run after its second step, as its owner's Stop would, or by an error."""

    error: StudioError | None = None

    def generate(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False, api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        enough = threading.Event()
        for event in super().generate(request, enough.is_set, api_key):
            yield event
            if isinstance(event, Preview) and event.step == 2:
                enough.set()
                if self.error is not None:
                    raise self.error


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path, device="cpu")


@pytest.fixture
def studio(settings: Settings) -> Interrupted:
    return Interrupted(settings)


@pytest.fixture
def history(settings: Settings) -> History:
    return History(Database(settings.database), settings.outputs, settings.trash)


@pytest.fixture
def jobs(studio: Interrupted, history: History) -> Iterator[JobQueue]:
    made = JobQueue(studio, history=history)
    yield made
    made.close()


def ended(jobs: JobQueue, owner: str = "me", **fields: Any) -> tuple[Job, Event]:
    job = jobs.submit(Request(**{"prompt": "a fox", "seed": 3, "width": 64, "height": 64, **fields}), owner)
    *_, (_, end) = job.events()
    assert isinstance(end, FINAL_EVENTS)
    return job, end


def test_a_stopped_run_s_preview_becomes_a_picture(
    jobs: JobQueue, studio: Interrupted, history: History, settings: Settings
) -> None:
    job, end = ended(jobs, width=256, height=256)  # with room for a watermark
    assert isinstance(end, Stopped) and not end.images
    (saved,) = jobs.save_previews(job.id, "me").pictures
    with Image.open(saved.image) as file:
        assert file.size == (256, 256)
    assert saved.image.is_relative_to(settings.outputs)
    found = metadata.read_settings(saved.image.read_bytes()).record
    assert found is not None and found.unfinished == (2, 4) and found.request.prompt == "a fox"
    assert dict(setting_rows(found))["Unfinished"] == "a preview, kept after step 2 of 4"
    (entry,) = history.page("me").entries
    details = history.details("me", entry.id)
    assert details is not None and details.record == found
    assert not history.page("another").entries
    # Signed, marked and honest about it.
    seen = inspect_picture(saved.image, studio.signer, studio.messages)
    assert seen.credentials.own and seen.watermark is not None and seen.watermark.found
    assert seen.findings[0].startswith("This is an unfinished preview, as it was after step 2 of 4")
    assert "these settings make the finished picture" in plan_restoration(found, studio, None).notes[0]
    with pytest.raises(StudioError, match="not there any more"):
        jobs.save_previews(job.id, "me")


def test_only_its_owner_can_keep_it(jobs: JobQueue) -> None:
    job, _ = ended(jobs)
    for owner, id_ in (("another", job.id), ("", job.id), ("me", "nothing")):
        with pytest.raises(StudioError, match="not there any more"):
            jobs.save_previews(id_, owner)
    assert jobs.save_previews(job.id, "me").pictures


def test_a_failed_run_s_previews_can_be_kept_too(jobs: JobQueue, studio: Interrupted) -> None:
    studio.error = StudioError("the power went")
    job, end = ended(jobs, count=2)
    assert isinstance(end, Failed)
    pictures = jobs.save_previews(job.id, "me").pictures
    assert [saved.seed for saved in pictures] == [3, 4]
    assert len({saved.image for saved in pictures}) == 2


def test_an_edit_s_preview_says_what_it_was_made_from(jobs: JobQueue, studio: Interrupted, tmp_path: Path) -> None:
    file = tmp_path / "picture.png"
    Image.new("RGB", (100, 70), "teal").save(file)
    job, _ = ended(jobs, references=(file,), width=None, height=None)
    (saved,) = jobs.save_previews(job.id, "me").pictures
    with Image.open(saved.image) as picture:
        assert picture.size == (100, 70), "without what the engine padded it by"
    seen = inspect_picture(saved.image, studio.signer, studio.messages)
    assert saved.record.references and len(seen.credentials.ingredients) == 1


def test_what_the_safety_check_stops_is_not_kept(settings: Settings) -> None:
    class Prude:
        def load(self) -> None: ...

        def __call__(self, image: Image.Image) -> Verdict:
            return Verdict(allowed=False, reasons=("shows too much",))

    jobs = JobQueue(Interrupted(settings, guard=SafetyGuard("on", classifier=Prude())))
    job, _ = ended(jobs)
    with pytest.raises(SafetyError, match="neither saved nor shown"):
        jobs.save_previews(job.id, "me")
    with pytest.raises(StudioError, match="not there any more"):
        jobs.save_previews(job.id, "me")
    jobs.close()
    assert not list(settings.outputs.rglob("*.png"))


def test_what_could_not_be_saved_can_be_tried_again(settings: Settings) -> None:
    class Full(OutputLibrary):
        full = True

        def save(self, data: bytes, request: Request) -> Path:
            if self.full:
                raise SaveError("no space left")
            return super().save(data, request)

    library = Full(settings.outputs)
    jobs = JobQueue(Interrupted(settings, library=library))
    job, _ = ended(jobs)
    with pytest.raises(SaveError):
        jobs.save_previews(job.id, "me")
    library.full = False
    assert jobs.save_previews(job.id, "me").pictures
    jobs.close()


def test_what_is_kept_in_memory_is_bounded() -> None:
    class Quick:
        """Ends each run after a preview."""

        def resolve(self, request: Request, key: ApiKey | None = None) -> Request:
            return request

        def generate(self, request: Request, cancelled: Callable[[], bool], key: ApiKey | None = None) -> Any:
            yield preview(0, "a")
            yield Stopped()

    jobs = JobQueue(Quick())  # type: ignore[arg-type]
    runs = []
    for _ in range(MAX_UNFINISHED_RUNS + 3):
        runs.append(jobs.submit(Request(prompt="x"), "me"))
        assert list(runs[-1].events())
    jobs.close()  # once the worker has tidied up
    assert [len(job.unfinished) for job in runs] == [0] * 3 + [1] * MAX_UNFINISHED_RUNS


def preview(first: int, *sketches: str) -> Preview:
    return Preview(step=1, steps=4, images=(), first_index=first, count=4, seconds_left=None, unfinished=sketches)


def saved(index: int) -> Saved:
    return Saved(index=index, image=Path("x.png"), seed=1, record=Record(request=Request(prompt="x"), label="x"))


@pytest.mark.parametrize(
    "events, left",
    [
        ([preview(0, "a", "b")], {0: "a", 1: "b"}),
        ([preview(0, "a"), preview(0, "b")], {0: "b"}),
        ([preview(0, "a", "b"), saved(0)], {1: "b"}),
        ([preview(0, "a", "b"), saved(0), Withheld(index=1)], {}),
        ([preview(0, "a", "b"), saved(0), saved(1), preview(2, "c", "d"), Stopped()], {2: "c", 3: "d"}),
        ([preview(0, "a"), Result(request=Request(prompt="x"), images=(), seeds=(), seconds=1.0)], {}),
        ([preview(0)], {}),
    ],
)
def test_only_what_is_not_finished_is_a_draft(events: list[Event], left: dict[int, str]) -> None:
    sketches = UnfinishedPictures()
    for event in events:
        sketches.on_event(event)
    assert len(sketches) == len(left) and sketches.take_all() == left and not len(sketches)


def test_one_that_is_refused_does_not_keep_the_others_back() -> None:
    class Picky:
        def save_preview(self, unfinished: Any) -> tuple[Saved, tuple[str, ...]]:
            if unfinished == "b":
                raise SafetyError("not this one")
            return replace(saved(0), seed=int(unfinished)), ()

    sketches = UnfinishedPictures()
    sketches.on_event(preview(0, "1", "b", "3"))
    kept = sketches.save_all(Picky(), NOBODY)
    assert [picture.seed for picture in kept.pictures] == [1, 3] and kept.notes == ("not this one",)


@pytest.mark.parametrize("value", [[0, 4], [5, 4], [1], "1 of 4", [1, "4"], [True, 4]])
def test_what_a_file_claims_of_being_unfinished_is_checked(value: object, settings: Settings) -> None:
    request = Request(
        prompt="x", negative_prompt="", checkpoint="nano", width=64, height=64, steps=4, guidance=1.0, seed=1
    )
    written = metadata.record_to_dict(Record(request=request, label="Nano", unfinished=(2, 4)))
    assert metadata.record_from_json(json.dumps(written)).unfinished == (2, 4)
    with pytest.raises(StudioError, match="unfinished"):
        metadata.record_from_json(json.dumps({**written, "unfinished": value}))
