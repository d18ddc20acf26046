"""After Stop or a failure: save the last preview as a picture, marked as unfinished."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.ui.forms.tabs import StagePanel
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage.run_view import RunView


def wire_keep_preview(jobs: JobQueue, stage: StagePanel, make_view: Callable[[Job], RunView]) -> None:
    """Connect the button. make_view: makes the view of a run."""

    async def keep(id_: str, request: gr.Request) -> Update:
        owner = owner_of(request)
        try:
            saved = await asyncio.to_thread(jobs.save_previews, id_, owner)
        except StudioError as error:
            raise gr.Error(str(error), print_exception=False) from error
        job = jobs.get(id_, owner)
        assert job is not None, "it was there a moment ago"
        return make_view(job).show_kept_previews(saved)

    listen(stage.keep_preview.click, keep, stage.unfinished_job_id, stage.components)
