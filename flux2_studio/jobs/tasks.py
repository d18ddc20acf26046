"""Tasks of the queue and their events so far: a run, a draft, a prompt enhancement or a preload.

Followers read `events(since)`. A follower may be slower than the work, so only the newest event of each transient kind
is kept.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flux2_studio.events import FINAL_EVENTS, Event, Preview, PromptProgress, Queued, Status, Stopped
from flux2_studio.jobs.unfinished import UnfinishedPictures
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.request import Request

TRANSIENT_EVENTS = (Queued, Status, PromptProgress, Preview)  # superseded by the next event of the same kind


class Task:
    """One piece of work and its events so far. Safe to use from any thread."""

    def __init__(self, owner: str, id_: str | None = None) -> None:
        self.id = id_ or uuid.uuid4().hex
        self.owner = owner
        self._changed = threading.Condition()
        self._events: list[tuple[int, Event]] = []  # (number, event), ascending, without superseded events
        self._next = 0
        self._started = False
        self._cancelled = False

    def add_event(self, event: Event) -> bool:
        """Append an event and wake the followers; return False after the final event. Keeps only the newest of each
        transient kind."""
        with self._changed:
            if self.finished:  # a late event, such as a queue position, would reopen the task
                return False
            superseded = TRANSIENT_EVENTS if isinstance(event, FINAL_EVENTS) else type(event)
            if isinstance(event, TRANSIENT_EVENTS + FINAL_EVENTS):
                self._events = [(n, e) for n, e in self._events if not isinstance(e, superseded)]
            self._events.append((self._next, event))
            self._next += 1
            self._changed.notify_all()
            return True

    def latest_event(self) -> Event | None:
        """Return the last event so far; None if there is none."""
        with self._changed:
            return self._events[-1][1] if self._events else None

    def events(self, since: int = 0, *, timeout: float | None = None) -> Iterator[tuple[int, Event]]:
        """Yield the events numbered `since` and later as (number, event), waiting for more until the task has ended.

        timeout: stop silently after that many seconds without an event (None: wait forever).
        """
        while True:
            with self._changed:
                while self._next <= since and not self.finished:
                    if not self._changed.wait(timeout):
                        return
                new_events = [(n, event) for n, event in self._events if n >= since]
                since, ended = self._next, self.finished
            yield from new_events
            if ended:
                return

    def cancel(self) -> None:
        """Ask the task to stop at its next check (between two steps); a task that still waits ends at once."""
        with self._changed:
            self._cancelled = True
            if not self._started and not self.finished:
                self.add_event(Stopped())

    def start(self) -> bool:
        """Mark the task as started; return False if it was cancelled before."""
        with self._changed:
            self._started = not self._cancelled
            return self._started

    @property
    def started(self) -> bool:
        return self._started

    @property
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def finished(self) -> bool:
        with self._changed:
            return bool(self._events) and isinstance(self._events[-1][1], FINAL_EVENTS)


class Job(Task):
    """A submitted run.

    request: for drafts as submitted, else resolved. api_key: the owner's, for prompt enhancement; dropped when the run
    has ended. on_event: called with each event before followers see it. skipped, predecessors, required_checkpoint,
    checkpoint_after: see `scheduler.WaitingRun`. is_persistent: whether it is journaled and shown in its owner's queue.
    """

    is_persistent = True

    def __init__(
        self,
        request: Request,
        owner: str,
        api_key: ApiKey | None = None,
        *,
        id_: str | None = None,
        on_event: Callable[[Job, Event], None] = lambda job, event: None,
    ) -> None:
        super().__init__(owner, id_)
        self.request = request
        # With the original reference paths: the journal deletes its copies when the run ends.
        self.submitted_request = request
        self.api_key = api_key
        self.skipped = 0
        self.predecessors: set[Any] = set()
        self.unfinished = UnfinishedPictures()
        self._on_event = on_event

    @property
    def required_checkpoint(self) -> str | None:
        return self.request.checkpoint

    @property
    def checkpoint_after(self) -> str | None:
        return self.request.checkpoint

    def add_event(self, event: Event) -> bool:
        if not self.finished:
            self._on_event(self, event)  # first, so that followers only see journaled events
        added = super().add_event(event)
        if added:
            self.unfinished.on_event(event)
        if isinstance(event, FINAL_EVENTS):
            self.api_key = None
        return added


class EnhanceJob(Job):
    """Prompt enhancement without drawing."""

    is_persistent = False

    @property
    def checkpoint_after(self) -> str | None:
        """None: the language model may have evicted the loaded checkpoint."""
        return None


class DraftJob(Job):
    """A picture drawn as a quick preview while its owner still types; nothing of it is kept."""

    is_persistent = False


class PreloadTask(Task):
    """Load a checkpoint before it is needed."""

    def __init__(self, checkpoint: str, owner: str) -> None:
        super().__init__(owner)
        self.checkpoint = checkpoint

    @property
    def checkpoint_after(self) -> str:
        return self.checkpoint
