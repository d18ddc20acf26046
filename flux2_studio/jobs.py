"""Runs belong to the server, not to the browser tab: a job goes on when nobody looks, and anyone may come back to it.

`submit` checks the request at once, so a mistake is told to the one who made it; a worker thread per device runs
the jobs in order. A follower reads `job.events(since)`; it may be slower than the run, so of previews and the like only
the newest is kept. Cancelling takes effect between two denoising steps.
"""

from __future__ import annotations

import logging
import queue
import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Protocol

from flux2_studio.errors import StudioError
from flux2_studio.events import FINAL, Event, Failed, Notice, Preview, Queued, Status, Stopped
from flux2_studio.request import Request, changes

log = logging.getLogger(__name__)

PASSING = (Queued, Status, Preview)  # what a later event of the same kind makes worthless
KEPT = 200  # finished jobs that can still be asked for
DEFECT = (
    "Something went wrong inside the studio; its log has the details. Try again, and restart the studio if it "
    "happens twice."
)


class Runner(Protocol):
    """What a job queue needs of a studio."""

    def resolve(self, request: Request) -> Request: ...

    def generate(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]: ...


class Job:
    """One submitted run: its resolved request and the events it has had so far. Safe to use from any thread."""

    def __init__(self, request: Request, owner: str) -> None:
        self.id = uuid.uuid4().hex
        self.request = request
        self.owner = owner
        self._changed = threading.Condition()
        self._events: list[tuple[int, Event]] = []  # (number, event), numbers rising, old previews dropped
        self._next = 0
        self._started = False
        self._cancelled = False

    def add(self, event: Event) -> None:
        """Append an event and wake the followers; nothing after the last one. Of passing events the newest is kept."""
        with self._changed:
            if self.finished:  # whatever comes late (a place in the queue, say) would reopen it
                return
            passing = PASSING if isinstance(event, FINAL) else type(event)
            if isinstance(event, PASSING + FINAL):
                self._events = [(n, e) for n, e in self._events if not isinstance(e, passing)]
            self._events.append((self._next, event))
            self._next += 1
            self._changed.notify_all()

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
    def cancelled(self) -> bool:
        return self._cancelled

    @property
    def finished(self) -> bool:
        with self._changed:
            return bool(self._events) and isinstance(self._events[-1][1], FINAL)


class JobQueue:
    """Runs jobs one after another in a thread of its own."""

    def __init__(self, studio: Runner) -> None:
        self._studio = studio
        self._jobs: dict[str, Job] = {}
        self._waiting: list[Job] = []
        self._lock = threading.Lock()
        self._closed = False
        self._inbox: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work, name="flux2-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request, owner: str = "") -> Job:
        """Check and resolve `request`, and queue it. Raises `StudioError` at once for what cannot be done."""
        resolved = self._studio.resolve(request)
        job = Job(resolved, owner)
        for text in changes(request, resolved):
            job.add(Notice(text=text))
        with self._lock:
            if self._closed:
                raise StudioError("The studio is shutting down: start it again for further runs.")
            self._jobs[job.id] = job
            self._waiting.append(job)
            finished = [id_ for id_, other in self._jobs.items() if other.finished]
            for id_ in finished[: max(0, len(finished) - KEPT)]:
                del self._jobs[id_]
            self._tell_places()
            self._inbox.put(job)
        return job

    def get(self, id_: str, owner: str = "") -> Job | None:
        """The job called `id_` if it is `owner`'s and still known."""
        with self._lock:
            job = self._jobs.get(id_)
        return job if job is not None and job.owner == owner else None

    def close(self) -> None:
        """Cancel everything and end the worker."""
        with self._lock:
            self._closed = True
            for job in self._jobs.values():
                job.cancel()
        self._inbox.put(None)
        self._worker.join()

    def _tell_places(self) -> None:
        # The first is the running one; the rest wait for as many runs as stand before them.
        for ahead, job in enumerate(job for job in self._waiting if not job.finished):
            if ahead:
                job.add(Queued(ahead=ahead))

    def _work(self) -> None:
        while (job := self._inbox.get()) is not None:
            if job.start():
                self._run(job)
            with self._lock:
                self._waiting.remove(job)
                self._tell_places()

    def _run(self, job: Job) -> None:
        try:
            for event in self._studio.generate(job.request, lambda: job.cancelled):
                job.add(event)
            if not job.finished:  # its followers would wait for ever
                raise RuntimeError("the run ended without a final event")
        except StudioError as error:
            job.add(Failed(message=str(error)))
        except Exception:
            # A defect of ours: the log has it whole, the user reads what can be done.
            log.exception("run %s failed", job.id)
            job.add(Failed(message=DEFECT))
