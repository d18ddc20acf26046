"""Before a run: an estimate of its memory and time under the form, and the preload of the chosen checkpoint."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.errors import OutOfMemory, StudioError
from flux2_studio.events import Failed, Queued, Status
from flux2_studio.images.references import fit_size, reference_size
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.request import Request
from flux2_studio.ui.forms.lora_panel import read_loras
from flux2_studio.ui.forms.mask_panel import read_outpaint
from flux2_studio.ui.forms.reference_panel import gallery_paths
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.wiring import follow_task, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

# The fields that affect the memory and time of a request.
ESTIMATE_FIELDS = (
    "checkpoint",
    "references",
    "outpaint",
    "width",
    "height",
    "count",
    "steps",
    "guidance",
    "loras",
)


def wire_estimate(studio: Studio, form: Form, triggers: Sequence[Callable[..., Any]], lock: asyncio.Lock) -> None:
    """Show the estimate under `form`, and update it when its fields change and after `triggers`.

    lock: serialises the estimates of all forms. They wait while a checkpoint's files are read, and together they would
    occupy the few threads that also serve History and the queue.
    """
    inputs = {name: form.fields[name] for name in ESTIMATE_FIELDS if name in form.fields}
    inputs["upsample_by"] = form.upsampling.inputs["upsample_by"]

    async def tell(**values: Any) -> str:
        async with lock:
            return await asyncio.to_thread(form_estimate_html, studio, **values)

    # Without a trigger: at every change, and when the page is opened.
    events: list[Callable[..., Any]] = [partial(listen, None), *triggers]
    for event in events:
        event(
            tell,
            None,
            form.estimate,
            inputs_kwargs=inputs,
            concurrency_limit=None,
            trigger_mode="always_last",
            api_visibility="private",
            show_progress="hidden",
        )


def form_estimate_html(
    studio: Studio,
    *,
    checkpoint: str,
    width: int | None,
    height: int | None,
    count: int,
    guidance: float,
    steps: int | None = None,
    references: Sequence[tuple[str, str | None]] | None = None,
    loras: Any = None,
    outpaint: Any = None,
    upsample_by: str = "none",
) -> str:
    """The estimate for a form's values as HTML; "" for invalid values, which the run will report."""
    try:
        chosen_checkpoint = studio.settings.checkpoint(checkpoint)
        files = gallery_paths(references)
        cap = chosen_checkpoint.max_pixels_per_reference(len(files))
        sizes = [fit_size(reference_size(file), cap) for file in files]
        request = Request(
            prompt="any",
            checkpoint=checkpoint,
            references=files,
            outpaint=read_outpaint(outpaint),
            width=width,
            height=height,
            count=count,
            # Fixed values in the form may still be those of the previous checkpoint.
            guidance=None if chosen_checkpoint.guidance_fixed else guidance,
            steps=None if chosen_checkpoint.steps_fixed else steps,
            loras=read_loras(loras),
        )
        return render.run_estimate(studio.estimate_run(request, sizes), enhanced=upsample_by != "none")
    except OutOfMemory as error:
        return render.problem(str(error))
    except StudioError:
        return ""


def wire_preload(
    studio: Studio, jobs: JobQueue, checkpoint_dropdown: gr.Dropdown, loading: gr.HTML
) -> Callable[..., Any]:
    """Preload a checkpoint on disk as soon as it is chosen, after the current run, and show the progress.

    Returns the event of its end.
    """

    async def prepare(name: str, request: gr.Request) -> AsyncIterator[str]:
        checkpoint = studio.settings.checkpoint(name)
        if not await asyncio.to_thread(studio.is_on_disk, checkpoint):
            yield ""
            return
        async for event in follow_task(jobs.preload(name, request.session_hash or "")):
            match event:
                case Queued():
                    yield render.status(Status(text=f"{checkpoint.label} is loaded after the run under way"))
                case Status():
                    yield render.status(event)
                case Failed(message=message):
                    yield render.problem(message)
                case _:
                    yield ""

    # `input`: opening the page must not preload. A new choice replaces the previous one.
    prepared = listen(
        checkpoint_dropdown.input,
        prepare,
        checkpoint_dropdown,
        loading,
        concurrency_limit=None,
        trigger_mode="multiple",
    )
    ended: Callable[..., Any] = prepared.then
    return ended
