"""Runs belong to the server, not to the browser tab: a job goes on when nobody looks, and anyone may come back to it.

`submit` checks the request at once, so a mistake is told to the one who made it; a worker thread per device runs
the jobs. It takes the oldest first, but prefers the checkpoint that is loaded, as long as nobody is passed over more
than a few times: users of two checkpoints do not have them swapped after every picture. A checkpoint that somebody has
merely chosen is loaded when nothing else is to be done.

A follower reads `job.events(since)`; it may be slower than the run, so of previews and the like only the newest is
kept. Cancelling takes effect between two denoising steps.
"""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from flux2_studio.errors import SaveError, StudioError, UpsampleError
from flux2_studio.events import FINAL, Event, Failed, Notice, Preview, Queued, Ready, Saved, Status, Stopped, Writing
from flux2_studio.outputs.history import History
from flux2_studio.request import Request, changes
from flux2_studio.upsample import ApiKey

log = logging.getLogger(__name__)

PASSING = (Queued, Status, Writing, Preview)  # what a later event of the same kind makes worthless
PASSED = 3  # runs of the loaded checkpoint that may go before an older one of another
ENRICHMENTS = 8  # prompts that are enriched or wait for it, at most; each that another machine enriches is a thread
KEPT = 200  # finished jobs that can still be asked for
DEFECT = (
    "Something went wrong inside the studio; its log has the details. Try again, and restart the studio if it "
    "happens twice."
)


class Runner(Protocol):
    """What a job queue needs of a studio."""

    def resolve(self, request: Request, key: ApiKey | None = None) -> Request: ...

    def generate(
        self, request: Request, cancelled: Callable[[], bool], key: ApiKey | None = None
    ) -> Iterator[Event]: ...

    def enrich(self, request: Request, cancelled: Callable[[], bool], key: ApiKey | None = None) -> Iterator[Event]: ...

    def prepare(self, name: str, cancelled: Callable[[], bool]) -> Iterator[Event]: ...


class Task:
    """Something that the worker does, and the events it has had so far. Safe to use from any thread."""

    def __init__(self, owner: str) -> None:
        self.id = uuid.uuid4().hex
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


class Job(Task):
    """One submitted run, with its resolved request. key: its owner's, for the server that enriches prompts; forgotten
    when the run has ended."""

    def __init__(self, request: Request, owner: str, key: ApiKey | None = None) -> None:
        super().__init__(owner)
        self.request = request
        self.key = key
        self.passed = 0  # how many younger runs were taken before it

    def add(self, event: Event) -> None:
        super().add(event)
        if isinstance(event, FINAL):
            self.key = None


class Enrichment(Job):
    """Having a prompt enriched, and nothing drawn."""


class Preparation(Task):
    """Loading a checkpoint before it is needed."""

    def __init__(self, checkpoint: str, owner: str) -> None:
        super().__init__(owner)
        self.checkpoint = checkpoint


class JobQueue:
    """Runs jobs one after another in a thread of its own. history: where their pictures are remembered, if anywhere."""

    def __init__(self, studio: Runner, history: History | None = None) -> None:
        self._studio = studio
        self._history = history
        self._jobs: dict[str, Job] = {}
        self._running: Task | None = None
        self._waiting: list[Job] = []  # oldest first
        self._wanted: Preparation | None = None
        self._loaded: str | None = None  # the checkpoint that ran, or was loaded, last
        self._closed = False
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="flux2-worker", daemon=True)
        self._worker.start()

    def submit(self, request: Request, owner: str = "", key: ApiKey | None = None) -> Job:
        """Check and resolve `request`, and queue it. Raises `StudioError` at once for what cannot be done."""
        resolved = self._studio.resolve(request, key)
        job = Job(resolved, owner, key)
        if resolved.upsampling.by != "none":  # it shows what it writes in the same place
            with self._changed:
                for other in self._enrichments(owner):
                    other.cancel()
        for text in changes(request, resolved):
            job.add(Notice(text=text))
        self._queue(job)
        return job

    def enrich(self, request: Request, owner: str = "", key: ApiKey | None = None) -> Enrichment:
        """Have the prompt of `request` enriched, in place of any other that `owner` has waiting for that. What another
        machine does for it waits for no run here."""
        job = Enrichment(self._studio.resolve(request, key), owner, key)
        with self._changed:
            for other in self._enrichments(owner):
                other.cancel()
            if len(self._enrichments()) - len(self._enrichments(owner)) >= ENRICHMENTS:
                raise UpsampleError("Too many prompts are being enriched at the moment: try again in a minute.")
            if request.upsampling.by == "local":
                self._queue(job)
                return job
            self._admit(job)
        if job.start():
            threading.Thread(target=self._run, args=(job,), name="flux2-enriching", daemon=True).start()
        return job

    def _enrichments(self, owner: str | None = None) -> list[Job]:
        """Those of `owner`, or all, that are not done."""
        found = [job for job in self._jobs.values() if isinstance(job, Enrichment) and not job.finished]
        return [job for job in found if owner in (None, job.owner)]

    def _queue(self, job: Job) -> None:
        with self._changed:
            self._admit(job)
            self._waiting.append(job)
            if isinstance(self._running, Preparation) and self._running.checkpoint != job.request.checkpoint:
                self._running.cancel()  # a run goes first
            self._tell_places()
            self._changed.notify_all()

    def _admit(self, job: Job) -> None:
        """Let `job` be asked for by its name. Raises `StudioError` once the queue is closed."""
        if self._closed:
            raise StudioError("The studio is shutting down: start it again for further runs.")
        self._jobs[job.id] = job
        finished = [id_ for id_, other in self._jobs.items() if other.finished]
        for id_ in finished[: max(0, len(finished) - KEPT)]:
            del self._jobs[id_]

    def prepare(self, checkpoint: str, owner: str = "") -> Preparation:
        """Have `checkpoint` loaded as soon as no run is to be done. Whatever was to be prepared before is not."""
        wanted = Preparation(checkpoint, owner)
        with self._changed:
            if self._loaded == checkpoint and not self._closed:
                wanted.add(Ready(checkpoint=checkpoint))
                return wanted
            for earlier in (self._wanted, self._running):
                if isinstance(earlier, Preparation):
                    if earlier.checkpoint == checkpoint and not earlier.cancelled:
                        return earlier
                    earlier.cancel()
            if self._closed:
                wanted.cancel()
            elif isinstance(self._running, Job):
                wanted.add(Queued(ahead=1 + len(self._waiting)))
            self._wanted = wanted
            self._changed.notify_all()
        return wanted

    def get(self, id_: str, owner: str = "") -> Job | None:
        """The job called `id_` if it is `owner`'s and still known."""
        with self._changed:
            job = self._jobs.get(id_)
        return job if job is not None and job.owner == owner else None

    def close(self) -> None:
        """Cancel everything and end the worker."""
        with self._changed:
            self._closed = True
            for task in (*self._jobs.values(), self._wanted, self._running):
                if task is not None:
                    task.cancel()
            self._changed.notify_all()
        self._worker.join()

    def _tell_places(self) -> None:
        """Tell every waiting run how many go before it, in the order in which they will be taken."""
        ahead = int(isinstance(self._running, Job))
        left = [job for job in self._waiting if not job.finished]
        passed = {job: job.passed for job in left}
        loaded = self._loaded
        while left:
            job = _pick(left, loaded, passed)
            left.remove(job)
            loaded = None if isinstance(job, Enrichment) else job.request.checkpoint
            if ahead:
                job.add(Queued(ahead=ahead))
            ahead += 1

    def _take(self) -> Task | None:
        """What to do next, waiting for it; None once the queue is closed."""
        with self._changed:
            while True:
                self._waiting = [job for job in self._waiting if not job.finished]
                if self._waiting:
                    passed = {job: job.passed for job in self._waiting}
                    job = _pick(self._waiting, self._loaded, passed)
                    for other, times in passed.items():
                        other.passed = times
                    self._waiting.remove(job)
                    self._running = job
                    # A language model that writes may have taken the place of whatever was loaded.
                    self._loaded = None if isinstance(job, Enrichment) else job.request.checkpoint
                    self._tell_places()
                    return job
                if self._closed:
                    return None
                if self._wanted is not None:
                    self._running, self._wanted = self._wanted, None
                    return self._running
                self._changed.wait()

    def _work(self) -> None:
        while (task := self._take()) is not None:
            if task.start():
                self._run(task)
            with self._changed:
                self._running = None
                self._tell_places()

    def _run(self, task: Task) -> None:
        try:
            for event in self._events(task):
                if isinstance(event, Saved):  # before anybody is told: whoever looks then finds it
                    self._remember(task, event)
                task.add(event)
            if not task.finished:  # its followers would wait for ever
                raise RuntimeError("the run ended without a final event")
        except StudioError as error:
            task.add(Failed(message=str(error), upsampling=isinstance(error, UpsampleError)))
        except Exception:
            # A defect of ours: the log has it whole, the user reads what can be done.
            log.exception("run %s failed", task.id)
            task.add(Failed(message=DEFECT))

    def _remember(self, task: Task, saved: Saved) -> None:
        """Put the picture into the history. Where that fails, it is on disk all the same, and the run goes on."""
        if self._history is None:
            return
        try:
            self._history.add(task.owner, task.id, saved)
        except SaveError as error:
            task.add(Notice(text=f"The picture is saved as {saved.image.name}, but is not in History. {error}"))

    def _events(self, task: Task) -> Iterator[Event]:
        if isinstance(task, Enrichment):
            yield from self._studio.enrich(task.request, lambda: task.cancelled, task.key)
        elif isinstance(task, Job):
            yield from self._studio.generate(task.request, lambda: task.cancelled, task.key)
        elif isinstance(task, Preparation):
            yield from self._studio.prepare(task.checkpoint, lambda: task.cancelled)
            with self._changed:
                self._loaded = task.checkpoint


def _pick(waiting: Sequence[Job], loaded: str | None, passed: dict[Job, int]) -> Job:
    """The one of `waiting`, oldest first, to run now; counts in `passed` which older ones it goes before."""
    chosen = waiting[0]
    if passed[chosen] < PASSED:
        chosen = next((job for job in waiting if job.request.checkpoint == loaded), chosen)
    for older in waiting[: waiting.index(chosen)]:
        passed[older] += 1
    return chosen
