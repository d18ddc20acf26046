"""Live: the picture follows what is typed, for checkpoints of so few steps that nobody waits for them.

The browser counts the changes and tells the newest count only, once the one before was taken; the server draws the form
as it is by then, in place of what it drew for the tab before. So nothing queues up on either side, and what is shown
last belongs to what was typed last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.events import Drafted, Failed, Notice, Preview, Queued, Status
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import DraftJob
from flux2_studio.request import MAX_COUNT, MAX_SEED, Request
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.tabs import Form, LivePanel, StagePanel
from flux2_studio.ui.gradio_compat.language import translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, follow_task, listen
from flux2_studio.ui.stage import compare, render
from flux2_studio.ui.stage.follower import TabState

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

DRAFT_POLL_SECONDS = 0.02  # seconds between two looks at a draft: it is done in a few of them
# Seconds from one picture to the next preview: each costs the browser time that the typing and the picture itself need.
MIN_PREVIEW_INTERVAL_SECONDS = 0.4
NON_VISUAL_FIELDS = ("count", "format", "watermark", "metadata", "sign", "sign_prompt")  # of how the picture looks
LIVE_HINT = "Live: write a prompt, and its picture appears here."

# Another seed would be another picture after every letter: one is taken, and kept.
KEEP_SEED_JS = f"""(on, seed, locked) => on
  ? [seed ?? Math.floor(Math.random() * {MAX_SEED - MAX_COUNT}), true]
  : [seed, locked]"""
COUNT_CHANGE_JS = "(on, pulse) => on ? pulse + 1 : pulse"

FormReader = Callable[[bool, str, str, Mapping[str, Any]], Request]


@dataclass
class LiveState:
    """What one tab last wanted to see. is_following: whether a handler is showing it. shown_at: when a picture was last
    shown, by the clock that only goes on."""

    draft: DraftJob | None = None
    is_following: bool = False
    shown_at: float = 0.0


def wire_live(
    studio: Studio,
    jobs: JobQueue,
    checkpoint_dropdown: gr.Dropdown,
    forms: Sequence[Form],
    stage: StagePanel,
    tab_state: gr.State,
    read_form: FormReader,
) -> None:
    """Let each of `forms` that can be live be so. tab_state: what the tab follows; a run goes before every draft."""
    latest = gr.State(LiveState())
    mat = [stage.preview, stage.gallery, stage.actions, stage.keep_preview, stage.details]
    shown_on = [
        *mat,
        stage.comparison.accordion,
        stage.comparison.original,
        stage.progress,
        stage.message,
        stage.notices,
    ]

    async def follow_latest(live_state: LiveState, tab_state: TabState) -> AsyncIterator[Update]:
        if live_state.is_following or live_state.draft is None:
            yield gr.skip()  # who follows already comes to it
            return
        live_state.is_following = True
        try:
            while (draft := live_state.draft) is not None:
                async for update in follow_draft(live_state, tab_state, draft, stage):
                    yield update
                if live_state.draft is draft:
                    live_state.draft = None
        finally:
            live_state.is_following = False

    def wire(form: Form, panel: LivePanel) -> None:
        async def draw(
            request: gr.Request,
            on: bool,
            wake: int,
            live_state: LiveState,
            tab_state: TabState,
            locked: bool,
            form_checkpoint: str,
            aspect: str,
            **values: Any,
        ) -> Any:
            def runs() -> bool:
                return tab_state.is_following

            if not on or runs() or not studio.settings.checkpoint(values["checkpoint"]).supports_live:
                return gr.skip()
            if not str(values["prompt"]).strip():
                return {stage.progress: render.hint(translate(LIVE_HINT))}
            try:
                asked = await asyncio.to_thread(read_form, locked, form_checkpoint, aspect, values)  # a mask is decoded
                if runs():  # one began meanwhile
                    return gr.skip()
                live_state.draft = jobs.draft(asked, owner_of(request))
            except StudioError as error:
                return {
                    stage.progress: render.hint(translate("Live: {problem}", problem=translate_message(str(error))))
                }
            # An event costs the browser time that the typing needs: none where the one under way comes to this draft.
            return gr.skip() if live_state.is_following else {panel.wake_counter: wake + 1}

        seed = form.fields["seed"]
        listen(panel.on.input, None, [panel.on, seed, form.seed_lock], [seed, form.seed_lock], js=KEEP_SEED_JS)
        looks = [field for name, field in form.fields.items() if name not in NON_VISUAL_FIELDS]
        changes = [panel.on.input, form.seed_lock.input, *(field.change for field in looks)]
        listen(changes, None, [panel.on, panel.change_counter], panel.change_counter, js=COUNT_CHANGE_JS)
        listen(
            panel.change_counter.change,
            draw,
            [panel.on, panel.wake_counter, latest, tab_state, form.seed_lock, form.form_checkpoint, form.aspect],
            [stage.progress, panel.wake_counter],
            inputs_kwargs=form.fields | form.upsampling.inputs,
            queue=False,
            trigger_mode="always_last",
        )
        listen(
            panel.wake_counter.change,
            follow_latest,
            [latest, tab_state],
            shown_on,
            concurrency_limit=None,
            trigger_mode="multiple",
        )
        listen(
            checkpoint_dropdown.change,
            lambda name: fields.live(studio.settings.checkpoint(name)),
            checkpoint_dropdown,
            panel.on,
            queue=False,
        )

    for form in forms:
        if form.live is not None:
            wire(form, form.live)


async def follow_draft(
    live_state: LiveState, tab_state: TabState, draft: DraftJob, stage: StagePanel
) -> AsyncIterator[Update]:
    """What `draft` changes on the stage, until it is done, or not wanted any more."""
    notices: list[str] = []
    # As long as it is the latest, and the tab shows no run.
    async for event in follow_task(
        draft, DRAFT_POLL_SECONDS, lambda: live_state.draft is draft and not tab_state.is_following
    ):
        match event:
            case Queued():
                yield {stage.progress: render.queued(event)}
            case Status(fraction=fraction) if fraction is not None:  # a load or a download; the rest is over too soon
                yield {stage.progress: render.status(event)}
            case Notice():
                notices.append(event.text)
            case Preview(images=images) if (
                images and time.monotonic() - live_state.shown_at > MIN_PREVIEW_INTERVAL_SECONDS
            ):
                live_state.shown_at = time.monotonic()
                picture = await asyncio.to_thread(render.draft, images[0], draft.request.prompt)
                yield {**_show_picture(stage, picture), stage.progress: render.step(event)}
            case Drafted():
                live_state.shown_at = time.monotonic()
                picture = await asyncio.to_thread(render.draft, event.image, event.request.prompt)
                yield {
                    **_show_picture(stage, picture),
                    stage.progress: render.drafted(event),
                    stage.notices: render.notices(notices),
                    stage.message: "",
                }
            case Failed(message=message):
                yield {stage.progress: "", stage.message: render.problem(translate_message(message))}
            case _:  # Stopped, which only what comes in its place does; and words that nobody could read
                pass


def _show_picture(stage: StagePanel, picture: str) -> Update:
    """`picture` in place of whatever lay there."""
    return {
        stage.preview: gr.HTML(picture, visible=True),
        stage.gallery: gr.Gallery(visible=False),
        stage.actions: gr.Row(visible=False),
        stage.keep_preview: gr.Button(visible=False),
        stage.details: gr.Accordion(visible=False),
        **compare.hide_comparison(stage.comparison),
    }
