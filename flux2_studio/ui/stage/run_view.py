"""The page's view of one run: turns its events into updates of the stage."""

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
    PromptEnhanced,
    PromptProgress,
    Queued,
    Result,
    Saved,
    Status,
    Stopped,
    Withheld,
)
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.jobs.journal import JournalEntry
from flux2_studio.jobs.tasks import Job
from flux2_studio.jobs.unfinished import SavedPreview
from flux2_studio.request import Request, Upsampling
from flux2_studio.ui.forms.tabs import EMPTY_STAGE_HTML, StagePanel, UpsamplingPanel
from flux2_studio.ui.forms.upsample_panel import DRAWN_INFO, show_enhanced_prompt, show_partial_prompt
from flux2_studio.ui.gradio_compat.language import i18n, translate
from flux2_studio.ui.gradio_compat.wiring import Update
from flux2_studio.ui.stage import compare, render


class RunView:
    """The view of one run: updates of the stage, and of its form's panel for prompt enhancement."""

    def __init__(
        self, stage: StagePanel, panel: UpsamplingPanel, checkpoint: Checkpoint, picture_cache: PictureCache
    ) -> None:
        self.failure: str | None = None
        self.upsampling_failed = False
        self._stage = stage
        self._panel = panel
        self.upsampled: PromptEnhanced | None = None
        self._saved: dict[Path, int] = {}  # picture -> seed
        self._count = 1
        self._checkpoint = checkpoint
        self._picture_cache = picture_cache
        self._notices: list[str] = []
        self._images: dict[int, Image.Image] = {}
        self._request: Request | None = None
        self._original_loaded = False
        self._original: Image.Image | None = None  # the picture that is edited
        self._job: Job | JournalEntry | None = None

    def begin(self, job: Job | JournalEntry) -> Update:
        stage = self._stage
        self._request, self._job = job.request, job
        return {
            stage.job_id: job.id,
            stage.shown_job_id: job.id,
            stage.message: "",
            stage.preview: gr.HTML(EMPTY_STAGE_HTML, visible=True),
            stage.gallery: gr.Gallery(visible=False),
            stage.progress: render.status(Status(text="Starting")),
            stage.stop: gr.Button(i18n("Stop"), visible=True, interactive=True),
            stage.keep_preview: gr.Button(visible=False),
            stage.notices: render.notices(self._notices),
            stage.actions: gr.Row(visible=False),
            stage.details: gr.Accordion(visible=False),
            **compare.hide_comparison(stage.comparison),
        }

    def update(self, event: Event) -> Update:
        """The component updates for `event`. Renders previews, so do not call it on the event loop."""
        stage = self._stage
        self._load_original()  # now, because a run's references are deleted when it ends
        match event:
            case Queued():
                return {stage.progress: render.queued(event)}
            case Status():
                return {stage.progress: render.status(event)}
            case Notice():
                self._notices.append(event.text)
                return {stage.notices: render.notices(self._notices)}
            case PromptProgress():
                return show_partial_prompt(event, self._panel)
            case PromptEnhanced():
                self.upsampled = event
                assert self._request is not None, "begin first"
                self._request = replace(self._request, prompt=event.prompt, upsampling=Upsampling())
                return show_enhanced_prompt(event, self._panel, DRAWN_INFO)
            case Preview():
                shown: Update = {stage.progress: render.step(event)}
                self._count = event.count
                if event.images:
                    self._images.update(enumerate(event.images, event.first_index))
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
                    stage.progress: render.done(event),
                    **self._pictures(event.images, event.seeds, event.provenance),
                }
            case Stopped():
                update: Update = {stage.progress: render.stopped(len(event.images)), **self._end()}
                if not event.images:
                    return {**update, **self._offer_keep_preview()}
                return {**update, **self._pictures(event.images, event.seeds)}
            case Failed():
                self.failure, self.upsampling_failed = event.message, event.in_prompt_enhancement
                failed: Update = {stage.progress: "", stage.message: render.problem(event.message), **self._end()}
                if not self._saved:
                    return {**failed, **self._offer_keep_preview()}
                return {**failed, **self._pictures(list(self._saved), list(self._saved.values()))}
            case _:
                raise AssertionError(f"{event} is no run's")

    def _load_original(self) -> None:
        """Load the picture that is edited, once."""
        if self._original_loaded:
            return
        assert self._request is not None, "begin first"
        self._original_loaded, self._original = (
            True,
            compare.load_original(self._request, self._checkpoint, self._picture_cache),
        )
        if self._original is None and isinstance(self._job, Job):  # the run ended before this view was made
            self._original = compare.load_original(self._job.submitted_request, self._checkpoint, self._picture_cache)

    def _previews(self) -> str:
        return render.picture(self._images, self._count) if self._images else EMPTY_STAGE_HTML

    def _end(self) -> Update:
        return {self._stage.stop: gr.Button(visible=False), self._stage.job_id: "", self._stage.shown_job_id: ""}

    def _offer_keep_preview(self) -> Update:
        """Offer to keep the last preview, if the studio still has it."""
        count = len(self._job.unfinished) if isinstance(self._job, Job) else 0
        label = i18n("Keep this preview") if count == 1 else translate("Keep these {count} previews", count=count)
        assert self._job is not None, "begin first"
        return {
            self._stage.keep_preview: gr.Button(label, visible=bool(count)),
            self._stage.unfinished_job_id: self._job.id,
        }

    def show_kept_previews(self, kept: SavedPreview) -> Update:
        """Show the saved previews of a run that ended early. Call `begin` first."""
        self._load_original()
        record = kept.pictures[0].record
        assert record.unfinished and self._request is not None, "begin first"
        step, steps = record.unfinished
        self._request = replace(self._request, prompt=record.request.prompt, upsampling=Upsampling())
        images, seeds = zip(*((saved.image, saved.seed) for saved in kept.pictures), strict=True)
        stage = self._stage
        return {
            stage.progress: render.kept_previews(len(images), step, steps),
            stage.message: "",
            stage.notices: render.notices(kept.notes),
            stage.keep_preview: gr.Button(visible=False),
            **self._pictures(images, seeds),
        }

    def _pictures(
        self, images: Sequence[Path], seeds: Sequence[int], provenance: Sequence[str] | None = None
    ) -> Update:
        stage, request = self._stage, self._request
        assert request is not None, "begin first"
        single = len(images) == 1
        captions = [translate("seed {seed}", seed=seed) for seed in seeds]
        return {
            **self._end(),
            stage.result_paths: [str(path) for path in images],
            stage.selected_index: 0,
            stage.preview: gr.HTML(visible=False),
            stage.gallery: gr.Gallery(
                [(str(path), caption) for path, caption in zip(images, captions, strict=True)],
                visible=True,
                columns=render.columns(len(images)),
                selected_index=0 if single else None,
            ),
            stage.actions: gr.Row(visible=True),
            stage.download: download_button(images, 0),
            stage.use_in_edit: gr.Button(use_in_edit_label(0, len(images))),
            **compare.show_comparison(stage.comparison, self._original, images[0]),
            stage.details: gr.Accordion(visible=True),
            stage.table: render.settings(request, seeds, self._checkpoint, self.upsampled)
            + render.provenance(provenance),
            stage.json: render.settings_json(request),
        }


def download_button(images: Sequence[Path | str], index: int) -> gr.DownloadButton:
    count = len(images)
    label = (
        translate("Download")
        if count == 1
        else translate("Download picture {number} of {count}", number=index + 1, count=count)
    )
    return gr.DownloadButton(label, value=str(images[index]))


def use_in_edit_label(index: int, count: int) -> str:
    return translate("Use in Edit") if count == 1 else translate("Use picture {number} in Edit", number=index + 1)
