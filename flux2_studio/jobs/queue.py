"""Runs belong to the server, not to the browser tab: a job goes on when nobody looks, and anyone may come back to it.

`submit` checks the request at once, so a mistake is told to the one who made it; a worker thread per device runs
the jobs, in the order of `scheduler.py`. A checkpoint that somebody has merely chosen is loaded when nothing else is to
be done. With a journal, runs belong to no process either: what a killed studio left is taken up by the next one.

Cancelling takes effect between two denoising steps. Of an owner's drafts only the newest goes on.
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

MAX_WAITING_PER_OWNER = 20  # runs of one owner that may wait
MAX_WAITING_RUNS = 100  # and of all
MAX_ENHANCE_JOBS = (
    8  # prompts that are enriched or wait for it, at most; each that another machine enriches is a thread
)
MAX_UNFINISHED_RUNS = 8  # runs that ended early and whose last previews can still be kept: they take memory
MAX_FINISHED_JOBS = 200  # finished jobs that can still be asked for
INTERNAL_ERROR_MESSAGE = (
    "Something went wrong inside the studio; its log has the details. Try again, and restart the studio if it "
    "happens twice."
)


class StudioProtocol(Protocol):
    """What a job queue needs of a studio."""

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
    """Where a job stands that is not done: `runs_ahead` runs go before it, `others_ahead` of them not its owner's."""

    job: Job
    runs_ahead: int
    others_ahead: int


class JobQueue:
    """Runs jobs one after another in a thread of its own.

    journal: where they are written down; history: where their pictures are remembered. None: nowhere.
    """

    def __init__(self, studio: StudioProtocol, journal: Journal | None = None, history: History | None = None) -> None:
        self._studio = studio
        self._journal = journal
        self._history = history
        self._jobs: dict[str, Job] = {}
        self._running: Task | None = None
        self._waiting: list[Job] = []  # oldest first
        self._pending_preload: PreloadTask | None = None
        self._loaded_checkpoint: str | None = None  # the checkpoint that is in memory; None where that is not known
        self._closed = False
        self._changed = threading.Condition()
        self._resume_lock = threading.Lock()
        self._worker = threading.Thread(target=self._work, name="flux2-worker", daemon=True)
        self._worker.start()

    def restore_waiting(self) -> None:
        """Queue again, in their order, the runs that waited when a studio of the same journal ended."""
        if self._journal is None:
            return
        for entry in self._journal.take_over_orphaned():
            self._queue(Job(entry.request, entry.owner, id_=entry.id, on_event=self._note))

    def submit(
        self, request: Request, owner: str = "", api_key: ApiKey | None = None, *, tab: str | None = None
    ) -> Job:
        """Check and resolve `request`, and queue it. Raises `StudioError` at once for what cannot be done.

        tab: who has prompts enriched in the place where this run shows what it has enriched; by default its owner.
        """
        self._check_capacity(owner)
        resolved = self._studio.resolve(request, api_key)
        job = Job(resolved, owner, api_key, on_event=self._note)
        self._cancel_drafts(owner)  # what is wanted goes before what was only tried
        if resolved.upsampling.by != "none":  # it shows what it writes in the same place
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
        except StudioError:  # it has filled up meanwhile
            self._journal.discard(job.id)
            raise
        return job

    def _check_capacity(self, owner: str) -> None:
        """Raises `StudioError` where `owner` has enough waiting, or all have."""
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
        """Have the journal write down what `event` says of `job`."""
        if self._journal is None or not job.is_persistent:
            return
        if self._closed and isinstance(event, Stopped):
            return  # nobody wanted it to: whoever opens the studio next goes on with it
        try:
            self._journal.record_event(job.id, event)
        except SaveError as error:
            self._warn(job, error)

    def _warn(self, job: Job, error: SaveError) -> None:
        """The run goes on, for its pictures have files of their own; but a new start may not know of them."""
        log.error("run %s is not written down: %s", job.id, error)
        job.add_event(Notice(text=f"Should the studio end, it will not know how far this run was. {error}"))

    def enhance_prompt(self, request: Request, owner: str = "", api_key: ApiKey | None = None) -> EnhanceJob:
        """Have the prompt of `request` enriched, in place of any other that `owner` has waiting for that. What another
        machine does for it waits for no run here."""
        job = EnhanceJob(self._studio.resolve(request, api_key), owner, api_key)
        with self._changed:
            for other in self._active_enhance_jobs(owner):
                other.cancel()
            if len(self._active_enhance_jobs()) - len(self._active_enhance_jobs(owner)) >= MAX_ENHANCE_JOBS:
                raise UpsampleError("Too many prompts are being enriched at the moment: try again in a minute.")
            if request.upsampling.by == "local":
                self._queue(job)
                return job
            self._admit(job)
        if job.start():
            threading.Thread(target=self._run, args=(job,), name="flux2-enriching", daemon=True).start()
        return job

    def draft(self, request: Request, owner: str = "") -> DraftJob:
        """Have `request` drawn once for a look, in place of any other draft of `owner`. What is wrong with it the draft
        tells: nobody should wait here until its references are read. Raises `StudioError` where there is no room."""
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
        """Those of `owner`, or all, that are not done."""
        found = [job for job in self._jobs.values() if isinstance(job, EnhanceJob) and not job.finished]
        return [job for job in found if owner in (None, job.owner)]

    def _queue(self, job: Job, check: Callable[[str], None] = lambda owner: None) -> None:
        """Let `job` wait, if `check` of its owner raises nothing then."""
        with self._changed:
            check(job.owner)
            self._admit(job)
            self._waiting.append(job)
            if isinstance(self._running, PreloadTask) and self._running.checkpoint != job.request.checkpoint:
                self._running.cancel()  # a run goes first
            self._report_positions()
            self._changed.notify_all()

    def _admit(self, job: Job) -> None:
        """Let `job` be asked for by its name. Raises `StudioError` once the queue is closed."""
        if self._closed:
            raise StudioError("The studio is shutting down: start it again for further runs.")
        if isinstance(job, DraftJob):
            return  # whoever had it made holds it
        self._jobs[job.id] = job
        finished = [id_ for id_, other in self._jobs.items() if other.finished]
        for id_ in finished[: max(0, len(finished) - MAX_FINISHED_JOBS)]:
            del self._jobs[id_]

    def preload(self, checkpoint: str, owner: str = "") -> PreloadTask:
        """Have `checkpoint` loaded as soon as no run is to be done. Whatever was to be prepared before is not."""
        wanted = PreloadTask(checkpoint, owner)
        with self._changed:
            for earlier in (self._pending_preload, self._running):
                if isinstance(earlier, PreloadTask):
                    if earlier.checkpoint == checkpoint and not earlier.cancelled:
                        return earlier
                    earlier.cancel()
            self._pending_preload = None
            if self._loaded_checkpoint == checkpoint and not self._closed:
                wanted.add_event(Ready(checkpoint=checkpoint))
                return wanted
            if self._closed:
                wanted.cancel()
            elif isinstance(self._running, Job):
                wanted.add_event(Queued(runs_ahead=1 + len(self._waiting)))
            self._pending_preload = wanted
            self._changed.notify_all()
        return wanted

    def get(self, id_: str, owner: str = "") -> Job | None:
        """The job called `id_` if it is `owner`'s and still known."""
        with self._changed:
            job = self._jobs.get(id_)
        return job if job is not None and job.owner == owner else None

    def save_previews(self, id_: str, owner: str) -> SavedPreview:
        """Save the previews with which `owner`'s run `id_` ended before it was done. Raises `StudioError`."""
        job = self.get(id_, owner)
        if job is None or not job.finished:
            raise StudioError(PREVIEW_GONE_MESSAGE)
        return job.unfinished.save_all(self._studio, partial(self._try_add_to_history, job))

    # --- an owner's runs ----------------------------------------------------------------------------------------

    def queue_positions(self, owner: str) -> tuple[QueuePosition, ...]:
        """The runs of `owner` that are not done, in the order in which they are taken, the one under way first."""
        with self._changed:
            running = [self._running] if isinstance(self._running, Job) else []
            left = [job for job in self._waiting if not job.finished]
            ahead = [*running, *scheduler.predict_order(left, self._next_loaded_checkpoint)]
        found, others = [], 0
        for place, job in enumerate(ahead):
            if job.owner != owner:
                others += 1
            elif job.is_persistent and not job.finished:
                found.append(QueuePosition(job=job, runs_ahead=place, others_ahead=others))
        return tuple(found)

    def move(self, id_: str, owner: str, *, later: bool) -> None:
        """Have the waiting run `id_` of `owner` change places with their one before it or, `later`, after it."""
        with self._changed:
            waiting = [job for job in self._waiting if not job.finished]
            job = next((job for job in waiting if job.id == id_ and job.owner == owner), None)
            if job is None or not scheduler.move_run(waiting, job, self._next_loaded_checkpoint, later=later):
                return
            self._waiting = waiting
            self._report_positions()
            self._changed.notify_all()
            arranged = [job.id for job in waiting if job.is_persistent]
        if self._journal is not None:
            self._journal.reorder(arranged)

    def interrupted(self, owner: str) -> tuple[JournalEntry, ...]:
        """The runs of `owner` that an earlier studio left undone."""
        return () if self._journal is None else self._journal.interrupted(owner)

    def resume_interrupted(self, id_: str, owner: str) -> Job:
        """Queue what is left to do of the interrupted run `id_` of `owner`. Raises `StudioError`."""
        with self._resume_lock:
            entry = None if self._journal is None else self._journal.entry(id_, owner)
            if self._journal is None or entry is None or entry.state != "interrupted":
                raise StudioError("This run is not there any more: load the page again to see what is.")
            job = self.submit(entry.remaining_request(), owner)
            self._journal.discard(id_)
        return job

    def discard(self, id_: str, owner: str) -> None:
        """Forget the interrupted run `id_` of `owner`."""
        with self._resume_lock:
            entry = None if self._journal is None else self._journal.entry(id_, owner)
            if self._journal is not None and entry is not None and entry.state == "interrupted":
                self._journal.discard(id_)

    def latest_unseen(self, owner: str) -> JournalEntry | None:
        """The run of `owner` that ended last, if its end has not been shown."""
        return None if self._journal is None else self._journal.latest_unseen(owner)

    def mark_seen(self, id_: str) -> None:
        """The owner of the run `id_` was shown how it ended."""
        if self._journal is not None:
            try:
                self._journal.mark_seen(id_)
            except SaveError as error:  # so it will be shown once more, which does no harm
                log.error("the end of run %s is not marked as shown: %s", id_, error)

    @property
    def closed(self) -> bool:
        """Whether it takes no more runs, for the studio ends."""
        return self._closed

    def close(self) -> None:
        """Cancel everything and end the worker."""
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
        """Tell every waiting run how many go before it, in the order in which they will be taken."""
        running = self._running
        replaced = isinstance(running, DraftJob) and running.cancelled  # it makes room at its next step
        ahead = int(isinstance(running, Job) and not replaced)
        left = [job for job in self._waiting if not job.finished]
        for place, job in enumerate(scheduler.predict_order(left, self._next_loaded_checkpoint), start=ahead):
            if place:
                job.add_event(Queued(runs_ahead=place))

    def _next_task(self) -> Task | None:
        """What to do next, waiting for it; None once the queue is closed."""
        with self._changed:
            while True:
                self._waiting = [job for job in self._waiting if not job.finished]
                if self._waiting:
                    job = scheduler.take_next(self._waiting, self._loaded_checkpoint)
                    self._running = job
                    if job.checkpoint_after != self._loaded_checkpoint or job.request.upsampling.by == "local":
                        self._loaded_checkpoint = (
                            None  # until the run shows that its own is: a language model may take its place
                        )
                    self._report_positions()
                    return job
                if self._closed:
                    return None
                if self._pending_preload is not None:
                    if self._pending_preload.checkpoint != self._loaded_checkpoint:
                        self._loaded_checkpoint = None  # it makes room for the other
                    self._running, self._pending_preload = self._pending_preload, None
                    return self._running
                self._changed.wait()

    @property
    def _next_loaded_checkpoint(self) -> str | None:
        """The checkpoint that is in memory once the run under way is done."""
        return self._running.checkpoint_after if isinstance(self._running, Job) else self._loaded_checkpoint

    def _update_loaded_checkpoint(self, task: Task, event: Event) -> None:
        """Note what `event` says of the checkpoint in memory: after a failure nobody knows which one is."""
        with self._changed:
            if task is not self._running or not isinstance(task, Job | PreloadTask):  # it is done on another machine
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
                if isinstance(event, Saved):  # before anybody is told: whoever looks then finds it
                    self._add_to_history(task, event)
                self._update_loaded_checkpoint(task, event)
                task.add_event(event)
            if not task.finished:  # its followers would wait for ever
                raise RuntimeError("the run ended without a final event")
        except StudioError as error:
            self._fail(task, Failed(message=str(error), in_prompt_enhancement=isinstance(error, UpsampleError)))
        except Exception:
            # A defect of ours: the log has it whole, the user reads what can be done.
            log.exception("run %s failed", task.id)
            self._fail(task, Failed(message=INTERNAL_ERROR_MESSAGE))

    def _fail(self, task: Task, event: Failed) -> None:
        self._update_loaded_checkpoint(task, event)
        task.add_event(event)

    def _add_to_history(self, task: Task, saved: Saved) -> None:
        """Put the picture into the history. Where that fails, it is on disk all the same, and the run goes on."""
        if (trouble := self._try_add_to_history(task, saved)) is not None:
            task.add_event(Notice(text=trouble))

    def _try_add_to_history(self, task: Task, saved: Saved) -> str | None:
        """Put the picture into the history; why it is not there, if it is not."""
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
