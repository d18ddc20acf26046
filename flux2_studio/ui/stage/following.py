"""What a tab follows: the runs that were started in it, and those that it found under way when it was opened.

There is one follower for both. A tab shows one run at a time, the one under way before one that waits; when that is
done it goes on with the next, and leaves the finished pictures in sight until the next has something to show.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.events import FINAL, Event, Notice, Queued, Upsampled
from flux2_studio.jobs.journal import Entry
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.request import Request
from flux2_studio.ui.forms.tabs import Form, Stage
from flux2_studio.ui.gradio_compat.language import told
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, follow

MEANWHILE = "This run ended while the page was closed."


class View(Protocol):
    """How one run is shown, event by event. Its failure and what was enriched are known once the event was shown."""

    failure: str | None
    upsampling_failed: bool
    upsampled: Upsampled | None

    def begin(self, job: Job | Entry) -> Update: ...

    def update(self, event: Event) -> Update: ...


@dataclass
class Watch:
    """What one tab follows: the names of the jobs, each with that of the form which shows what is enriched for it."""

    jobs: dict[str, str] = field(default_factory=dict)
    following: bool = False
    ended: list[str] = field(default_factory=list)  # shown to the end, as far as is known here
    rows: Any = None  # what its queue panel shows


class Follower:
    """Shows runs on `stage`. view_of: how a run is shown whose form is given; ended: what becomes of everything around
    it when it is over, given how it was shown, its form and its request."""

    def __init__(
        self,
        jobs: JobQueue,
        forms: Sequence[Form],
        stage: Stage,
        view_of: Callable[[Request, Form], View],
        ended: Callable[[View, Form, Request], Update],
    ) -> None:
        self._jobs = jobs
        self._forms: Mapping[str, Form] = {form.name: form for form in forms}
        self._stage = stage
        self._view_of = view_of
        self._ended = ended

    def begin(self, watch: Watch, job: Job, form: str) -> Update:
        """Have the tab of `watch` follow `job`, from `form`; what it shows at once, unless it shows another run."""
        watch.jobs[job.id] = form
        return {} if watch.following else self._view_of(job.request, self._forms[form]).begin(job)

    async def attach(self, watch: Watch, request: gr.Request) -> AsyncIterator[Update]:
        """When a tab is opened: follow what its owner has under way, or show what ended since it was left."""
        owner = owner_of(request)
        for standing in self._jobs.standing(owner):
            watch.jobs.setdefault(standing.job.id, form_of(standing.job.request))
        if watch.jobs:
            async for update in self.follow(watch, request):
                yield update
            return
        try:
            entry = await asyncio.to_thread(self._jobs.unseen, owner)
        except StudioError as error:
            raise gr.Error(told(str(error)), print_exception=False) from error
        if entry is None:
            yield gr.skip()
            return
        job = self._jobs.get(entry.id, owner)
        events = entry.events() if job is None else tuple(event for _, event in job.events(timeout=0))
        if events and isinstance(events[-1], FINAL):
            yield await asyncio.to_thread(self._at_once, entry, (Notice(text=MEANWHILE), *events))
        else:
            yield gr.skip()  # its pictures are gone
        watch.ended.append(entry.id)

    def confirm(self, watch: Watch) -> None:
        """The browser has had what was sent: only now is it no news any more. A tab that was closed in between sends no
        such word, and its run is shown when the page is opened again."""
        ended, watch.ended = watch.ended, []
        for id_ in ended:
            self._jobs.saw(id_)

    def _at_once(self, entry: Entry, events: Sequence[Event]) -> Update:
        form = self._forms[form_of(entry.request)]
        view = self._view_of(entry.request, form)
        shown = view.begin(entry)
        for event in events:
            shown |= view.update(event)
        return shown | self._ended(view, form, entry.request)

    async def follow(self, watch: Watch, request: gr.Request) -> AsyncIterator[Update]:
        """Show the runs of `watch` until the last of them has ended. Raises `gr.Error` where that one failed."""
        if watch.following or self._next(watch, owner_of(request)) is None:
            yield gr.skip()  # who follows already comes to it
            return
        watch.following = True
        failure: str | None = None
        first = True
        try:
            while (job := self._next(watch, owner_of(request))) is not None:
                if failure is not None:
                    gr.Warning(told(failure))
                view = self._view_of(job.request, self._forms[watch.jobs[job.id]])
                async for update in self._shown(watch, job, view, keep=not first):
                    yield update
                first, failure = False, view.failure
        finally:
            watch.following = False
        if failure is not None:
            raise gr.Error(told(failure), print_exception=False)

    async def _shown(self, watch: Watch, job: Job, view: View, *, keep: bool) -> AsyncIterator[Update]:
        """`job` from its beginning to its end, or until another one of the tab's is begun before it. keep: leave what
        is on the mat until there is something to see of it."""
        stage, form = self._stage, self._forms[watch.jobs[job.id]]
        begun = view.begin(job)
        mat = (
            {part: begun[part] for part in (stage.preview, stage.gallery, stage.actions, stage.details)} if keep else {}
        )
        yield {part: value for part, value in begun.items() if part not in mat}
        async for event in follow(job):
            if isinstance(event, Queued) and self._is_overtaken(watch, job):
                return
            update = await asyncio.to_thread(view.update, event)
            if mat and (stage.preview in update or stage.gallery in update):
                if isinstance(picture := update.get(stage.preview), str):
                    update[stage.preview] = gr.HTML(picture, visible=True)
                update, mat = mat | update, {}
            if isinstance(event, FINAL):
                # In one with the end: where a run ends as soon as it begins, the browser may mix up two updates.
                update |= self._ended(view, form, job.request)
            if update:  # Gradio takes none for a mistake
                yield update
        watch.jobs.pop(job.id, None)
        watch.ended.append(job.id)

    def _next(self, watch: Watch, owner: str) -> Job | None:
        """What to show now: what has ended and was not shown yet, then in the order in which it is done."""
        known = {id_: job for id_ in watch.jobs if (job := self._jobs.get(id_, owner)) is not None}
        watch.jobs = {id_: watch.jobs[id_] for id_ in known}
        over = [job for job in known.values() if job.finished]
        standing = [standing.job for standing in self._jobs.standing(owner) if standing.job.id in known]
        return next(iter((*over, *standing)), None)

    def _is_overtaken(self, watch: Watch, job: Job) -> bool:
        others = (self._jobs.get(id_, job.owner) for id_ in watch.jobs if id_ != job.id)
        return any(other is not None and other.started and not other.finished for other in others)


def form_of(request: Request) -> str:
    """The form that a run like this comes from, as far as that can be told."""
    return {0: "generate", 1: "edit"}.get(len(request.references), "multi")
