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
from flux2_studio.jobs.tasks import Draft
from flux2_studio.request import MAX_COUNT, MAX_SEED, Request
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.tabs import Form, LivePanel, Stage
from flux2_studio.ui.gradio_compat.language import say, told
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, follow, listen
from flux2_studio.ui.stage import compare, show
from flux2_studio.ui.stage.following import Watch

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

LOOK = 0.02  # seconds between two looks at a draft: it is done in a few of them
# Seconds from one picture to the next preview: each costs the browser time that the typing and the picture itself need.
REST = 0.4
SAYS_NOTHING = ("count", "format", "watermark", "metadata", "sign", "sign_prompt")  # of how the picture looks
EMPTY = "Live: write a prompt, and its picture appears here."

# Another seed would be another picture after every letter: one is taken, and kept.
KEEP_SEED = f"""(on, seed, locked) => on
  ? [seed ?? Math.floor(Math.random() * {MAX_SEED - MAX_COUNT}), true]
  : [seed, locked]"""
COUNT = "(on, pulse) => on ? pulse + 1 : pulse"

Read = Callable[[bool, str, str, Mapping[str, Any]], Request]


@dataclass
class Latest:
    """What one tab last wanted to see. following: whether a handler is showing it. painted: when a picture was last
    shown, by the clock that only goes on."""

    draft: Draft | None = None
    following: bool = False
    painted: float = 0.0


def wire_live(
    studio: Studio,
    jobs: JobQueue,
    chosen: gr.Dropdown,
    forms: Sequence[Form],
    stage: Stage,
    watch: gr.State,
    read: Read,
) -> None:
    """Let each of `forms` that can be live be so. watch: what the tab follows; a run goes before every draft."""
    latest = gr.State(Latest())
    mat = [stage.preview, stage.gallery, stage.actions, stage.keep, stage.details]
    shown_on = [*mat, stage.comparison.folded, stage.comparison.before, stage.progress, stage.message, stage.notices]

    async def follow_latest(latest: Latest, watch: Watch) -> AsyncIterator[Update]:
        if latest.following or latest.draft is None:
            yield gr.skip()  # who follows already comes to it
            return
        latest.following = True
        try:
            while (draft := latest.draft) is not None:
                async for update in shown(latest, watch, draft, stage):
                    yield update
                if latest.draft is draft:
                    latest.draft = None
        finally:
            latest.following = False

    def wire(form: Form, panel: LivePanel) -> None:
        async def draw(
            request: gr.Request,
            on: bool,
            wake: int,
            latest: Latest,
            watch: Watch,
            locked: bool,
            laid_out_for: str,
            aspect: str,
            **values: Any,
        ) -> Any:
            def runs() -> bool:
                return watch.following

            if not on or runs() or not studio.settings.checkpoint(values["checkpoint"]).quick:
                return gr.skip()
            if not str(values["prompt"]).strip():
                return {stage.progress: show.hint(say(EMPTY))}
            try:
                asked = await asyncio.to_thread(read, locked, laid_out_for, aspect, values)  # a mask is decoded
                if runs():  # one began meanwhile
                    return gr.skip()
                latest.draft = jobs.draft(asked, owner_of(request))
            except StudioError as error:
                return {stage.progress: show.hint(say("Live: {problem}", problem=told(str(error))))}
            # An event costs the browser time that the typing needs: none where the one under way comes to this draft.
            return gr.skip() if latest.following else {panel.wake: wake + 1}

        seed = form.fields["seed"]
        listen(panel.on.input, None, [panel.on, seed, form.lock], [seed, form.lock], js=KEEP_SEED)
        looks = [field for name, field in form.fields.items() if name not in SAYS_NOTHING]
        changes = [panel.on.input, form.lock.input, *(field.change for field in looks)]
        listen(changes, None, [panel.on, panel.pulse], panel.pulse, js=COUNT)
        listen(
            panel.pulse.change,
            draw,
            [panel.on, panel.wake, latest, watch, form.lock, form.laid_out_for, form.aspect],
            [stage.progress, panel.wake],
            inputs_kwargs=form.fields | form.upsampling.inputs,
            queue=False,
            trigger_mode="always_last",
        )
        listen(
            panel.wake.change,
            follow_latest,
            [latest, watch],
            shown_on,
            concurrency_limit=None,
            trigger_mode="multiple",
        )
        listen(chosen.change, lambda name: fields.live(studio.settings.checkpoint(name)), chosen, panel.on, queue=False)

    for form in forms:
        if form.live is not None:
            wire(form, form.live)


async def shown(latest: Latest, watch: Watch, draft: Draft, stage: Stage) -> AsyncIterator[Update]:
    """What `draft` changes on the stage, until it is done, or not wanted any more."""
    notices: list[str] = []
    # As long as it is the latest, and the tab shows no run.
    async for event in follow(draft, LOOK, lambda: latest.draft is draft and not watch.following):
        match event:
            case Queued():
                yield {stage.progress: show.queued(event)}
            case Status(fraction=fraction) if fraction is not None:  # a load or a download; the rest is over too soon
                yield {stage.progress: show.status(event)}
            case Notice():
                notices.append(event.text)
            case Preview(images=images) if images and time.monotonic() - latest.painted > REST:
                latest.painted = time.monotonic()
                picture = await asyncio.to_thread(show.draft, images[0], draft.request.prompt)
                yield {**_mat(stage, picture), stage.progress: show.step(event)}
            case Drafted():
                latest.painted = time.monotonic()
                picture = await asyncio.to_thread(show.draft, event.image, event.request.prompt)
                yield {
                    **_mat(stage, picture),
                    stage.progress: show.drafted(event),
                    stage.notices: show.notices(notices),
                    stage.message: "",
                }
            case Failed(message=message):
                yield {stage.progress: "", stage.message: show.problem(told(message))}
            case _:  # Stopped, which only what comes in its place does; and words that nobody could read
                pass


def _mat(stage: Stage, picture: str) -> Update:
    """`picture` in place of whatever lay there."""
    return {
        stage.preview: gr.HTML(picture, visible=True),
        stage.gallery: gr.Gallery(visible=False),
        stage.actions: gr.Row(visible=False),
        stage.keep: gr.Button(visible=False),
        stage.details: gr.Accordion(visible=False),
        **compare.hidden(stage.comparison),
    }
