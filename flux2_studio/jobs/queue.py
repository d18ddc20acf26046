"""The job queue: runs belong to the server, not to a browser tab. A job continues without followers, and its owner can
come back to it.

`submit` checks the request at once, so the caller gets its errors. One worker thread runs the jobs in the order of
`scheduler.py`, and preloads a chosen checkpoint while no run waits. With a journal, a restarted studio takes over the
waiting runs.

Cancelling takes effect between two denoising steps. A new draft cancels its owner's earlier ones.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from flux2_studio.errors import SaveError, StudioError, UpsampleError
from flux2_studio.events import Drafted, Event, Failed, Notice, Preview, Queued, Ready, Result, Saved, Stopped
from flux2_studio.jobs import scheduler
from flux2_studio.jobs.journal import Journal, JournalEntry
from flux2_studio.jobs.tasks import DraftJob, EnhanceJob, Job, PreloadTask, Task
from flux2_studio.jobs.unfinished import PREVIEW_GONE_MESSAGE, SavedPreview
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.request import Request, describe_changes
from flux2_studio.storage.history import History

log = logging.getLogger(__name__)

MAX_WAITING_PER_OWNER = 20  # waiting runs of one owner
MAX_WAITING_RUNS = 100  # waiting runs of all owners
MAX_ENHANCE_JOBS = 8  # unfinished prompt enhancements; each one with a remote model has its own thread
MAX_UNFINISHED_RUNS = 8  # ended runs whose unfinished pictures stay in memory
MAX_FINISHED_JOBS = 200  # finished jobs that `get` still returns
INTERNAL_ERROR_MESSAGE = (
    "Something went wrong inside the studio; its log has the details. Try again, and restart the studio if it "
    "happens twice."
)


class StudioProtocol(Protocol):
    """What the job queue needs of a studio."""

    def resolve(self, request: Request, api_key: ApiKey | None = None) -> Request: ...

    def generate(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]: ...

    def enhance_prompt(
        self, request: Request, cancelled: Callable[[], bool], api_key: ApiKey | None = None
    ) -> Iterator[Event]: ...

    def draft(self, request: Request, cancelled: Callable[[], bool]) -> Iterator[Event]: ...

    def preload(self, name: str, cancelled: Callable[[], bool]) -> Iterator[Event]: ...

    def save_preview(self, unfinished: Any) -> tuple[Saved, tuple[str, ...]]: ...


@dataclass(frozen=True, kw_only=True)
class QueuePosition:
    """The position of an unfinished job: `runs_ahead` runs go before it, `others_ahead` of them of other owners."""

    job: Job
    runs_ahead: int
    others_ahead: int


class JobQueue:
    """Runs jobs one after another in a worker thread.

    journal: records the runs; history: records their pictures. None: not recorded.
    """

    def __init__(self, studio: StudioProtocol, journal: Journal | None = None, history: History | None = None) -> None:
        self._studio = studio
        self._journal = journal
        self._history = history
        self._jobs: dict[str, Job] = {}
        self._running: Task | None = None
        self._waiting: list[Job] = []  # oldest first
        self._pending_preload: PreloadTask | None = None
        self._loaded_checkpoint: str | None = None  # None if unknown
        self._closed = False
        self._changed = threading.Condition()
        self._resume_lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="flux2-worker", daemon=True)
        self._worker.start()

    def restore_waiting(self) -> None:
        """Queue, in their order, the runs that were waiting when an earlier studio with the same journal ended."""
        if self._journal is None:
            return
        for entry in self._journal.take_over_orphaned():
            self._queue(Job(entry.request, entry.owner, id_=entry.id, on_event=self._note))

    def submit(
        self, request: Request, owner: str = "", api_key: ApiKey | None = None, *, tab: str | None = None
    ) -> Job:
        """Check and resolve `request`, and queue it. Raises `StudioError` at once if that is not possible.

        tab: the owner of the page's separate prompt enhancements (`enhance_prompt`), by default `owner`. They are
        cancelled if this run enhances its prompt too.
        """
        self._check_capacity(owner)
        resolved = self._studio.resolve(request, api_key)
        job = Job(resolved, owner, api_key, on_event=self._note)
        self._cancel_drafts(owner)  # runs take precedence over drafts
        if resolved.upsampling.by != "none":  # the page shows both texts in the same place
            with self._changed:
                for other in self._active_enhance_jobs(owner if tab is None else tab):
                    other.cancel()
        for text in describe_changes(request, resolved):
            job.add_event(Notice(text=text))
        if self._journal is None:
            self._queue(job, self._check_capacity)
            return job
        keyed = api_key is not None and resolved.upsampling.by == "openrouter"
        job.request = self._journal.add(job.id, owner, resolved, keyed=keyed)
        try:
            self._queue(job, self._check_capacity)
        except StudioError:  # the queue has filled up meanwhile
            self._journal.discard(job.id)
            raise
        return job

    def _check_capacity(self, owner: str) -> None:
        """Raises `StudioError` if `owner`, or all owners together, have too many runs waiting."""
        with self._changed:
            waiting = [job for job in self._waiting if not job.finished and not isinstance(job, EnhanceJob)]
        if sum(job.owner == owner and job.is_persistent for job in waiting) >= MAX_WAITING_PER_OWNER:
            raise StudioError(
                f"{MAX_WAITING_PER_OWNER} runs of yours are waiting, and more cannot: take one off the queue, or try "
                "again when "
                f"one is done."
            )
        if len(waiting) >= MAX_WAITING_RUNS:
            raise StudioError(
                f"{MAX_WAITING_RUNS} runs of all who use this studio are waiting, and more cannot: try again in a few "
                f"minutes."
            )

    def _note(self, job: Job, event: Event) -> None:
        """Record `event` of `job` in the journal."""
        if self._journal is None or not job.is_persistent:
            return
        if self._closed and isinstance(event, Stopped):
            return  # stopped by `close`, not by its owner: the next studio takes it over
        try:
            self._journal.record_event(job.id, event)
        except SaveError as error:
            self._warn(job, error)

    def _warn(self, job: Job, error: SaveError) -> None:
        """Log that the journal failed and add a Notice. The run continues: its pictures are files of their own."""
        log.error("run %s is not written down: %s", job.id, error)
        job.add_event(Notice(text=f"Should the studio end, it will not know how far this run was. {error}"))

    def enhance_prompt(self, request: Request, owner: str = "", api_key: ApiKey | None = None) -> EnhanceJob:
        """Enhance the prompt of `request`, cancelling earlier enhancements of `owner`. With a remote model it starts at
        once; only a local one waits in the queue."""
        job = EnhanceJob(self._studio.resolve(request, api_key), owner, api_key)
        with self._changed:
            for other in self._active_enhance_jobs(owner):
                other.cancel()
            if len(self._active_enhance_jobs()) - len(self._active_enhance_jobs(owner)) >= MAX_ENHANCE_JOBS:
                raise UpsampleError("Too many prompts are being enhanced at the moment: try again in a minute.")
            if request.upsampling.by == "local":
                self._queue(job)
                return job
            self._admit(job)
        if job.start():
            threading.Thread(target=self._run, args=(job,), name="flux2-enhancing", daemon=True).start()
        return job

    def draft(self, request: Request, owner: str = "") -> DraftJob:
        """Draw `request` once as a quick preview, cancelling earlier drafts of `owner`. Errors of the request arrive as
        events, because checking it here would wait for its references. Raises `StudioError` if the queue is full."""
        draft = DraftJob(request, owner)
        with self._changed:
            self._cancel_drafts(owner)
            self._queue(draft, self._check_capacity)
        return draft

    def _cancel_drafts(self, owner: str) -> None:
        with self._changed:
            for job in (*self._waiting, self._running):
                if isinstance(job, DraftJob) and job.owner == owner:
                    job.cancel()

    def _active_enhance_jobs(self, owner: str | None = None) -> list[Job]:
        """Return the unfinished enhancements of `owner`, or of everyone."""
        jobs = [job for job in self._jobs.values() if isinstance(job, EnhanceJob) and not job.finished]
        return [job for job in jobs if owner in (None, job.owner)]

    def _queue(self, job: Job, check: Callable[[str], None] = lambda owner: None) -> None:
        """Append `job` to the waiting runs, unless `check(job.owner)` raises."""
        with self._changed:
            check(job.owner)
            self._admit(job)
            self._waiting.append(job)
            if isinstance(self._running, PreloadTask) and self._running.checkpoint != job.request.checkpoint:
                self._running.cancel()  # runs take precedence over preloads
            self._report_positions()
            self._changed.notify_all()

    def _admit(self, job: Job) -> None:
        """Make `job` available to `get`. Raises `StudioError` once the queue is closed."""
        if self._closed:
            raise StudioError("The studio is shutting down: start it again for further runs.")
        if isinstance(job, DraftJob):
            return  # only the caller of `draft` needs it
        self._jobs[job.id] = job
        finished = [id_ for id_, other in self._jobs.items() if other.finished]
        for id_ in finished[: max(0, len(finished) - MAX_FINISHED_JOBS)]:
            del self._jobs[id_]

    def preload(self, checkpoint: str, owner: str = "") -> PreloadTask:
        """Load `checkpoint` as soon as no run waits. Replaces an earlier preload."""
        task = PreloadTask(checkpoint, owner)
        with self._changed:
            for earlier in (self._pending_preload, self._running):
                if isinstance(earlier, PreloadTask):
                    if earlier.checkpoint == checkpoint and not earlier.cancelled:
                        return earlier
                    earlier.cancel()
            self._pending_preload = None
            if self._loaded_checkpoint == checkpoint and not self._closed:
                task.add_event(Ready(checkpoint=checkpoint))
                return task
            if self._closed:
                task.cancel()
            elif isinstance(self._running, Job):
                task.add_event(Queued(runs_ahead=1 + len(self._waiting)))
            self._pending_preload = task
            self._changed.notify_all()
        return task

    def get(self, id_: str, owner: str = "") -> Job | None:
        """Return job `id_` if it belongs to `owner` and is still known."""
        with self._changed:
            job = self._jobs.get(id_)
        return job if job is not None and job.owner == owner else None

    def save_previews(self, id_: str, owner: str) -> SavedPreview:
        """Save the last previews of `owner`'s run `id_`, which ended early. Raises `StudioError`."""
        job = self.get(id_, owner)
        if job is None or not job.finished:
            raise StudioError(PREVIEW_GONE_MESSAGE)
        return job.unfinished.save_all(self._studio, partial(self._try_add_to_history, job))

    # --- an owner's runs ----------------------------------------------------------------------------------------

    def queue_positions(self, owner: str) -> tuple[QueuePosition, ...]:
        """Return the unfinished runs of `owner` in the order of execution, the running one first."""
        with self._changed:
            running = [self._running] if isinstance(self._running, Job) else []
            waiting = [job for job in self._waiting if not job.finished]
            ordered = [*running, *scheduler.predict_order(waiting, self._next_loaded_checkpoint)]
        positions, others_ahead = [], 0
        for index, job in enumerate(ordered):
            if job.owner != owner:
                others_ahead += 1
            elif job.is_persistent and not job.finished:
                positions.append(QueuePosition(job=job, runs_ahead=index, others_ahead=others_ahead))
        return tuple(positions)

    def move(self, id_: str, owner: str, *, later: bool) -> None:
        """Swap the waiting run `id_` of `owner` with their run before it or, with `later`, after it."""
        with self._changed:
            waiting = [job for job in self._waiting if not job.finished]
            job = next((job for job in waiting if job.id == id_ and job.owner == owner), None)
            if job is None or not scheduler.move_run(waiting, job, self._next_loaded_checkpoint, later=later):
                return
            self._waiting = waiting
            self._report_positions()
            self._changed.notify_all()
            order = [job.id for job in waiting if job.is_persistent]
        if self._journal is not None:
            self._journal.reorder(order)

    def interrupted(self, owner: str) -> tuple[JournalEntry, ...]:
        """Return the runs of `owner` that an earlier studio did not finish."""
        return () if self._journal is None else self._journal.interrupted(owner)

    def resume_interrupted(self, id_: str, owner: str) -> Job:
        """Queue the rest of the interrupted run `id_` of `owner`. Raises `StudioError`."""
        with self._resume_lock:
            entry = None if self._journal is None else self._journal.entry(id_, owner)
            if self._journal is None or entry is None or entry.state != "interrupted":
                raise StudioError("This run is not there any more: load the page again to see what is.")
            job = self.submit(entry.remaining_request(), owner)
            self._journal.discard(id_)
        return job

    def discard(self, id_: str, owner: str) -> None:
        """Delete the interrupted run `id_` of `owner` from the journal."""
        with self._resume_lock:
            entry = None if self._journal is None else self._journal.entry(id_, owner)
            if self._journal is not None and entry is not None and entry.state == "interrupted":
                self._journal.discard(id_)

    def latest_unseen(self, owner: str) -> JournalEntry | None:
        """Return the run of `owner` that ended last, if its end has not been shown."""
        return None if self._journal is None else self._journal.latest_unseen(owner)

    def mark_seen(self, id_: str) -> None:
        """Record that the owner of run `id_` was shown how it ended."""
        if self._journal is not None:
            try:
                self._journal.mark_seen(id_)
            except SaveError as error:  # harmless: it will be shown once more
                log.error("the end of run %s is not marked as shown: %s", id_, error)

    @property
    def closed(self) -> bool:
        """Whether the queue is closed, because the studio is ending."""
        return self._closed

    def close(self) -> None:
        """Cancel everything, end the worker and close the journal."""
        with self._changed:
            self._closed = True
            for task in (*self._jobs.values(), *self._waiting, self._pending_preload, self._running):
                if task is not None:
                    task.cancel()
            self._changed.notify_all()
        self._worker.join()
        if self._journal is not None:
            self._journal.close()

    def _report_positions(self) -> None:
        """Send every waiting run the number of runs before it, in the predicted order."""
        running = self._running
        is_ending = isinstance(running, DraftJob) and running.cancelled  # it ends at its next step
        start = int(isinstance(running, Job) and not is_ending)
        waiting = [job for job in self._waiting if not job.finished]
        for position, job in enumerate(scheduler.predict_order(waiting, self._next_loaded_checkpoint), start=start):
            if position:
                job.add_event(Queued(runs_ahead=position))

    def _next_task(self) -> Task | None:
        """Wait for the next task and return it; None once the queue is closed."""
        with self._changed:
            while True:
                self._waiting = [job for job in self._waiting if not job.finished]
                if self._waiting:
                    job = scheduler.take_next(self._waiting, self._loaded_checkpoint)
                    self._running = job
                    if job.checkpoint_after != self._loaded_checkpoint or job.request.upsampling.by == "local":
                        # Unknown until the run reports progress: a language model may evict the checkpoint.
                        self._loaded_checkpoint = None
                    self._report_positions()
                    return job
                if self._closed:
                    return None
                if self._pending_preload is not None:
                    if self._pending_preload.checkpoint != self._loaded_checkpoint:
                        self._loaded_checkpoint = None  # evicted by the preload
                    self._running, self._pending_preload = self._pending_preload, None
                    return self._running
                self._changed.wait()

    @property
    def _next_loaded_checkpoint(self) -> str | None:
        """The checkpoint in memory after the current run."""
        return self._running.checkpoint_after if isinstance(self._running, Job) else self._loaded_checkpoint

    def _update_loaded_checkpoint(self, task: Task, event: Event) -> None:
        """Update the loaded checkpoint from an event; after a failure it is unknown."""
        with self._changed:
            if task is not self._running or not isinstance(task, Job | PreloadTask):  # enhanced on another machine
                return
            if isinstance(event, Preview | Drafted | Result | Ready):
                self._loaded_checkpoint = task.checkpoint_after
            elif isinstance(event, Failed):
                self._loaded_checkpoint = None

    def _work(self) -> None:
        while (task := self._next_task()) is not None:
            if task.start():
                self._run(task)
            with self._changed:
                self._running = None
                self._report_positions()
                unfinished = [job for job in self._jobs.values() if job.finished and job.unfinished]
            for job in unfinished[: max(0, len(unfinished) - MAX_UNFINISHED_RUNS)]:
                job.unfinished.take_all()

    def _run(self, task: Task) -> None:
        if isinstance(task, Job):
            self._begin(task)
        try:
            for event in self._events(task):
                if isinstance(event, Saved):  # before the event, so that followers find it in the history
                    self._add_to_history(task, event)
                self._update_loaded_checkpoint(task, event)
                task.add_event(event)
            if not task.finished:  # else its followers would wait forever
                raise RuntimeError("the run ended without a final event")
        except StudioError as error:
            self._fail(task, Failed(message=str(error), in_prompt_enhancement=isinstance(error, UpsampleError)))
        except Exception:
            # A bug: the log gets the traceback, the user a message.
            log.exception("run %s failed", task.id)
            self._fail(task, Failed(message=INTERNAL_ERROR_MESSAGE))

    def _fail(self, task: Task, event: Failed) -> None:
        self._update_loaded_checkpoint(task, event)
        try:
            task.add_event(event)
        except Exception:
            # The journal itself fails. The worker must go on, and the followers must not wait forever.
            log.exception("the end of run %s is not in the journal", task.id)
            Task.add_event(task, event)

    def _add_to_history(self, task: Task, saved: Saved) -> None:
        """Add the picture to the history. If that fails, the file still exists and the run continues with a Notice."""
        if (problem := self._try_add_to_history(task, saved)) is not None:
            task.add_event(Notice(text=problem))

    def _try_add_to_history(self, task: Task, saved: Saved) -> str | None:
        """Add the picture to the history; return an error message, or None."""
        try:
            if self._history is not None:
                self._history.add(task.owner, task.id, saved)
        except SaveError as error:
            return f"The picture is saved as {saved.image.name}, but is not in History. {error}"
        return None

    def _begin(self, job: Job) -> None:
        if self._journal is not None and job.is_persistent:
            try:
                self._journal.start(job.id)
            except SaveError as error:
                self._warn(job, error)

    def _events(self, task: Task) -> Iterator[Event]:
        if isinstance(task, EnhanceJob):
            yield from self._studio.enhance_prompt(task.request, lambda: task.cancelled, task.api_key)
        elif isinstance(task, DraftJob):
            yield from self._studio.draft(task.request, lambda: task.cancelled)
        elif isinstance(task, Job):
            yield from self._studio.generate(task.request, lambda: task.cancelled, task.api_key)
        elif isinstance(task, PreloadTask):
            yield from self._studio.preload(task.checkpoint, lambda: task.cancelled)
