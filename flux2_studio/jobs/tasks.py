"""What a worker does, and the events that it has had so far: a run, a draft, an enrichment, a preparation.

A follower reads `events(since)`; it may be slower than the work, so of previews and the like only the newest is kept.
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

TRANSIENT_EVENTS = (Queued, Status, PromptProgress, Preview)  # what a later event of the same kind makes worthless


class Task:
    """Something that the worker does, and the events it has had so far. Safe to use from any thread."""

    def __init__(self, owner: str, id_: str | None = None) -> None:
        self.id = id_ or uuid.uuid4().hex
        self.owner = owner
        self._changed = threading.Condition()
        self._events: list[tuple[int, Event]] = []  # (number, event), numbers rising, old previews dropped
        self._next = 0
        self._started = False
        self._cancelled = False

    def add_event(self, event: Event) -> bool:
        """Append an event and wake the followers; nothing, and False, after the last one. Of passing events the newest
        is kept."""
        with self._changed:
            if self.finished:  # whatever comes late (a place in the queue, say) would reopen it
                return False
            passing = TRANSIENT_EVENTS if isinstance(event, FINAL_EVENTS) else type(event)
            if isinstance(event, TRANSIENT_EVENTS + FINAL_EVENTS):
                self._events = [(n, e) for n, e in self._events if not isinstance(e, passing)]
            self._events.append((self._next, event))
            self._next += 1
            self._changed.notify_all()
            return True

    def latest_event(self) -> Event | None:
        """The last event so far."""
        with self._changed:
            return self._events[-1][1] if self._events else None

    def events(self, since: int = 0, *, timeout: float | None = None) -> Iterator[tuple[int, Event]]:
        """The events numbered `since` and later as (number, event), waiting for more until the run has ended.

        timeout: give up silently after so many seconds without an event (None: wait for ever).
        """
        while True:
            with self._changed:
                while self._next <= since and not self.finished:
                    if not self._changed.wait(timeout):
                        return
                fresh = [(n, event) for n, event in self._events if n >= since]
                since, ended = self._next, self.finished
            yield from fresh
            if ended:
                return

    def cancel(self) -> None:
        """Ask the run to stop between two steps; a run that still waits ends at once."""
        with self._changed:
            self._cancelled = True
            if not self._started and not self.finished:
                self.add_event(Stopped())

    def start(self) -> bool:
        """Mark the run as begun; False if it was cancelled before."""
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
    """One submitted run, with its resolved request. api_key: its owner's, for the server that enriches prompts;
    forgotten when the run has ended. told: hears of each event, before its followers do. skipped, behind, needs,
    leaves: its place in the line. is_persistent: whether it is written down, and stands in its owner's queue."""

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
        self.submitted_request = (
            request  # with its references where they came from: what the journal keeps goes when the run ends
        )
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
            self._on_event(self, event)  # first: what its followers know must be written down
        added = super().add_event(event)
        if added:
            self.unfinished.on_event(event)
        if isinstance(event, FINAL_EVENTS):
            self.api_key = None
        return added


class EnhanceJob(Job):
    """Having a prompt enriched, and nothing drawn."""

    is_persistent = False

    @property
    def checkpoint_after(self) -> str | None:
        """None: a language model that writes may have taken the place of whatever was loaded."""
        return None


class DraftJob(Job):
    """Having a picture drawn for a look while its owner still types: nothing of it is kept."""

    is_persistent = False


class PreloadTask(Task):
    """Loading a checkpoint before it is needed."""

    def __init__(self, checkpoint: str, owner: str) -> None:
        super().__init__(owner)
        self.checkpoint = checkpoint

    @property
    def checkpoint_after(self) -> str:
        return self.checkpoint
