"""What a queue with a journal makes of an end that nobody announced, and what an owner may do with their own runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flux2_studio.checkpoints import NANO
from flux2_studio.errors import StudioError
from flux2_studio.events import Event, Failed, Queued, Result, Saved, Status, Stopped
from flux2_studio.jobs.queue import MAX_WAITING_PER_OWNER, MAX_WAITING_RUNS, JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.record import Record
from flux2_studio.request import Request, Upsampling
from tests.scripted_studio import PATIENCE, Gate, ScriptedStudio, endless, follow, four_steps, journal_of

Open = Callable[..., tuple[JobQueue, ScriptedStudio]]


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Open:
    """Starts a queue over scripts, with the one journal of the test."""

    def opened(**scripts: object) -> tuple[JobQueue, ScriptedStudio]:
        studio = ScriptedStudio(**{"fox": four_steps, "owl": four_steps, "cat": four_steps, **scripts})  # type: ignore[arg-type]
        jobs = JobQueue(studio, journal_of(tmp_path))
        request.addfinalizer(jobs.close)
        return jobs, studio

    return opened


def test_followers_hear_of_nothing_that_is_not_written_down(tmp_path: Path) -> None:
    heard: list[tuple[Event, Event | None]] = []
    job = Job(
        Request(prompt="fox").resolve(NANO), "me", on_event=lambda job, event: heard.append((event, job.latest_event()))
    )
    for event in (Status(text="one"), Stopped(), Status(text="too late")):
        job.add_event(event)
    assert heard == [(Status(text="one"), None), (Stopped(), Status(text="one"))]


def test_a_journal_that_fails_ends_one_run_and_not_the_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = journal_of(tmp_path)
    jobs = JobQueue(ScriptedStudio(fox=four_steps, owl=four_steps), journal)

    def broken(id_: str, event: Event) -> None:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(journal, "record_event", broken)
        ended = follow(jobs.submit(Request(prompt="fox"), "me"))[-1]
    assert isinstance(ended, Failed)
    assert isinstance(follow(jobs.submit(Request(prompt="owl"), "me"))[-1], Result)
    jobs.close()


def busy(opened: Open, **scripts: object) -> tuple[JobQueue, ScriptedStudio, Gate]:
    """A queue whose worker is held up by somebody else's run."""
    gate = Gate()
    jobs, studio = opened(gate=gate, **scripts)
    jobs.submit(Request(prompt="gate"), "somebody")
    assert gate.begun.wait(PATIENCE)
    return jobs, studio, gate


def test_what_waited_goes_on_in_the_next_studio_and_what_ran_on_one_click(opened: Open) -> None:
    jobs, _ = opened(endless=endless)
    running = jobs.submit(Request(prompt="endless", seed=5), "me")
    next(running.events(timeout=PATIENCE))
    waiting = [jobs.submit(Request(prompt=prompt), "me") for prompt in ("fox", "owl", "cat")]
    jobs.move(waiting[2].id, "me", later=False)
    jobs.close()
    again, studio = opened(endless=four_steps)
    again.restore_waiting()
    resumed = [again.get(job.id, "me") for job in waiting]
    for job in resumed:
        assert job is not None
        assert isinstance(follow(job)[-1], Result)
    assert studio.ran == ["fox", "cat", "owl"]
    (cut,) = again.interrupted("me")
    with pytest.raises(StudioError, match="not there any more"):
        again.resume_interrupted(cut.id, "somebody else")
    renewed = again.resume_interrupted(cut.id, "me")
    assert isinstance(follow(renewed)[-1], Result) and renewed.request.seed == 5
    assert again.interrupted("me") == ()
    with pytest.raises(StudioError, match="not there any more"):
        again.resume_interrupted(cut.id, "me")


def test_a_run_that_cannot_be_renewed_stays(opened: Open) -> None:
    jobs, _ = opened(endless=endless)
    next(jobs.submit(Request(prompt="endless"), "me").events(timeout=PATIENCE))
    jobs.close()
    again, _ = opened()  # which has no such script
    again.restore_waiting()
    (cut,) = again.interrupted("me")
    with pytest.raises(StudioError, match="no such script"):
        again.resume_interrupted(cut.id, "me")
    again.discard(cut.id, "somebody else")
    assert again.interrupted("me") == (cut,)
    again.discard(cut.id, "me")
    assert again.interrupted("me") == ()


def test_no_key_is_written_anywhere(opened: Open, tmp_path: Path) -> None:
    jobs, _, gate = busy(opened)
    jobs.submit(Request(prompt="fox", upsampling=Upsampling(by="openrouter")), "me", ApiKey("sk-or-very-secret"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not [path for path in files if b"very-secret" in path.read_bytes()]
    gate.go.set()


def test_what_is_cancelled_does_not_come_back(opened: Open) -> None:
    jobs, _, gate = busy(opened)
    job = jobs.submit(Request(prompt="fox"), "me")
    job.cancel()
    gate.go.set()
    jobs.close()
    again, _ = opened()
    again.restore_waiting()
    assert again.get(job.id, "me") is None and again.interrupted("me") == () and again.latest_unseen("me") is None


def test_the_end_is_news_until_it_was_shown(opened: Open) -> None:
    jobs, _ = opened()
    job = jobs.submit(Request(prompt="fox"), "me")
    follow(job)
    entry = jobs.latest_unseen("me")
    assert entry is not None and entry.id == job.id
    assert jobs.latest_unseen("somebody") is None
    jobs.mark_seen(job.id)
    assert jobs.latest_unseen("me") is None


def test_an_owner_sees_and_moves_only_their_own(opened: Open) -> None:
    jobs, studio, gate = busy(opened)
    order = (("fox", "me"), ("owl", "you"), ("cat", "me"))
    fox, owl, cat = (jobs.submit(Request(prompt=prompt), owner) for prompt, owner in order)
    assert [(it.job, it.runs_ahead, it.others_ahead) for it in jobs.queue_positions("me")] == [(fox, 1, 1), (cat, 3, 2)]
    assert [(it.job, it.runs_ahead, it.others_ahead) for it in jobs.queue_positions("you")] == [(owl, 2, 2)]
    jobs.move(owl.id, "me", later=False)
    jobs.move(cat.id, "you", later=False)
    jobs.move("nothing", "me", later=True)
    assert [it.job for it in jobs.queue_positions("me")] == [fox, cat]
    jobs.move(cat.id, "me", later=False)
    assert [(it.job, it.runs_ahead) for it in jobs.queue_positions("me")] == [(cat, 1), (fox, 3)]
    assert [(it.job, it.runs_ahead) for it in jobs.queue_positions("you")] == [(owl, 2)]
    assert [job.latest_event() for job in (cat, owl, fox)] == [Queued(runs_ahead=ahead) for ahead in (1, 2, 3)]
    gate.go.set()
    for job in (fox, owl, cat):
        follow(job)
    assert studio.ran == ["gate", "cat", "owl", "fox"]
    assert jobs.queue_positions("me") == ()


def test_there_is_an_end_to_what_may_wait(opened: Open, tmp_path: Path) -> None:
    gate = Gate()
    jobs = JobQueue(ScriptedStudio(gate=gate, fox=four_steps))
    try:
        jobs.submit(Request(prompt="gate"), "me")
        assert gate.begun.wait(PATIENCE)
        mine = [jobs.submit(Request(prompt="fox"), "me") for _ in range(MAX_WAITING_PER_OWNER)]
        with pytest.raises(StudioError, match="take one off the queue"):
            jobs.submit(Request(prompt="fox"), "me")
        mine[0].cancel()
        jobs.submit(Request(prompt="fox"), "me")
        for number in range(MAX_WAITING_RUNS - MAX_WAITING_PER_OWNER):
            jobs.submit(Request(prompt="fox"), f"somebody {number}")
        with pytest.raises(StudioError, match="of all who use this studio"):
            jobs.submit(Request(prompt="fox"), "one more")
    finally:
        gate.go.set()
        jobs.close()


def test_a_run_shows_what_it_enhances_where_the_tab_did(opened: Open) -> None:
    jobs, _ = opened(endless=endless)
    remote = Upsampling(by="openrouter")
    here, there = (jobs.enhance_prompt(Request(prompt="endless", upsampling=remote), tab) for tab in ("tab:1", "tab:2"))
    jobs.submit(Request(prompt="fox", upsampling=remote), "me", tab="tab:1")
    assert isinstance(follow(here)[-1], Stopped) and not there.finished


def test_a_notebook_that_fails_is_told_and_the_picture_is_made_all_the_same(opened: Open, tmp_path: Path) -> None:
    def saves(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        (tmp_path / "studio.sqlite3").write_bytes(b"no database" * 1000)
        record = Record(request=request, label="Nano")
        yield Saved(index=0, image=tmp_path / "a.png", seed=1, record=record)
        yield from four_steps(request, cancelled)

    jobs, _ = opened(saves=saves)
    events = follow(jobs.submit(Request(prompt="saves"), "me"))
    assert isinstance(events[-1], Result)
    assert any("it will not know how far this run was" in getattr(event, "text", "") for event in events)
