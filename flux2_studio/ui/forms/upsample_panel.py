"""Enriching prompts on the page: who does it, what that costs, and what came of it beside the original."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import StudioError, UpsampleError
from flux2_studio.events import Failed, Notice, Queued, Stopped, Upsampled, Writing
from flux2_studio.events import Status as StatusEvent
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.prompting.openai_server import ApiKey, no_writers
from flux2_studio.request import Request, Upsampling
from flux2_studio.settings import Settings
from flux2_studio.ui.forms.tabs import UPSAMPLING, Form, UpsamplingPanel
from flux2_studio.ui.gradio_compat.language import say, t, told
from flux2_studio.ui.gradio_compat.wiring import Update, follow, listen, stopper, tab_of
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.models.writers import WriterOffer
    from flux2_studio.studio import Studio

Read = Callable[..., Request]  # a form's values, and what stands around them -> its request
GROWING = "It is still being written."
OFFERED = "Change it as you like, then use it as your prompt."
DRAWN = "Drawn as it stands here. To change it for the next run, use it as your prompt."
USED = "Your prompt is the enriched one now, and is drawn as it stands."
INPUTS = ("upsample_by", "upsample_local", "upsample_remote", "temperature", "top_p", "max_tokens", "api_key")


def read_choice(values: Mapping[str, Any]) -> Upsampling:
    """The values of `UpsamplingPanel.inputs` as a request has them. Raises `RequestError`."""
    by = values["upsample_by"]
    if by == "none":
        return Upsampling()
    model = values["upsample_local" if by == "local" else "upsample_remote"]
    tokens = values["max_tokens"]
    return Upsampling(
        by=by,
        model=model.strip() if isinstance(model, str) else model,
        temperature=values["temperature"],
        top_p=values["top_p"],
        max_tokens=None if tokens is None else int(tokens),
    )


def read_key(values: Mapping[str, Any]) -> ApiKey | None:
    """The key that was typed, where it is of use. Raises `UpsampleError` for what is none."""
    typed = (values["api_key"] or "").strip()
    return ApiKey(typed) if typed and values["upsample_by"] == "openrouter" else None


def told_of(
    by: str, offers: Sequence[WriterOffer], checkpoint: Checkpoint, chosen: str | None, settings: Settings
) -> str:
    """What to know of the choice, as HTML."""
    if by == "local":
        if not offers:
            return show.notes([no_writers(checkpoint)])
        offer = next((offer for offer in offers if offer.name == chosen), offers[0])
        sees = "" if offer.sees else f" {say('It reads text only: references it does not see.')}"
        return show.notes([f"{told(offer.text)}{sees}"])
    if by == "openrouter":
        host = urlsplit(settings.openrouter_url).hostname or say("the server")
        key = (
            say("This studio has a key for it; one that you type goes before.")
            if settings.openrouter_key
            else say("The key is sent with your runs, and kept nowhere.")
        )
        goes = say("Your prompt, and your references scaled down, go to {host}.", host=host)
        return show.notes([f"{goes} {key}"])
    return ""


def begun(panel: UpsamplingPanel) -> Update:
    """Whatever was written before goes, so that nobody takes it for what comes now."""
    return {
        panel.written: gr.Textbox("", visible=False),
        panel.use: gr.Button(visible=False),
        panel.enrich: gr.Button(interactive=False),
    }


def writing(event: Writing, panel: UpsamplingPanel) -> Update:
    return {
        panel.written: gr.Textbox(
            event.text, visible=True, interactive=False, label=t("Enriched prompt"), info=t(GROWING)
        ),
        panel.folded: gr.Accordion(open=True),
    }


def enriched(event: Upsampled, panel: UpsamplingPanel, info: str) -> Update:
    """info: what becomes of it."""
    return {
        panel.written: gr.Textbox(
            event.prompt,
            visible=True,
            interactive=True,
            label=say("Enriched prompt, by {name}", name=event.by),
            info=t(info),
        ),
        panel.use: gr.Button(visible=True),
        panel.folded: gr.Accordion(open=True),
    }


def ended(panel: UpsamplingPanel, done: Upsampled | None, info: str) -> Update:
    """At the end once more what was written, for of updates that follow each other at once the browser may lose the
    first; or nothing, where it came to nothing."""
    ready = {panel.enrich: gr.Button(interactive=True)}
    return {**begun(panel), **(enriched(done, panel, info) if done else {}), **ready}


def shown(panel: UpsamplingPanel) -> list[Any]:
    """The components that these set."""
    return [panel.written, panel.use, panel.folded, panel.enrich]


def wire_upsampling(
    studio: Studio, jobs: JobQueue, chosen: gr.Dropdown, form: Form, read: Read, around: Sequence[Any]
) -> None:
    """read: makes a request of the values of `around` and of the form's fields, its panel's included."""
    panel = form.upsampling

    def offer(name: str, by: str, now: str | None) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        offers = studio.writers(checkpoint)
        names = [writer.name for writer in offers]
        model = now if now in names else names[0] if names else None
        possible = by == "openrouter" or (by == "local" and bool(names))
        return {
            panel.local: gr.Dropdown(
                [(writer.label, writer.name) for writer in offers], value=model, visible=by == "local" and bool(names)
            ),
            panel.remote: gr.Dropdown(visible=by == "openrouter"),
            panel.key: gr.Textbox(visible=by == "openrouter"),
            panel.row: gr.Row(visible=possible or "hidden"),
            panel.enrich: gr.Button(visible=possible),
            panel.about: told_of(by, offers, checkpoint, model, studio.settings),
            panel.folded: gr.Accordion(label=t("Enrich the prompt (on)") if possible else t(UPSAMPLING)),
        }

    changed = [panel.local, panel.remote, panel.key, panel.row, panel.enrich, panel.about, panel.folded]
    asked = [chosen, panel.by, panel.local]
    # With no trigger named: at every choice, and when the page is opened. At once: what it says is of another choice.
    listen(None, offer, asked, changed, queue=False)
    # Gradio shows a Number that was made with None as its least value until it is set once more.
    numbers = [panel.inputs[name] for name in ("temperature", "top_p", "max_tokens")]
    listen(None, lambda: [None] * len(numbers), None, numbers, queue=False)

    async def enrich(request: gr.Request, *around: Any, **values: Any) -> AsyncIterator[Update]:
        yield {
            **begun(panel),
            panel.status: show.status(StatusEvent(text="Starting")),
            panel.stop: gr.Button(t("Stop"), visible=True, interactive=True),
        }
        problem = ""
        done: Upsampled | None = None
        try:
            asked_for, key = await asyncio.to_thread(_asked, read, around, values)
            job = await asyncio.to_thread(jobs.enrich, asked_for, tab_of(request), key)
        except StudioError as error:
            problem = show.problem(str(error))
        else:
            yield {panel.job: job.id}
            notes: list[str] = []
            async for event in follow(job):
                match event:
                    case Queued():
                        yield {panel.status: show.queued(event)}
                    case StatusEvent():
                        yield {panel.status: show.status(event)}
                    case Writing():
                        yield writing(event, panel)
                    case Upsampled():
                        done = event
                    case Notice(text=text):
                        notes.append(text)
                    case Failed(message=message):
                        problem, done = show.problem(message), None
                    case Stopped():
                        notes.append("Stopped.")
                    case _:
                        pass  # Ready: Upsampled came before
            problem += show.notes(notes)
        yield {
            **ended(panel, done, OFFERED),
            panel.stop: gr.Button(visible=False),
            panel.status: problem,
            panel.job: "",
        }

    listen(
        panel.enrich.click,
        enrich,
        around,
        [*shown(panel), panel.stop, panel.status, panel.job],
        inputs_kwargs=form.fields | panel.inputs,
        concurrency_limit=None,
    )

    def use(prompt: str, by: str, text: str, before: list[tuple[str, str]]) -> Update:
        return {
            form.fields["prompt"]: text,
            panel.by: "none",  # or it would be enriched once more
            panel.before: [*before, (prompt, by)],
            panel.written: gr.Textbox(visible=False),
            panel.use: gr.Button(visible=False),
            panel.undo: gr.Button(visible=True),
            panel.status: show.notes([USED]),
        }

    def undo(before: list[tuple[str, str]]) -> Update:
        *left, (prompt, by) = before
        return {
            form.fields["prompt"]: prompt,
            panel.by: by,
            panel.before: left,
            panel.undo: gr.Button(visible=bool(left)),
            panel.status: "",
        }

    restored = [form.fields["prompt"], panel.by, panel.before, panel.undo, panel.status]
    listen(panel.stop.click, stopper(jobs), panel.job, panel.stop, queue=False)
    listen(
        panel.use.click,
        use,
        [form.fields["prompt"], panel.by, panel.written, panel.before],
        [*restored, panel.written, panel.use],
        queue=False,
    )
    listen(panel.undo.click, undo, panel.before, restored, queue=False)


def _asked(read: Read, around: Sequence[Any], values: Mapping[str, Any]) -> tuple[Request, ApiKey | None]:
    """The form's request, and the key beside it. Raises `StudioError`."""
    request = read(*around, values)
    if request.upsampling.by == "none":
        raise UpsampleError("Choose first who enriches the prompt.")
    return request, read_key(values)
