"""The runs that a tab follows: those started in it, and those under way when it was opened.

One follower serves both. A tab shows one run at a time, the running one before a waiting one. After it ends, the tab
follows the next, and keeps the finished pictures visible until the next has something to show.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.events import FINAL_EVENTS, Event, Notice, PromptEnhanced, Queued
from flux2_studio.jobs.journal import JournalEntry
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.request import Request
from flux2_studio.ui.forms.tabs import Form, StagePanel
from flux2_studio.ui.gradio_compat.language import translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, follow_task

ENDED_MEANWHILE = "This run ended while the page was closed."


class RunViewProtocol(Protocol):
    """The view of one run. Its failure and its enhanced prompt are set after `update` with that event."""

    failure: str | None
    upsampling_failed: bool
    upsampled: PromptEnhanced | None

    def begin(self, job: Job | JournalEntry) -> Update: ...

    def update(self, event: Event) -> Update: ...


@dataclass
class TabState:
    """What one tab follows: the ids of the jobs, each with the name of the form that shows its enhanced prompt."""

    form_by_job: dict[str, str] = field(default_factory=dict)
    is_following: bool = False
    unconfirmed_jobs: list[str] = field(default_factory=list)  # fully sent to the browser, not yet confirmed
    queue_rows: Any = None  # value of its queue panel


class Follower:
    """Shows runs on `stage`.

    make_view: makes the view of a run, from its request and form. on_end: the updates around the stage after a run,
    from its view, form and request.
    """

    def __init__(
        self,
        jobs: JobQueue,
        forms: Sequence[Form],
        stage: StagePanel,
        make_view: Callable[[Request, Form], RunViewProtocol],
        on_end: Callable[[RunViewProtocol, Form, Request], Update],
    ) -> None:
        self._jobs = jobs
        self._forms: Mapping[str, Form] = {form.name: form for form in forms}
        self._stage = stage
        self._make_view = make_view
        self._on_end = on_end

    def begin(self, tab_state: TabState, job: Job, form: str) -> Update:
        """Make the tab follow `job`, started from `form`. Returns the first update, {} if it shows another run."""
        tab_state.form_by_job[job.id] = form
        return {} if tab_state.is_following else self._make_view(job.request, self._forms[form]).begin(job)

    async def attach(self, tab_state: TabState, request: gr.Request) -> AsyncIterator[Update]:
        """When a tab is opened: follow its owner's runs, or show the run that ended since the page was closed."""
        owner = owner_of(request)
        for position in self._jobs.queue_positions(owner):
            tab_state.form_by_job.setdefault(position.job.id, form_name_for(position.job.request))
        if tab_state.form_by_job:
            async for update in self.follow(tab_state, request):
                yield update
            return
        try:
            entry = await asyncio.to_thread(self._jobs.latest_unseen, owner)
        except StudioError as error:
            raise gr.Error(translate_message(str(error)), print_exception=False) from error
        if entry is None:
            yield gr.skip()
            return
        job = self._jobs.get(entry.id, owner)
        events = entry.final_events() if job is None else tuple(event for _, event in job.events(timeout=0))
        if events and isinstance(events[-1], FINAL_EVENTS):
            yield await asyncio.to_thread(self._replay, entry, (Notice(text=ENDED_MEANWHILE), *events))
        else:
            yield gr.skip()  # its pictures were deleted
        tab_state.unconfirmed_jobs.append(entry.id)

    def confirm_shown(self, tab_state: TabState) -> None:
        """Mark the ended runs as seen, now that the browser has received them.

        A tab that was closed before does not confirm, and its run is shown when the page is opened again.
        """
        ended, tab_state.unconfirmed_jobs = tab_state.unconfirmed_jobs, []
        for id_ in ended:
            self._jobs.mark_seen(id_)

    def _replay(self, entry: JournalEntry, events: Sequence[Event]) -> Update:
        form = self._forms[form_name_for(entry.request)]
        view = self._make_view(entry.request, form)
        shown = view.begin(entry)
        for event in events:
            shown |= view.update(event)
        return shown | self._on_end(view, form, entry.request)

    async def follow(self, tab_state: TabState, request: gr.Request) -> AsyncIterator[Update]:
        """Show the runs of `tab_state` until the last one has ended. Raises `gr.Error` if that one failed."""
        if tab_state.is_following or self._next_job(tab_state, owner_of(request)) is None:
            yield gr.skip()  # the active follower will show it
            return
        tab_state.is_following = True
        failure: str | None = None
        first = True
        try:
            while (job := self._next_job(tab_state, owner_of(request))) is not None:
                if failure is not None:
                    gr.Warning(translate_message(failure))
                view = self._make_view(job.request, self._forms[tab_state.form_by_job[job.id]])
                async for update in self._show_run(tab_state, job, view, keep_previous=not first):
                    yield update
                first, failure = False, view.failure
        finally:
            tab_state.is_following = False
        if failure is not None:
            raise gr.Error(translate_message(failure), print_exception=False)

    async def _show_run(
        self, tab_state: TabState, job: Job, view: RunViewProtocol, *, keep_previous: bool
    ) -> AsyncIterator[Update]:
        """Show `job` until its end, or until another run of the tab starts before it.

        keep_previous: leave the previous pictures until there is something to show of this one.
        """
        stage, form = self._stage, self._forms[tab_state.form_by_job[job.id]]
        initial = view.begin(job)
        deferred = (
            {part: initial[part] for part in (stage.preview, stage.gallery, stage.actions, stage.details)}
            if keep_previous
            else {}
        )
        yield {part: value for part, value in initial.items() if part not in deferred}
        async for event in follow_task(job):
            if isinstance(event, Queued) and self._is_overtaken(tab_state, job):
                return
            update = await asyncio.to_thread(view.update, event)
            if deferred and (stage.preview in update or stage.gallery in update):
                if isinstance(picture := update.get(stage.preview), str):
                    update[stage.preview] = gr.HTML(picture, visible=True)
                update, deferred = deferred | update, {}
            if isinstance(event, FINAL_EVENTS):
                # In one update: if a run ends as soon as it begins, the browser may mix up two updates.
                update |= self._on_end(view, form, job.request)
            if update:  # Gradio treats an empty update as an error
                yield update
        tab_state.form_by_job.pop(job.id, None)
        tab_state.unconfirmed_jobs.append(job.id)

    def _next_job(self, tab_state: TabState, owner: str) -> Job | None:
        """The run to show now: first ended runs that were not shown yet, then in queue order."""
        known = {id_: job for id_ in tab_state.form_by_job if (job := self._jobs.get(id_, owner)) is not None}
        tab_state.form_by_job = {id_: tab_state.form_by_job[id_] for id_ in known}
        ended = [job for job in known.values() if job.finished]
        queued = [position.job for position in self._jobs.queue_positions(owner) if position.job.id in known]
        return next(iter((*ended, *queued)), None)

    def _is_overtaken(self, tab_state: TabState, job: Job) -> bool:
        others = (self._jobs.get(id_, job.owner) for id_ in tab_state.form_by_job if id_ != job.id)
        return any(other is not None and other.started and not other.finished for other in others)


def form_name_for(request: Request) -> str:
    """The form that this request probably came from."""
    return {0: "generate", 1: "edit"}.get(len(request.references), "multi")
