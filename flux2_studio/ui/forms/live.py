"""Live: the picture follows the form while the user types, for checkpoints that need few steps.

The browser counts the changes, and sends the newest count once the server has taken the one before. The server then
draws the form as it is at that moment, and drops the tab's draft before it. So nothing queues up on either side, and
the last picture belongs to the last change.
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

DRAFT_POLL_SECONDS = 0.02  # a draft is done in a few of these
# From one picture to the next preview. Each costs the browser time that typing and the picture itself need.
MIN_PREVIEW_INTERVAL_SECONDS = 0.4
# Fields that do not change how a draft looks.
NON_VISUAL_FIELDS = ("count", "format", "watermark", "metadata", "sign", "sign_prompt")
LIVE_HINT = "Live: write a prompt, and its picture appears here."

# Switching Live on locks a seed: with a new seed the picture would change completely at every key.
KEEP_SEED_JS = f"""(on, seed, locked) => on
  ? [seed ?? Math.floor(Math.random() * {MAX_SEED - MAX_COUNT}), true]
  : [seed, locked]"""
COUNT_CHANGE_JS = "(on, pulse) => on ? pulse + 1 : pulse"

FormReader = Callable[[bool, str, str, Mapping[str, Any]], Request]


@dataclass
class LiveState:
    """The latest draft of one tab.

    is_following: whether a handler is showing it. shown_at: when a picture was last shown, in monotonic time.
    """

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
    """Connect Live for each of `forms` that has it. tab_state: the runs that the tab follows; they precede drafts."""
    latest = gr.State(LiveState())
    stage_outputs = [stage.preview, stage.gallery, stage.actions, stage.keep_preview, stage.details]
    shown_on = [
        *stage_outputs,
        stage.comparison.accordion,
        stage.comparison.original,
        stage.progress,
        stage.message,
        stage.notices,
    ]

    async def follow_latest(live_state: LiveState, tab_state: TabState) -> AsyncIterator[Update]:
        if live_state.is_following or live_state.draft is None:
            yield gr.skip()  # the handler that is following already will show it
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
                submitted = await asyncio.to_thread(read_form, locked, form_checkpoint, aspect, values)  # saves a mask
                if runs():  # a run began meanwhile
                    return gr.skip()
                live_state.draft = jobs.draft(submitted, owner_of(request))
            except StudioError as error:
                return {
                    stage.progress: render.hint(translate("Live: {problem}", problem=translate_message(str(error))))
                }
            # Events cost the browser time that typing needs: send none if the current handler will show this draft.
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
    """Yield the updates of the stage for `draft`, until it is done or replaced."""
    notices: list[str] = []
    # Only while it is the latest draft and the tab shows no run.
    async for event in follow_task(
        draft, DRAFT_POLL_SECONDS, lambda: live_state.draft is draft and not tab_state.is_following
    ):
        match event:
            case Queued():
                yield {stage.progress: render.queued(event)}
            case Status(fraction=fraction) if (
                fraction is not None
            ):  # loading or downloading; other statuses are too short
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
            case _:  # Stopped, because a newer draft replaced it, and statuses too short to read
                pass


def _show_picture(stage: StagePanel, picture: str) -> Update:
    """Show `picture` and hide everything else on the stage."""
    return {
        stage.preview: gr.HTML(picture, visible=True),
        stage.gallery: gr.Gallery(visible=False),
        stage.actions: gr.Row(visible=False),
        stage.keep_preview: gr.Button(visible=False),
        stage.details: gr.Accordion(visible=False),
        **compare.hide_comparison(stage.comparison),
    }
