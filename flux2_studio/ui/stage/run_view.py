"""What the page shows of one run: its events as updates of the stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.events import (
    Event,
    Failed,
    Notice,
    Preview,
    Queued,
    Result,
    Saved,
    Status,
    Stopped,
    Upsampled,
    Withheld,
    Writing,
)
from flux2_studio.jobs.journal import Entry
from flux2_studio.jobs.tasks import Job
from flux2_studio.jobs.unfinished import Kept
from flux2_studio.request import Request, Upsampling
from flux2_studio.ui.forms.tabs import EMPTY, Stage, UpsamplingPanel
from flux2_studio.ui.forms.upsample_panel import DRAWN, enriched, writing
from flux2_studio.ui.gradio_compat.language import say, t
from flux2_studio.ui.gradio_compat.wiring import Update
from flux2_studio.ui.stage import compare, show


class RunView:
    """What the page shows of one run, event by event: on the stage, and in its form's panel what a language model
    writes."""

    def __init__(self, stage: Stage, panel: UpsamplingPanel, checkpoint: Checkpoint) -> None:
        self.failure: str | None = None
        self.upsampling_failed = False
        self._stage = stage
        self._panel = panel
        self.upsampled: Upsampled | None = None
        self._saved: dict[Path, int] = {}  # with the seed of each
        self._count = 1
        self._checkpoint = checkpoint
        self._notices: list[str] = []
        self._images: dict[int, Image.Image] = {}
        self._request: Request | None = None
        self._looked = False
        self._before: Image.Image | None = None  # what an edit is made of
        self._job: Job | Entry | None = None

    def begin(self, job: Job | Entry) -> Update:
        stage = self._stage
        self._request, self._job = job.request, job
        return {
            stage.job: job.id,
            stage.shown: job.id,
            stage.message: "",
            stage.preview: gr.HTML(EMPTY, visible=True),
            stage.gallery: gr.Gallery(visible=False),
            stage.progress: show.status(Status(text="Starting")),
            stage.stop: gr.Button(t("Stop"), visible=True, interactive=True),
            stage.keep: gr.Button(visible=False),
            stage.notices: show.notices(self._notices),
            stage.actions: gr.Row(visible=False),
            stage.details: gr.Accordion(visible=False),
            **compare.hidden(stage.comparison),
        }

    def update(self, event: Event) -> Update:
        """The components that `event` changes. Draws previews, so not for the event loop."""
        stage = self._stage
        self._look()  # while it is there: a run's references go when it ends
        match event:
            case Queued():
                return {stage.progress: show.queued(event)}
            case Status():
                return {stage.progress: show.status(event)}
            case Notice():
                self._notices.append(event.text)
                return {stage.notices: show.notices(self._notices)}
            case Writing():
                return writing(event, self._panel)
            case Upsampled():
                self.upsampled = event
                assert self._request is not None, "begin first"
                self._request = replace(self._request, prompt=event.prompt, upsampling=Upsampling())
                return enriched(event, self._panel, DRAWN)
            case Preview():
                shown: Update = {stage.progress: show.step(event)}
                self._count = event.count
                if event.images:
                    self._images.update(enumerate(event.images, event.first))
                    shown[stage.preview] = self._previews()
                return shown
            case Saved():
                self._saved[event.image] = event.seed
                return {}
            case Withheld():
                self._images.pop(event.index, None)
                return {stage.preview: self._previews()}
            case Result():
                return {
                    stage.progress: show.done(event),
                    **self._pictures(event.images, event.seeds, event.provenance),
                }
            case Stopped():
                update: Update = {stage.progress: show.stopped(len(event.images)), **self._end()}
                if not event.images:
                    return {**update, **self._offer()}
                return {**update, **self._pictures(event.images, event.seeds)}
            case Failed():
                self.failure, self.upsampling_failed = event.message, event.upsampling
                failed: Update = {stage.progress: "", stage.message: show.problem(event.message), **self._end()}
                if not self._saved:
                    return {**failed, **self._offer()}
                return {**failed, **self._pictures(list(self._saved), list(self._saved.values()))}
            case _:
                raise AssertionError(f"{event} is no run's")

    def _look(self) -> None:
        """Find, once, the picture that an edit is made of."""
        if self._looked:
            return
        assert self._request is not None, "begin first"
        self._looked, self._before = True, compare.original(self._request, self._checkpoint)
        if self._before is None and isinstance(self._job, Job):  # the run was over before its page looked
            self._before = compare.original(self._job.asked, self._checkpoint)

    def _previews(self) -> str:
        return show.picture(self._images, self._count) if self._images else EMPTY

    def _end(self) -> Update:
        return {self._stage.stop: gr.Button(visible=False), self._stage.job: "", self._stage.shown: ""}

    def _offer(self) -> Update:
        """Keeping what is on the mat, where the studio still has it."""
        count = len(self._job.sketches) if isinstance(self._job, Job) else 0
        label = t("Keep this preview") if count == 1 else say("Keep these {count} previews", count=count)
        assert self._job is not None, "begin first"
        return {self._stage.keep: gr.Button(label, visible=bool(count)), self._stage.unfinished: self._job.id}

    def kept(self, kept: Kept) -> Update:
        """The previews of a run that ended early, which are pictures now. Begin first."""
        self._look()
        record = kept.pictures[0].record
        assert record.unfinished and self._request is not None, "begin first"
        step, steps = record.unfinished
        self._request = replace(self._request, prompt=record.request.prompt, upsampling=Upsampling())
        images, seeds = zip(*((saved.image, saved.seed) for saved in kept.pictures), strict=True)
        stage = self._stage
        return {
            stage.progress: show.kept(len(images), step, steps),
            stage.message: "",
            stage.notices: show.notices(kept.notes),
            stage.keep: gr.Button(visible=False),
            **self._pictures(images, seeds),
        }

    def _pictures(
        self, images: Sequence[Path], seeds: Sequence[int], provenance: Sequence[str] | None = None
    ) -> Update:
        stage, request = self._stage, self._request
        assert request is not None, "begin first"
        one = len(images) == 1
        captions = [say("seed {seed}", seed=seed) for seed in seeds]
        return {
            **self._end(),
            stage.results: [str(path) for path in images],
            stage.picked: 0,
            stage.preview: gr.HTML(visible=False),
            stage.gallery: gr.Gallery(
                [(str(path), caption) for path, caption in zip(images, captions, strict=True)],
                visible=True,
                columns=show.columns(len(images)),
                selected_index=0 if one else None,
            ),
            stage.actions: gr.Row(visible=True),
            stage.download: download(images, 0),
            stage.edit: gr.Button(use_label(0, len(images))),
            **compare.shown(stage.comparison, self._before, images[0]),
            stage.details: gr.Accordion(visible=True),
            stage.table: show.settings(request, seeds, self._checkpoint, self.upsampled) + show.provenance(provenance),
            stage.json: show.settings_json(request),
        }


def download(images: Sequence[Path | str], index: int) -> gr.DownloadButton:
    count = len(images)
    label = (
        say("Download") if count == 1 else say("Download picture {number} of {count}", number=index + 1, count=count)
    )
    return gr.DownloadButton(label, value=str(images[index]))


def use_label(index: int, count: int) -> str:
    return say("Use in Edit") if count == 1 else say("Use picture {number} in Edit", number=index + 1)
