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
from flux2_studio.ui.forms.lora_panel import choices
from flux2_studio.ui.forms.mask_panel import read_outpaint
from flux2_studio.ui.forms.reference_panel import paths
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.wiring import follow, listen
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

DECISIVE = (
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


def wire_outlook(studio: Studio, form: Form, news: Sequence[Callable[..., Any]], turn: asyncio.Lock) -> None:
    """Tell under `form` what it asks for will take, whenever that changes: with its fields, and after `news`, events
    of what else it depends on.

    turn: has one form after the other look. While a checkpoint's files are read all of them wait for that, and would
    between them hold the few threads that History and the queue are answered from, too.
    """
    components = {name: form.fields[name] for name in DECISIVE if name in form.fields}
    components["upsample_by"] = form.upsampling.inputs["upsample_by"]

    async def tell(**values: Any) -> str:
        async with turn:
            return await asyncio.to_thread(outlook, studio, **values)

    # With no trigger named: at every change, and when the page is opened.
    events: list[Callable[..., Any]] = [partial(listen, None), *news]
    for event in events:
        event(
            tell,
            None,
            form.fit,
            inputs_kwargs=components,
            concurrency_limit=None,
            trigger_mode="always_last",
            api_visibility="private",
            show_progress="hidden",
        )


def outlook(
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
        files = paths(references)
        cap = chosen.reference_cap(len(files))
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
            loras=choices(loras),
        )
        return show.outlook(studio.outlook(asked, sizes), enriched=upsample_by != "none")
    except OutOfMemory as error:
        return show.problem(str(error))
    except StudioError:
        return ""


def wire_preparation(studio: Studio, jobs: JobQueue, chosen: gr.Dropdown, loading: gr.HTML) -> Callable[..., Any]:
    """Load a checkpoint that is on disk as soon as it is chosen, after the run under way, and show how far that is.
    Returns the event of its end."""

    async def prepare(name: str, request: gr.Request) -> AsyncIterator[str]:
        checkpoint = studio.settings.checkpoint(name)
        if not await asyncio.to_thread(studio.on_disk, checkpoint):
            yield ""
            return
        async for event in follow(jobs.prepare(name, request.session_hash or "")):
            match event:
                case Queued():
                    yield show.status(Status(text=f"{checkpoint.label} is loaded after the run under way"))
                case Status():
                    yield show.status(event)
                case Failed(message=message):
                    yield show.problem(message)
                case _:
                    yield ""

    # By hand only: opening the page is no wish, and a new choice takes the place of the one before.
    prepared = listen(chosen.input, prepare, chosen, loading, concurrency_limit=None, trigger_mode="multiple")
    ended: Callable[..., Any] = prepared.then
    return ended
