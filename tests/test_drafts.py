"""Drafts: pictures for a look. By nano through the studio, and in the queue with a scripted one."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.errors import RequestError, SafetyError, StudioError
from flux2_studio.events import FINAL_EVENTS, Drafted, Event, Preview, Queued, Result, Stopped
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.jobs.journal import Journal
from flux2_studio.jobs.queue import MAX_FINISHED_JOBS, MAX_WAITING_RUNS, JobQueue
from flux2_studio.jobs.tasks import Task
from flux2_studio.request import Request, Upsampling
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.safety.policy import Verdict
from flux2_studio.settings import Settings
from flux2_studio.storage.database import Database
from flux2_studio.studio import DRAFT_PREVIEW_SECONDS, Studio
from tests.scripted_studio import PATIENCE, Gate, ScriptedStudio, endless, four_steps


class Flags:
    """A classifier that flags what is mostly red."""

    def load(self) -> None:
        pass

    def __call__(self, image: Image.Image) -> Verdict:
        red, green, blue = np.asarray(image.convert("RGB")).reshape(-1, 3).mean(0)
        return Verdict(allowed=not (red > green + 60 and red > blue + 60), reasons=("is red",))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def nano(home: Path) -> Studio:
    return Studio(Settings(home=home, device="cpu"), reference_store=ReferenceStore(home / "references"))


def end(events: Iterator[Event]) -> Event:
    *_, last = events
    return last


def ended(task: Task) -> Event:
    return end(event for _, event in task.events(timeout=PATIENCE))


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()] if folder.exists() else []


def test_a_draft_is_the_picture_that_would_be_saved_and_nothing_is_kept(nano: Studio, home: Path) -> None:
    request = Request(prompt="a flat red apple on a yellow background", seed=3, count=4)
    draft = end(nano.draft(request))
    assert isinstance(draft, Drafted) and draft.seconds > 0
    assert draft.request.count == 1 and draft.request.seed == 3
    assert not files(home / "outputs")
    result = end(nano.generate(request))
    assert isinstance(result, Result)
    batch = np.asarray(Image.open(result.images[0]).convert("RGB")).astype(int)
    assert abs(np.asarray(draft.image).astype(int) - batch).max() <= 1  # as a picture of a batch and by itself


def test_a_drafted_edit_keeps_neither_reference_nor_result(nano: Studio, tmp_path: Path) -> None:
    reference = tmp_path / "odd.png"
    Image.new("RGB", (157, 111), "navy").save(reference)
    home = nano.settings.home
    before = files(home / "outputs") + files(home / "references")
    draft = end(nano.draft(Request(prompt="make it green", references=(reference,), seed=1)))
    assert isinstance(draft, Drafted)
    assert draft.image.size == (157, 111)
    assert files(home / "outputs") + files(home / "references") == before


def test_the_prompt_is_drawn_as_it_is(nano: Studio) -> None:
    nobody = Upsampling(by="openrouter", model="nobody/there")
    draft = end(nano.draft(Request(prompt="a frog", seed=1, upsampling=nobody)))
    assert isinstance(draft, Drafted) and draft.request.prompt == "a frog"


@pytest.mark.parametrize(
    ("tick", "shown"), [(0.0, []), (DRAFT_PREVIEW_SECONDS / 2.5, [3]), (2 * DRAFT_PREVIEW_SECONDS, [1, 2, 3, 4])]
)
def test_a_draft_shows_previews_only_when_time_has_passed(home: Path, tick: float, shown: list[int]) -> None:
    """tick: seconds between two looks at the clock."""
    times = count()
    studio = Studio(Settings(home=home, device="cpu"), clock=lambda: next(times) * tick)
    previews = [event for event in studio.draft(Request(prompt="a frog", seed=1)) if isinstance(event, Preview)]
    assert [event.step for event in previews] == [1, 2, 3, 4]
    assert [event.step for event in previews if event.images] == shown


def test_a_draft_stops_at_the_next_step(nano: Studio) -> None:
    wanted = [True]
    events = []
    for event in nano.draft(Request(prompt="a frog", seed=1), lambda: not wanted[0]):
        events.append(event)
        wanted[0] = not isinstance(event, Preview)
    assert [event.step for event in events if isinstance(event, Preview)] == [1]
    assert events[-1] == Stopped()


def test_mistakes_are_told(nano: Studio) -> None:
    with pytest.raises(RequestError, match="steps"):
        end(nano.draft(Request(prompt="a frog", steps=20)))


def test_what_is_flagged_is_not_shown(home: Path) -> None:
    studio = Studio(Settings(home=home, device="cpu"), guard=SafetyGuard("on", classifier=Flags()))
    assert isinstance(end(studio.draft(Request(prompt="a flat frog on a blue background", seed=1))), Drafted)
    with pytest.raises(SafetyError, match="red"):
        end(studio.draft(Request(prompt="a flat red apple on a red background", seed=3)))


# --- in the queue -----------------------------------------------------------------------------------------------


def test_the_newest_of_an_owner_takes_the_place_of_their_others() -> None:
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, slow=endless, quick=four_steps))
    try:
        held = jobs.submit(Request(prompt="gate"), "somebody")
        first = jobs.draft(Request(prompt="slow", checkpoint="nano"), "me")
        other = jobs.draft(Request(prompt="quick", checkpoint="nano"), "you")
        second = jobs.draft(Request(prompt="quick", checkpoint="nano"), "me")
        assert ended(first) == Stopped() and not first.started
        gate.go.set()
        assert isinstance(ended(held), Result)
        assert isinstance(ended(other), FINAL_EVENTS) and not other.cancelled
        ended(second)
        assert not second.cancelled
        running = jobs.draft(Request(prompt="slow", checkpoint="nano"), "me")
        for _, event in running.events(timeout=PATIENCE):
            if isinstance(event, Preview):  # it is under way: the next one ends it between two steps
                jobs.draft(Request(prompt="quick", checkpoint="nano"), "me")
                break
        assert isinstance(ended(running), Stopped)
    finally:
        jobs.close()


def test_a_draft_that_makes_room_is_no_place_in_the_line() -> None:
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, quick=four_steps))
    try:
        replaced = jobs.draft(Request(prompt="gate", checkpoint="nano"), "me")
        assert gate.begun.wait(PATIENCE)
        newest = jobs.draft(Request(prompt="quick", checkpoint="nano"), "me")
        assert replaced.cancelled and newest.latest_event() is None, "it is next, as far as anybody can tell"
        other = jobs.draft(Request(prompt="quick", checkpoint="nano"), "you")
        assert other.latest_event() == Queued(runs_ahead=1)
        gate.go.set()
        assert isinstance(ended(newest), FINAL_EVENTS)
    finally:
        gate.go.set()
        jobs.close()


def test_a_run_goes_before_its_owners_draft() -> None:
    jobs = JobQueue(ScriptedStudio(slow=endless, quick=four_steps))
    try:
        draft = jobs.draft(Request(prompt="slow", checkpoint="nano"), "me")
        other = jobs.draft(Request(prompt="slow", checkpoint="nano"), "you")
        run = jobs.submit(Request(prompt="quick"), "me")
        assert isinstance(ended(draft), Stopped)
        assert not other.cancelled
        other.cancel()
        assert isinstance(ended(run), Result)
    finally:
        jobs.close()


def test_drafts_are_no_runs(tmp_path: Path) -> None:
    journal = Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue")
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, quick=four_steps), journal)
    try:
        held = jobs.submit(Request(prompt="gate"), "me")
        draft = jobs.draft(Request(prompt="quick", checkpoint="nano"), "me")
        assert [standing.job for standing in jobs.queue_positions("me")] == [held]
        assert journal.entry(draft.id, "me") is None
        gate.go.set()
        ended(held)
        ended(draft)
        for _ in range(MAX_FINISHED_JOBS + 1):
            ended(jobs.draft(Request(prompt="quick", checkpoint="nano"), "me"))
        assert jobs.get(held.id, "me") is held, "however much is typed, what was run can be asked for"
        assert jobs.latest_unseen("me") is not None
    finally:
        jobs.close()


def test_there_is_an_end_to_drafts_too() -> None:
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, quick=four_steps))
    try:
        jobs.submit(Request(prompt="gate"), "somebody")
        assert gate.begun.wait(PATIENCE)
        for number in range(MAX_WAITING_RUNS):
            jobs.draft(Request(prompt="quick", checkpoint="nano"), f"visitor {number}")
        with pytest.raises(StudioError, match="try again"):
            jobs.draft(Request(prompt="quick", checkpoint="nano"), "one too many")
        gate.go.set()
    finally:
        jobs.close()


def test_closing_ends_a_draft() -> None:
    jobs = JobQueue(ScriptedStudio(slow=endless))
    running = jobs.draft(Request(prompt="slow", checkpoint="nano"), "me")
    waiting = jobs.draft(Request(prompt="slow", checkpoint="nano"), "you")
    jobs.close()
    assert isinstance(ended(running), Stopped) and isinstance(ended(waiting), Stopped)
