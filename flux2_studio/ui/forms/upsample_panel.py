"""Prompt enhancement on the page: the provider, its cost, and the enhanced prompt beside the original."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import StudioError, UpsampleError
from flux2_studio.events import Failed, Notice, PromptEnhanced, PromptProgress, Queued, Stopped
from flux2_studio.events import Status as StatusEvent
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.prompting.openai_server import ApiKey, no_local_writers_message
from flux2_studio.request import Request, Upsampling
from flux2_studio.settings import Settings
from flux2_studio.ui.forms.tabs import UPSAMPLING_TITLE, Form, UpsamplingPanel
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message
from flux2_studio.ui.gradio_compat.wiring import Update, follow_task, listen, make_stop_handler, tab_owner_of
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.models.writers import WriterOffer
    from flux2_studio.studio import Studio

UpsamplingFormReader = Callable[..., Request]  # a form's state and values -> its request
WRITING_INFO = "It is still being written."
ENHANCED_INFO = "Change it as you like, then use it as your prompt."
DRAWN_INFO = "Drawn as it stands here. To change it for the next run, use it as your prompt."
USED_NOTE = "Your prompt is the enhanced one now, and is drawn as it stands."
UPSAMPLING_INPUTS = (
    "upsample_by",
    "upsample_local",
    "upsample_remote",
    "temperature",
    "top_p",
    "max_tokens",
    "api_key",
)


def read_upsampling(values: Mapping[str, Any]) -> Upsampling:
    """Convert the values of `UpsamplingPanel.inputs` for a request. Raises `RequestError`."""
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


def read_api_key(values: Mapping[str, Any]) -> ApiKey | None:
    """The typed key if it is needed. Raises `UpsampleError` for an invalid one."""
    typed = (values["api_key"] or "").strip()
    return ApiKey(typed) if typed and values["upsample_by"] == "openrouter" else None


def provider_note_html(
    by: str, offers: Sequence[WriterOffer], checkpoint: Checkpoint, chosen: str | None, settings: Settings
) -> str:
    """Notes on the chosen provider as HTML."""
    if by == "local":
        if not offers:
            return render.notes([no_local_writers_message(checkpoint)])
        offer = next((offer for offer in offers if offer.name == chosen), offers[0])
        vision_note = "" if offer.has_vision else f" {translate('It reads text only: references it does not see.')}"
        return render.notes([f"{translate_message(offer.description)}{vision_note}"])
    if by == "openrouter":
        host = urlsplit(settings.openrouter_url).hostname or translate("the server")
        key_note = (
            translate("This studio has a key for it; one that you type goes before.")
            if settings.openrouter_key
            else translate("The key is sent with your runs, and kept nowhere.")
        )
        privacy_note = translate("Your prompt, and your references scaled down, go to {host}.", host=host)
        return render.notes([f"{privacy_note} {key_note}"])
    return ""


def clear_enhanced_prompt(panel: UpsamplingPanel) -> Update:
    """Remove the previous enhanced prompt, so that it is not mistaken for the next one."""
    return {
        panel.enhanced_prompt: gr.Textbox("", visible=False),
        panel.use: gr.Button(visible=False),
        panel.enhance: gr.Button(interactive=False),
    }


def show_partial_prompt(event: PromptProgress, panel: UpsamplingPanel) -> Update:
    return {
        panel.enhanced_prompt: gr.Textbox(
            event.text, visible=True, interactive=False, label=i18n("Enhanced prompt"), info=i18n(WRITING_INFO)
        ),
        panel.accordion: gr.Accordion(open=True),
    }


def show_enhanced_prompt(event: PromptEnhanced, panel: UpsamplingPanel, info: str) -> Update:
    """info: what happens to the enhanced prompt."""
    return {
        panel.enhanced_prompt: gr.Textbox(
            event.prompt,
            visible=True,
            interactive=True,
            label=translate("Enhanced prompt, by {name}", name=event.by),
            info=i18n(info),
        ),
        panel.use: gr.Button(visible=True),
        panel.accordion: gr.Accordion(open=True),
    }


def show_enhancement_end(panel: UpsamplingPanel, done: PromptEnhanced | None, info: str) -> Update:
    """The update at the end: the enhanced prompt, or nothing if there is none.

    The prompt is repeated, because the browser may lose the first of two updates in quick succession.
    """
    ready = {panel.enhance: gr.Button(interactive=True)}
    return {**clear_enhanced_prompt(panel), **(show_enhanced_prompt(done, panel, info) if done else {}), **ready}


def upsampling_outputs(panel: UpsamplingPanel) -> list[Any]:
    """The components that the functions above set."""
    return [panel.enhanced_prompt, panel.use, panel.accordion, panel.enhance]


def wire_upsampling(
    studio: Studio,
    jobs: JobQueue,
    checkpoint_dropdown: gr.Dropdown,
    form: Form,
    read_form: UpsamplingFormReader,
    form_state: Sequence[Any],
) -> None:
    """Connect the panel. read_form: makes a request from the values of `form_state`, the form and the panel."""
    panel = form.upsampling

    def offer(name: str, by: str, now: str | None) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        offers = studio.list_writers(checkpoint)
        names = [writer.name for writer in offers]
        model = now if now in names else names[0] if names else None
        possible = by == "openrouter" or (by == "local" and bool(names))
        return {
            panel.local: gr.Dropdown(
                [(writer.label, writer.name) for writer in offers], value=model, visible=by == "local" and bool(names)
            ),
            panel.remote: gr.Dropdown(visible=by == "openrouter"),
            panel.key: gr.Textbox(visible=by == "openrouter"),
            panel.sampling_row: gr.Row(visible=possible or "hidden"),
            panel.enhance: gr.Button(visible=possible),
            panel.about: provider_note_html(by, offers, checkpoint, model, studio.settings),
            panel.accordion: gr.Accordion(label=i18n("Enhance prompt (on)") if possible else i18n(UPSAMPLING_TITLE)),
        }

    offer_outputs = [
        panel.local,
        panel.remote,
        panel.key,
        panel.sampling_row,
        panel.enhance,
        panel.about,
        panel.accordion,
    ]
    offer_inputs = [checkpoint_dropdown, panel.provider, panel.local]
    # Without a trigger: at every choice, and when the page is opened. Unqueued, because the shown note is outdated.
    listen(None, offer, offer_inputs, offer_outputs, queue=False)
    # Gradio shows a Number created with None as its minimum until it is set again.
    numbers = [panel.inputs[name] for name in ("temperature", "top_p", "max_tokens")]
    listen(None, lambda: [None] * len(numbers), None, numbers, queue=False)

    async def enhance(request: gr.Request, *state_values: Any, **values: Any) -> AsyncIterator[Update]:
        yield {
            **clear_enhanced_prompt(panel),
            panel.status: render.status(StatusEvent(text="Starting")),
            panel.stop: gr.Button(i18n("Stop"), visible=True, interactive=True),
        }
        problem = ""
        enhanced: PromptEnhanced | None = None
        try:
            submitted, key = await asyncio.to_thread(_read_enhancement_request, read_form, state_values, values)
            job = await asyncio.to_thread(jobs.enhance_prompt, submitted, tab_owner_of(request), key)
        except StudioError as error:
            problem = render.problem(str(error))
        else:
            yield {panel.job_id: job.id}
            notes: list[str] = []
            async for event in follow_task(job):
                match event:
                    case Queued():
                        yield {panel.status: render.queued(event)}
                    case StatusEvent():
                        yield {panel.status: render.status(event)}
                    case PromptProgress():
                        yield show_partial_prompt(event, panel)
                    case PromptEnhanced():
                        enhanced = event
                    case Notice(text=text):
                        notes.append(text)
                    case Failed(message=message):
                        problem, enhanced = render.problem(message), None
                    case Stopped():
                        notes.append("Stopped.")
                    case _:
                        pass  # the final Ready event; PromptEnhanced came before
            problem += render.notes(notes)
        yield {
            **show_enhancement_end(panel, enhanced, ENHANCED_INFO),
            panel.stop: gr.Button(visible=False),
            panel.status: problem,
            panel.job_id: "",
        }

    listen(
        panel.enhance.click,
        enhance,
        form_state,
        [*upsampling_outputs(panel), panel.stop, panel.status, panel.job_id],
        inputs_kwargs=form.fields | panel.inputs,
        concurrency_limit=None,
    )

    def use(prompt: str, by: str, text: str, before: list[tuple[str, str]]) -> Update:
        return {
            form.fields["prompt"]: text,
            panel.provider: "none",  # otherwise it would be enhanced again
            panel.undo_stack: [*before, (prompt, by)],
            panel.enhanced_prompt: gr.Textbox(visible=False),
            panel.use: gr.Button(visible=False),
            panel.undo: gr.Button(visible=True),
            panel.status: render.notes([USED_NOTE]),
        }

    def undo(before: list[tuple[str, str]]) -> Update:
        *remaining, (prompt, by) = before
        return {
            form.fields["prompt"]: prompt,
            panel.provider: by,
            panel.undo_stack: remaining,
            panel.undo: gr.Button(visible=bool(remaining)),
            panel.status: "",
        }

    restored = [form.fields["prompt"], panel.provider, panel.undo_stack, panel.undo, panel.status]
    listen(panel.stop.click, make_stop_handler(jobs), panel.job_id, panel.stop, queue=False)
    listen(
        panel.use.click,
        use,
        [form.fields["prompt"], panel.provider, panel.enhanced_prompt, panel.undo_stack],
        [*restored, panel.enhanced_prompt, panel.use],
        queue=False,
    )
    listen(panel.undo.click, undo, panel.undo_stack, restored, queue=False)


def _read_enhancement_request(
    read_form: UpsamplingFormReader, form_state: Sequence[Any], values: Mapping[str, Any]
) -> tuple[Request, ApiKey | None]:
    """The form's request and the API key. Raises `StudioError`."""
    request = read_form(*form_state, values)
    if request.upsampling.by == "none":
        raise UpsampleError("Choose first who enhances the prompt.")
    return request, read_api_key(values)
