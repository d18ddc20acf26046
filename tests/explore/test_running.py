"""Explorations through a real queue, with a studio that draws at once."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.checkpoints import NANO
from flux2_studio.errors import OutOfMemory, RequestError
from flux2_studio.events import Event, Preview, Ready, Result, Saved, Stopped
from flux2_studio.explore.plan import ExplorationPlan, plan_list
from flux2_studio.explore.running import (
    ABANDONED_AFTER_SECONDS,
    MAX_CONSECUTIVE_FAILURES,
    Exploration,
    ExplorationManager,
)
from flux2_studio.jobs.journal import Journal
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.storage.database import Database

PATIENCE = 60.0


class Painter:
    """Draws a picture in one colour; "slow" waits until it is let go, "broken" fails."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn: list[str] = []
        self.let_go = threading.Event()
        self.busy = threading.Event()

    def resolve(self, request: Request, api_key: ApiKey | None = None) -> Request:
        return request.resolve(NANO)

    def generate(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        if request.prompt == "broken":
            raise OutOfMemory("It does not fit: choose a smaller size.")
        yield Preview(step=1, steps=4, images=(), first_index=0, count=1, seconds_left=None)
        while request.prompt == "slow" and not self.let_go.wait(0.01):
            self.busy.set()
            if cancelled():
                yield Stopped()
                return
        assert request.seed is not None
        path = self.folder / f"{len(self.drawn)}.png"
        Image.new("RGB", (64, 48), "#20a080").save(path)
        self.drawn.append(request.prompt)
        yield Saved(index=0, image=path, seed=request.seed, record=Record(request=request, label=NANO.label))
        yield Result(request=request, images=(path,), seeds=(request.seed,), seconds=0.1)

    def enhance_prompt(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        raise AssertionError("prompts are drawn as they are written")

    def preload(self, name: str, cancelled: Callable[[], bool]) -> Iterator[Event]:
        yield Ready(checkpoint=name)


@pytest.fixture
def painter(tmp_path: Path) -> Painter:
    return Painter(tmp_path)


@pytest.fixture
def jobs(painter: Painter) -> Iterator[JobQueue]:
    queue = JobQueue(painter)
    yield queue
    queue.close()


@pytest.fixture
def explorations(jobs: JobQueue, tmp_path: Path) -> ExplorationManager:
    return ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")


def plan(*prompts: str) -> ExplorationPlan:
    return plan_list([Request(prompt=it, checkpoint="nano", seed=1) for it in prompts], 2, list(prompts), "Prompt")


def ended(exploration: Exploration) -> Exploration:
    waited = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if exploration.progress.state != "running":
            return exploration
        waited.wait(0.01)
    raise AssertionError("it does not end")


def test_every_cell_is_made_and_has_its_own_file(explorations: ExplorationManager) -> None:
    done = ended(explorations.start(plan("a", "b", "c"), "me"))
    assert done.progress.state == "done" and done.remaining_cells == []
    assert len(set(done.progress.done.values())) == 3
    assert all(done.thumbnail(number).is_file() for number in range(3))
    sheet = done.sheet(0)
    assert (0x20, 0xA0, 0x80) in [colour for _, colour in sheet.getcolors(1 << 20) or []]


def test_stopped_and_gone_on_with(explorations: ExplorationManager, painter: Painter) -> None:
    exploration = explorations.start(plan("a", "slow", "b"), "me")
    assert painter.busy.wait(PATIENCE)
    explorations.stop(exploration)
    ended(exploration)
    assert exploration.progress.state == "stopped" and exploration.remaining_cells == [1, 2]
    painter.let_go.set()
    again = explorations.resume(exploration.id, "me")
    assert ended(again).progress.state == "done"
    assert painter.drawn == ["a", "slow", "b"], "what was done is not made again"


def test_another_studio_goes_on(
    jobs: JobQueue, explorations: ExplorationManager, painter: Painter, tmp_path: Path
) -> None:
    """As after a kill: only what was written down is left."""
    exploration = explorations.start(plan("a", "slow", "b"), "me")
    assert painter.busy.wait(PATIENCE)
    later = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")
    found = later.latest("me")
    assert found is not None and found.id == exploration.id
    assert found.progress.state == "stopped" and found.remaining_cells == [1, 2] and found.plan == exploration.plan
    explorations.stop(exploration)
    ended(exploration)
    painter.let_go.set()
    assert ended(later.resume(found.id, "me")).progress.state == "done"
    assert painter.drawn == ["a", "slow", "b"]


@pytest.fixture
def killed(painter: Painter, tmp_path: Path) -> Iterator[tuple[JobQueue, Exploration]]:
    """A queue of a studio that was killed, as far as others can see, and what it was exploring."""
    queue = JobQueue(painter)
    notebooks = tmp_path / "notebooks"
    exploration = ExplorationManager(queue, notebooks, tmp_path / "small").start(plan("a", "slow", "b"), "me")
    assert painter.busy.wait(PATIENCE)
    written = (notebooks / f"{exploration.id}.json").read_text()
    queue.close()
    ended(exploration)
    assert (notebooks / f"{exploration.id}.json").read_text() == written, "nobody stopped it"
    yield queue, exploration


def test_what_was_under_way_goes_on_by_itself(
    killed: tuple[JobQueue, Exploration], jobs: JobQueue, painter: Painter, tmp_path: Path
) -> None:
    later = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")
    painter.let_go.set()
    later.resume_interrupted()
    found = later.latest("me")
    assert found is not None and found.id == killed[1].id
    assert ended(found).progress.state == "done" and painter.drawn == ["a", "slow", "b"]
    third = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")
    third.resume_interrupted()
    again = third.latest("me")
    assert again is not None and again.progress.state == "done" and painter.drawn == ["a", "slow", "b"]


def test_what_was_stopped_waits_for_a_click(
    explorations: ExplorationManager, jobs: JobQueue, painter: Painter, tmp_path: Path
) -> None:
    exploration = explorations.start(plan("a", "slow", "b"), "me")
    assert painter.busy.wait(PATIENCE)
    explorations.stop(exploration)
    ended(exploration)
    later = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")
    later.resume_interrupted()
    found = later.latest("me")
    assert found is not None and found.progress.state == "stopped" and found.remaining_cells == [1, 2]


def test_nobody_takes_what_another_studio_is_at(
    explorations: ExplorationManager, jobs: JobQueue, painter: Painter, tmp_path: Path
) -> None:
    exploration = explorations.start(plan("a", "slow"), "me")
    assert painter.busy.wait(PATIENCE)
    other = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")
    other.resume_interrupted()
    seen = other.latest("me")
    assert seen is not None and seen.progress.state == "stopped", "as far as it knows"
    with pytest.raises(RequestError, match="Another studio"):
        other.resume(exploration.id, "me")
    painter.let_go.set()
    ended(exploration)
    assert painter.drawn == ["a", "slow"]


@pytest.mark.parametrize("waited", [False, True])
def test_the_picture_under_way_is_made_once(painter: Painter, tmp_path: Path, waited: bool) -> None:
    """Its run stands in the journal, too: it is in the queue again, or was cut short there."""
    database, queue = Database(tmp_path / "studio.sqlite3"), tmp_path / "queue"

    def studio() -> tuple[JobQueue, Journal, ExplorationManager]:
        journal = Journal(database, queue)
        jobs = JobQueue(painter, journal)
        return jobs, journal, ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small")

    jobs, _, explorations = studio()
    if waited:  # behind somebody else's run
        jobs.submit(Request(prompt="slow", checkpoint="nano", seed=1), "another")
        assert painter.busy.wait(PATIENCE)
    exploration = explorations.start(plan("b" if waited else "slow"), "me")
    for _ in range(int(PATIENCE / 0.01)):
        if exploration.current_job is not None and (waited or exploration.current_job.started):
            break
        threading.Event().wait(0.01)
    jobs.close()
    ended(exploration)
    painter.let_go.set()
    jobs, journal, later = studio()
    jobs.restore_waiting()
    later.resume_interrupted()
    found = later.get(exploration.id, "me")
    assert found is not None and ended(found).progress.state == "done"
    jobs.close()
    assert painter.drawn.count("b" if waited else "slow") == 1
    assert not journal.interrupted("me")


def test_one_that_nobody_came_back_to_is_forgotten(
    explorations: ExplorationManager, jobs: JobQueue, tmp_path: Path
) -> None:
    kept, gone = ended(explorations.start(plan("a"), "me")), ended(explorations.start(plan("b"), "you"))
    notebooks = tmp_path / "notebooks"
    long_ago = time.time() - ABANDONED_AFTER_SECONDS - 60
    for exploration in (kept, gone):
        os.utime(notebooks / f"{exploration.id}.json", (long_ago, long_ago))
    explorations.latest("me")  # who opened the page
    picture = gone.progress.done[0]
    later = ExplorationManager(jobs, notebooks, tmp_path / "small")
    later.resume_interrupted()
    assert later.latest("you") is None and not gone.folder.exists() and picture.is_file()
    mine = later.latest("me")
    assert mine is not None and mine.id == kept.id
    assert {path.stem for path in notebooks.iterdir()} == {kept.id}


def test_a_failure_is_told_and_the_rest_is_made(explorations: ExplorationManager) -> None:
    done = ended(explorations.start(plan("a", "broken", "b"), "me"))
    assert done.progress.state == "stopped" and done.progress.failed == {1: "It does not fit: choose a smaller size."}
    assert set(done.progress.done) == {0, 2}


def test_when_nothing_works_the_rest_is_not_tried(explorations: ExplorationManager) -> None:
    prompts = [f"broken{' ' * i}" for i in range(3)]  # each its own prompt, so in order
    done = ended(explorations.start(plan(*["broken"] * MAX_CONSECUTIVE_FAILURES, *prompts, "a"), "me"))
    assert len(done.progress.failed) == MAX_CONSECUTIVE_FAILURES and done.progress.done == {}


def test_others_see_nothing_of_it(explorations: ExplorationManager) -> None:
    mine = ended(explorations.start(plan("a"), "me"))
    assert explorations.get(mine.id, "you") is None and explorations.latest("you") is None
    with pytest.raises(RequestError, match="is gone"):
        explorations.resume(mine.id, "you")
    for id_ in (f"../notebooks/{mine.id}", "", "x" * 32):
        assert explorations.get(id_, "me") is None


def test_one_at_a_time(explorations: ExplorationManager, painter: Painter) -> None:
    first = explorations.start(plan("slow"), "me")
    with pytest.raises(RequestError, match="under way"):
        explorations.start(plan("a"), "me")
    painter.let_go.set()
    ended(explorations.start(plan("a"), "you"))
    ended(first)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"version": 1}', '{"version": 1, "plan": [], "done": {}}', "\x00"])
def test_a_damaged_notebook_is_passed_over(explorations: ExplorationManager, tmp_path: Path, text: str) -> None:
    good = ended(explorations.start(plan("a"), "me"))
    (tmp_path / "notebooks" / f"{'0' * 32}.json").write_text(text)
    assert explorations.get("0" * 32, "me") is None
    assert explorations.latest("me") is good


def test_a_picture_that_was_deleted_is_made_again(
    jobs: JobQueue, explorations: ExplorationManager, tmp_path: Path
) -> None:
    first = ended(explorations.start(plan("a", "b"), "me"))
    first.progress.done[0].unlink()
    assert first.sheet(0).size, "a blank in its place"
    later = ExplorationManager(jobs, tmp_path / "notebooks", tmp_path / "small").latest("me")
    assert later is not None and later.remaining_cells == [0]
