"""A studio that runs scripts in place of models, for tests of the queue and of what follows it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError
from flux2_studio.events import FINAL_EVENTS, Event, Preview, Ready, Result, Status, Stopped
from flux2_studio.jobs.journal import Journal
from flux2_studio.jobs.tasks import Task
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.request import Request
from flux2_studio.storage.database import Database

PATIENCE = 60.0  # seconds until what a test waits for counts as never coming
Script = Callable[[Request, Callable[[], bool]], Iterator[Event]]


class ScriptedStudio:
    """Runs the script that the prompt names."""

    def __init__(self, **scripts: Script) -> None:
        self.scripts = scripts
        self.ran: list[str] = []
        self.keys: list[ApiKey | None] = []

    def resolve(self, request: Request, api_key: ApiKey | None = None) -> Request:
        if request.prompt not in self.scripts:
            raise RequestError("no such script")
        return request.resolve(next(one for one in CHECKPOINTS if one.name == (request.checkpoint or "nano")))

    def generate(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        self.ran.append(request.prompt)
        self.keys.append(api_key)
        return self.scripts[request.prompt](request, cancelled)

    def enhance_prompt(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]:
        self.ran.append(f"enhance {request.prompt}")
        self.keys.append(api_key)
        return self.scripts[request.prompt](request, cancelled)

    def draft(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.ran.append(f"draft {request.prompt}")
        return self.scripts[request.prompt](request, cancelled)

    def preload(self, name: str, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.ran.append(f"prepare {name}")
        yield Status(text="loading")
        waited = threading.Event()
        while name == "nano-base" and not cancelled():  # one that takes for ever
            waited.wait(0.01)
        yield Stopped() if cancelled() else Ready(checkpoint=name)


def preview(step: int, steps: int = 4) -> Preview:
    return Preview(step=step, steps=steps, images=(), first_index=0, count=1, seconds_left=None)


def result(request: Request) -> Result:
    return Result(request=request, images=(Path("a.png"),), seeds=request.seeds, seconds=1.0)


def four_steps(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    yield Status(text="drawing")
    for step in range(1, 5):
        if cancelled():
            yield Stopped()
            return
        yield preview(step)
    yield result(request)


def endless(request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
    """Ends by itself, wrongly, when nobody cancels it in time."""
    waited = threading.Event()
    for step in range(1, 1 + int(PATIENCE / 0.01)):
        if cancelled():
            yield Stopped(images=(Path("first.png"),), seeds=(1,))
            return
        yield preview(step, 1000)
        waited.wait(0.01)
    yield result(request)


class Gate:
    """A script that says it has begun, and goes on when it is told."""

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go = threading.Event()

    def __call__(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]:
        self.begun.set()
        assert self.go.wait(PATIENCE)
        yield Stopped() if cancelled() else result(request)


def follow(job: Task, since: int = 0) -> list[Event]:
    """All events until the run ends; fails rather than hangs."""
    events = [event for _, event in job.events(since, timeout=PATIENCE)]
    assert events and isinstance(events[-1], FINAL_EVENTS), f"the run did not end: {events}"
    return events


def journal_of(home: Path) -> Journal:
    return Journal(Database(home / "studio.sqlite3"), home / "queue")
