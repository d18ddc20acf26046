"""Before a run: whether the request fits into memory and how long it will take, shown under its form, and the chosen
checkpoint loaded ahead."""

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
)  # what a request's memory and time depend on


def wire_estimate(studio: Studio, form: Form, triggers: Sequence[Callable[..., Any]], lock: asyncio.Lock) -> None:
    """Tell under `form` what it asks for will take, whenever that changes: with its fields, and after `triggers`,
    events of what else it depends on.

    lock: has one form after the other look. While a checkpoint's files are read all of them wait for that, and would
    between them hold the few threads that History and the queue are answered from, too.
    """
    components = {name: form.fields[name] for name in ESTIMATE_FIELDS if name in form.fields}
    components["upsample_by"] = form.upsampling.inputs["upsample_by"]

    async def tell(**values: Any) -> str:
        async with lock:
            return await asyncio.to_thread(form_estimate_html, studio, **values)

    # With no trigger named: at every change, and when the page is opened.
    events: list[Callable[..., Any]] = [partial(listen, None), *triggers]
    for event in events:
        event(
            tell,
            None,
            form.estimate,
            inputs_kwargs=components,
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
    """What a form's values will take, as HTML; "" for values that cannot be run, which the run will tell."""
    try:
        chosen = studio.settings.checkpoint(checkpoint)
        files = gallery_paths(references)
        cap = chosen.max_pixels_per_reference(len(files))
        sizes = [fit_size(reference_size(file), cap) for file in files]
        asked = Request(
            prompt="any",
            checkpoint=checkpoint,
            references=files,
            outpaint=read_outpaint(outpaint),
            width=width,
            height=height,
            count=count,
            # Numbers that were laid out for the checkpoint before are not this one's.
            guidance=None if chosen.guidance_fixed else guidance,
            steps=None if chosen.steps_fixed else steps,
            loras=read_loras(loras),
        )
        return render.run_estimate(studio.estimate_run(asked, sizes), enriched=upsample_by != "none")
    except OutOfMemory as error:
        return render.problem(str(error))
    except StudioError:
        return ""


def wire_preload(
    studio: Studio, jobs: JobQueue, checkpoint_dropdown: gr.Dropdown, loading: gr.HTML
) -> Callable[..., Any]:
    """Load a checkpoint that is on disk as soon as it is chosen, after the run under way, and show how far that is.
    Returns the event of its end."""

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

    # By hand only: opening the page is no wish, and a new choice takes the place of the one before.
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
