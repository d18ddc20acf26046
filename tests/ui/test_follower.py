"""What a tab follows, without a browser: runs that it started, that it found, and that ended while it was away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Event, Failed, Preview, PromptEnhanced, Result
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.jobs.journal import INTERRUPTED_MESSAGE, Journal
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.storage.database import Database
from flux2_studio.ui.forms import fields, tabs
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.gradio_compat import wiring
from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, owner_of
from flux2_studio.ui.gradio_compat.wiring import Update
from flux2_studio.ui.stage import queue_panel
from flux2_studio.ui.stage.follower import ENDED_MEANWHILE, Follower, TabState, form_name_for
from flux2_studio.ui.stage.run_view import RunView
from tests.scripted_studio import PATIENCE, Gate, ScriptedStudio, endless, four_steps, preview

ME = SimpleNamespace(username=None, cookies={VISITOR_COOKIE: "m" * 40}, session_hash="tab")
SOMEBODY = SimpleNamespace(username=None, cookies={VISITOR_COOKIE: "s" * 40}, session_hash="tab")


@pytest.fixture(scope="module")
def laid_out() -> tuple[list[tabs.Form], tabs.StagePanel]:
    settings = Settings(home=Path("nowhere"))
    examples = Examples.load(settings.assets / "examples")
    with gr.Blocks():
        chosen = fields.checkpoint(settings.checkpoints, "nano")
        forms = [layout(chosen, NANO, examples, settings) for layout in (tabs.generate, tabs.edit, tabs.multi)]
        return forms, tabs.build_stage(queue_panel.build_queue_panel())


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue")


def draws(picture: Path) -> Callable[[Request, Callable[[], bool]], Iterator[Event]]:
    def script(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        picture.write_bytes(b"picture")
        yield preview(1)
        yield Result(request=request, images=(picture,), seeds=request.seeds, seconds=1.5)

    return script


@pytest.fixture
def jobs(tmp_path: Path, journal: Journal) -> Iterator[JobQueue]:
    queue = JobQueue(ScriptedStudio(fox=draws(tmp_path / "fox.png"), endless=endless, four=four_steps), journal)
    yield queue
    queue.close()


@pytest.fixture
def follower(jobs: JobQueue, laid_out: tuple[list[tabs.Form], tabs.StagePanel]) -> Follower:
    forms, stage = laid_out

    def view_of(request: Request, form: tabs.Form) -> RunView:
        return RunView(stage, form.upsampling, NANO, PictureCache())

    return Follower(jobs, forms, stage, view_of, lambda view, form, request: {stage.stop: "over"})


def heard(updates: AsyncIterator[Update]) -> list[Update]:
    """All that a follower tells; in a thread of its own, for the browser tests leave an event loop running in this."""

    async def collect() -> list[Update]:
        return [update async for update in updates]

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, collect()).result(timeout=PATIENCE)


def whole(updates: list[Update]) -> Update:
    return {part: value for update in updates for part, value in update.items()}


def test_an_opened_tab_follows_what_goes_on(jobs: JobQueue, follower: Follower, laid_out: Any) -> None:
    _, stage = laid_out
    job = jobs.submit(Request(prompt="endless"), owner_of(ME))  # type: ignore[arg-type]
    assert heard(follower.attach(TabState(), SOMEBODY)) == [gr.skip()]  # type: ignore[arg-type]

    async def until_a_preview() -> str:
        watch = TabState()
        following = follower.attach(watch, ME)  # type: ignore[arg-type]
        async for update in following:
            if "Step" in str(update.get(stage.progress)):
                job.cancel()
            if stage.stop in update and update[stage.stop] == "over":
                assert watch.is_following
                return str(update[stage.progress])
        raise AssertionError("it ended without saying so")

    with ThreadPoolExecutor(1) as pool:
        assert "Stopped" in pool.submit(asyncio.run, until_a_preview()).result(timeout=PATIENCE)


def test_an_opened_tab_shows_once_what_ended_meanwhile(jobs: JobQueue, follower: Follower, laid_out: Any) -> None:
    _, stage = laid_out
    job = jobs.submit(Request(prompt="fox", seed=3), owner_of(ME))  # type: ignore[arg-type]
    list(job.events(timeout=PATIENCE))
    assert heard(follower.attach(TabState(), SOMEBODY)) == [gr.skip()]  # type: ignore[arg-type]
    heard(follower.attach(TabState(), ME))  # type: ignore[arg-type]  # by a tab that was closed before it had it
    watch = TabState()
    (told,) = heard(follower.attach(watch, ME))  # type: ignore[arg-type]
    follower.confirm_shown(watch)
    assert "1 picture in 1.5 s" in told[stage.progress] and ENDED_MEANWHILE in told[stage.notices]
    assert told[stage.result_paths][0].endswith("fox.png") and told[stage.stop] == "over"
    assert heard(follower.attach(TabState(), ME)) == [gr.skip()]  # type: ignore[arg-type]


def test_a_later_studio_shows_it_too(journal: Journal, jobs: JobQueue, follower: Follower, laid_out: Any) -> None:
    """From the journal alone."""
    _, stage = laid_out
    request = Request(prompt="a <b>fox</b>", seed=3).resolve(NANO)
    journal.add("earlier", owner_of(ME), request)  # type: ignore[arg-type]
    journal.record_event("earlier", PromptEnhanced(original=request.prompt, prompt="A red fox.", by="somebody"))
    journal.record_event("earlier", Failed(message="The disk is <full>."))
    (told,) = heard(follower.attach(TabState(), ME))  # type: ignore[arg-type]
    assert "The disk is &lt;full&gt;." in told[stage.message]


def test_a_tab_goes_on_with_the_next_run_and_keeps_the_picture_until_then(
    jobs: JobQueue, follower: Follower, laid_out: Any
) -> None:
    _, stage = laid_out
    watch = TabState()
    owner = owner_of(ME)  # type: ignore[arg-type]
    first = jobs.submit(Request(prompt="fox", seed=3), owner)
    assert stage.progress in follower.begin(watch, first, "generate")
    second = jobs.submit(Request(prompt="four", seed=4), owner)
    watch.is_following = True
    assert follower.begin(watch, second, "edit") == {}, "the first one is on the stage"
    assert heard(follower.follow(watch, ME)) == [gr.skip()]  # type: ignore[arg-type]
    watch.is_following = False
    for job in (first, second):
        list(job.events(timeout=PATIENCE))
    updates = heard(follower.follow(watch, ME))  # type: ignore[arg-type]
    begins = [update for update in updates if update.get(stage.job_id)]
    assert [update[stage.job_id] for update in begins] == [first.id, second.id]
    assert stage.gallery in begins[0] and stage.gallery not in begins[1]
    assert watch == TabState(unconfirmed_jobs=[first.id, second.id]) and jobs.latest_unseen(owner) is not None
    follower.confirm_shown(watch)
    assert watch == TabState() and jobs.latest_unseen(owner) is None


def test_a_failed_run_is_an_error_at_the_end(jobs: JobQueue, follower: Follower, tmp_path: Path) -> None:
    class Broken(ScriptedStudio):
        def generate(self, *_: object) -> Iterator[Event]:
            yield Failed(message="No credit.", in_prompt_enhancement=True)

    queue = JobQueue(Broken(fox=four_steps))
    try:
        failing = Follower(
            queue, list(follower._forms.values()), follower._stage, follower._make_view, follower._on_end
        )
        watch = TabState(form_by_job={queue.submit(Request(prompt="fox"), owner_of(ME)).id: "generate"})  # type: ignore[arg-type]
        with pytest.raises(gr.Error, match="No credit"):
            heard(failing.follow(watch, ME))  # type: ignore[arg-type]
        assert not watch.form_by_job and not watch.is_following
    finally:
        queue.close()


def test_stop_is_for_ones_own_runs_and_ones_tabs_enhancements(jobs: JobQueue) -> None:
    stop = wiring.make_stop_handler(jobs)
    run = jobs.submit(Request(prompt="endless"), owner_of(ME))  # type: ignore[arg-type]
    enhancing = jobs.enhance_prompt(Request(prompt="four"), wiring.tab_owner_of(ME))  # type: ignore[arg-type]
    forged = SimpleNamespace(username=None, cookies={}, session_hash=owner_of(ME))  # type: ignore[arg-type]
    other_tab = SimpleNamespace(username=None, cookies=ME.cookies, session_hash="other")
    stop(run.id, SOMEBODY)  # type: ignore[arg-type]
    stop(run.id, forged)  # type: ignore[arg-type]
    stop(enhancing.id, other_tab)  # type: ignore[arg-type]
    assert not run.cancelled and not enhancing.cancelled
    stop(run.id, other_tab)  # type: ignore[arg-type]
    stop(enhancing.id, ME)  # type: ignore[arg-type]
    assert run.cancelled and enhancing.cancelled
    list(run.events())  # until it is over
    assert stop(run.id, ME) == gr.skip()  # type: ignore[arg-type]


def test_the_form_of_a_run_by_its_references() -> None:
    for number, form in ((0, "generate"), (1, "edit"), (2, "multi"), (5, "multi")):
        assert form_name_for(Request(prompt="x", references=(Path("a.png"),) * number)) == form


def test_the_queue_panel_tells_what_stands_where(tmp_path: Path) -> None:
    before = Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue")
    before.add("cut", "me", Request(prompt="a cut one").resolve(NANO))
    before.start("cut")
    before.close()
    gate = Gate()
    jobs = JobQueue(
        ScriptedStudio(gate=gate, four=four_steps), Journal(Database(tmp_path / "studio.sqlite3"), tmp_path / "queue")
    )
    try:
        jobs.restore_waiting()
        running = jobs.submit(Request(prompt="gate"), "me")
        assert gate.begun.wait(PATIENCE)
        running.add_event(Preview(step=2, steps=4, images=(), first_index=0, count=1, seconds_left=12.0))
        jobs.submit(Request(prompt="four"), "somebody")
        waiting = [jobs.submit(Request(prompt="four"), "me") for _ in range(2)]
        told = queue_panel.queue_value(jobs, str, "me")
        assert [row["detail"] for row in told["rows"]] == [
            "Step 2 of 4, 12 s left · nano",
            "2 runs before it, 1 of them somebody else's · nano",
            "3 runs before it, 1 of them somebody else's · nano",
            f"{INTERRUPTED_MESSAGE} · nano",
        ]
        assert [row["state"] for row in told["rows"]] == ["running", "waiting", "waiting", "interrupted"]
        acts = [[act for act, *_ in row["acts"]] for row in told["rows"]]
        assert acts == [["cancel"], ["later", "cancel"], ["earlier", "cancel"], ["again", "discard"]]
        assert [row["id"] for row in told["rows"]] == [running.id, *(job.id for job in waiting), "cut"]
        theirs = queue_panel.queue_value(jobs, str, "somebody")["rows"]
        assert [row["detail"] for row in theirs] == ["1 run before it, somebody else's · nano"]
        assert queue_panel.queue_value(jobs, str, "nobody") == {"rows": [], "clear": False}
    finally:
        gate.go.set()
        jobs.close()


def test_long_prompts_are_shortened_to_a_line() -> None:
    assert queue_panel.shorten_prompt(" a\n  fox ") == "a fox"
    assert len(queue_panel.shorten_prompt("fox " * 99)) <= queue_panel.ROW_PROMPT_CHARS
