"""What the queue believes to be in memory: only what a run or a preparation has shown to be there."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from flux2_studio.errors import StudioError
from flux2_studio.events import Event, Failed, Queued, Ready, Status, Stopped
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request, Upsampling
from tests.scripted_studio import PATIENCE, Gate, ScriptedStudio, follow, four_steps, preview


def fails_to_load(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield Status(text="loading")
    raise StudioError("the file is damaged")


def fails_while_drawing(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield preview(1)
    raise StudioError("the memory ran out, and every weight has left it")


def stopped_while_loading(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield Status(text="loading")
    yield Stopped()


@pytest.mark.parametrize("script", [fails_to_load, fails_while_drawing, stopped_while_loading])
def test_after_a_run_that_did_not_end_well_its_checkpoint_is_loaded_when_chosen(
    script: Callable[[Request, Callable[[], bool]], Iterator[Event]],
) -> None:
    studio = ScriptedStudio(run=script)
    jobs = JobQueue(studio)
    follow(jobs.submit(Request(prompt="run")))
    assert follow(jobs.preload("nano"))[-1] == Ready(checkpoint="nano")
    jobs.close()
    assert studio.ran == ["run", "prepare nano"]


def test_a_checkpoint_that_a_run_still_loads_is_not_ready() -> None:
    gate = Gate()
    studio = ScriptedStudio(gate=gate)
    jobs = JobQueue(studio)
    job = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    chosen = jobs.preload("nano")
    assert isinstance(chosen.latest_event(), Queued) and not chosen.finished
    gate.go.set()
    follow(job)
    assert follow(chosen)[-1] == Ready(checkpoint="nano")
    jobs.close()


def test_what_another_checkpoint_displaces_is_not_loaded() -> None:
    studio = ScriptedStudio(fox=four_steps)
    jobs = JobQueue(studio)
    follow(jobs.submit(Request(prompt="fox")))
    other = jobs.preload("nano-base")  # takes for ever
    for _, event in other.events(timeout=PATIENCE):
        if isinstance(event, Status):
            break
    again = jobs.preload("nano")
    assert not isinstance(again.latest_event(), Ready) or studio.ran[-1] == "prepare nano"
    assert follow(again)[-1] == Ready(checkpoint="nano")
    jobs.close()
    assert studio.ran == ["fox", "prepare nano-base", "prepare nano"]


def test_choosing_what_is_loaded_again_drops_what_was_to_be_loaded() -> None:
    studio = ScriptedStudio(fox=four_steps)
    jobs = JobQueue(studio)
    follow(jobs.submit(Request(prompt="fox")))
    gate = Gate()
    studio.scripts["gate"] = gate
    job = jobs.submit(Request(prompt="gate"))
    assert gate.begun.wait(PATIENCE)
    other = jobs.preload("nano-base")
    assert jobs.preload("nano").latest_event() == Ready(checkpoint="nano")
    assert isinstance(other.latest_event(), Stopped)
    gate.go.set()
    follow(job)
    jobs.close()
    assert studio.ran == ["fox", "gate"]


def test_a_preparation_that_was_stopped_has_loaded_nothing() -> None:
    studio = ScriptedStudio(fox=four_steps)
    jobs = JobQueue(studio)
    first = jobs.preload("nano-base")  # takes for ever
    for _, event in first.events(timeout=PATIENCE):
        if isinstance(event, Status):
            first.cancel()
    assert isinstance(first.latest_event(), Stopped)
    again = jobs.preload("nano-base")
    assert not isinstance(again.latest_event(), Ready | Failed)
    jobs.close()


def test_a_language_model_may_displace_the_checkpoint_in_memory() -> None:
    gate = Gate()
    studio = ScriptedStudio(fox=four_steps, gate=gate)
    jobs = JobQueue(studio)
    follow(jobs.submit(Request(prompt="fox")))
    job = jobs.submit(Request(prompt="gate", upsampling=Upsampling(by="local")))
    assert gate.begun.wait(PATIENCE)  # it has shown no preview: its checkpoint need not be there any more
    chosen = jobs.preload("nano")
    assert isinstance(chosen.latest_event(), Queued) and not chosen.finished
    gate.go.set()
    follow(job)
    assert follow(chosen)[-1] == Ready(checkpoint="nano")
    jobs.close()
