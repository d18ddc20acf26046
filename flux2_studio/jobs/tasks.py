"""What a worker does, and the events that it has had so far: a run, a draft, an enrichment, a preparation.

A follower reads `events(since)`; it may be slower than the work, so of previews and the like only the newest is kept.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

from flux2_studio.events import FINAL, Event, Preview, Queued, Status, Stopped, Writing
from flux2_studio.jobs.unfinished import Sketches
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.request import Request

PASSING = (Queued, Status, Writing, Preview)  # what a later event of the same kind makes worthless


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

    def add(self, event: Event) -> bool:
        """Append an event and wake the followers; nothing, and False, after the last one. Of passing events the newest
        is kept."""
        with self._changed:
            if self.finished:  # whatever comes late (a place in the queue, say) would reopen it
                return False
            passing = PASSING if isinstance(event, FINAL) else type(event)
            if isinstance(event, PASSING + FINAL):
                self._events = [(n, e) for n, e in self._events if not isinstance(e, passing)]
            self._events.append((self._next, event))
            self._next += 1
            self._changed.notify_all()
            return True

    def newest(self) -> Event | None:
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
                self.add(Stopped())

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
            return bool(self._events) and isinstance(self._events[-1][1], FINAL)


class Job(Task):
    """One submitted run, with its resolved request. key: its owner's, for the server that enriches prompts; forgotten
    when the run has ended. told: hears of each event, before its followers do. passed, behind, needs, leaves: its place
    in the line. lasting: whether it is written down, and stands in its owner's queue."""

    lasting = True

    def __init__(
        self,
        request: Request,
        owner: str,
        key: ApiKey | None = None,
        *,
        id_: str | None = None,
        told: Callable[[Job, Event], None] = lambda job, event: None,
    ) -> None:
        super().__init__(owner, id_)
        self.request = request
        self.asked = request  # with its references where they came from: what the journal keeps goes when the run ends
        self.key = key
        self.passed = 0
        self.behind: set[Any] = set()
        self.sketches = Sketches()
        self._told = told

    @property
    def needs(self) -> str | None:
        return self.request.checkpoint

    @property
    def leaves(self) -> str | None:
        return self.request.checkpoint

    def add(self, event: Event) -> bool:
        if not self.finished:
            self._told(self, event)  # first: what its followers know must be written down
        added = super().add(event)
        if added:
            self.sketches.hear(event)
        if isinstance(event, FINAL):
            self.key = None
        return added


class Enrichment(Job):
    """Having a prompt enriched, and nothing drawn."""

    lasting = False

    @property
    def leaves(self) -> str | None:
        """None: a language model that writes may have taken the place of whatever was loaded."""
        return None


class Draft(Job):
    """Having a picture drawn for a look while its owner still types: nothing of it is kept."""

    lasting = False


class Preparation(Task):
    """Loading a checkpoint before it is needed."""

    def __init__(self, checkpoint: str, owner: str) -> None:
        super().__init__(owner)
        self.checkpoint = checkpoint

    @property
    def leaves(self) -> str:
        return self.checkpoint
