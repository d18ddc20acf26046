"""The page's event handlers: form values to `Request`s, a run's events to component updates.

One `run` serves every form. It builds the request and queues it; `RunView` turns the job's events into updates. The job
queue does the work, so closing a tab only ends its updates.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError, StudioError, UpsampleError
from flux2_studio.events import Status
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.request import MAX_COUNT, MAX_SEED, Request, round_side
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms import reference_names as names
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.forms.live import wire_live
from flux2_studio.ui.forms.lora_panel import read_loras, wire_loras
from flux2_studio.ui.forms.mask_panel import read_mask, read_outpaint
from flux2_studio.ui.forms.readiness import wire_estimate, wire_preload
from flux2_studio.ui.forms.reference_panel import gallery_paths, reference_outputs, set_references, wire_references
from flux2_studio.ui.forms.tabs import Form, StagePanel
from flux2_studio.ui.forms.upsample_panel import (
    DRAWN_INFO,
    UPSAMPLING_INPUTS,
    clear_enhanced_prompt,
    read_api_key,
    read_upsampling,
    show_enhancement_end,
    upsampling_outputs,
    wire_upsampling,
)
from flux2_studio.ui.gradio_compat.language import translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen, make_stop_handler, tab_owner_of
from flux2_studio.ui.stage import compare, keep_preview, queue_panel, render
from flux2_studio.ui.stage.follower import Follower, RunViewProtocol, TabState, form_name_for
from flux2_studio.ui.stage.run_view import RunView, download_button, use_in_edit_label

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

# On a narrow screen the stage is below the form: scroll to it, where the picture or an error appears.
SCROLL_TO_STAGE_JS = """() => {
  const stage = document.getElementById('stage');
  if (stage && stage.getBoundingClientRect().top > window.innerHeight - 200) stage.scrollIntoView({behavior: 'smooth'});
}"""
# Scrolls back if the form that receives the picture is above the stage.
SCROLL_TO_FORM_JS = """() => {
  const [tabs, stage] = ['tabs', 'stage'].map((id) => document.getElementById(id).getBoundingClientRect());
  if (tabs.bottom <= stage.top) document.getElementById('tabs').scrollIntoView({behavior: 'smooth'});
}"""

# The selected picture, as the browser knows it at the click: the server may learn of it later.
SELECTED_INDEX_JS = """(picked, ...others) => {
  const shown = [...document.querySelectorAll('#gallery .thumbnail-lg')];
  const index = shown.findIndex((item) => item.classList.contains('selected'));
  return [index < 0 ? picked : index, ...others];
}"""

NO_SUCH_NAME = "No picture here is called {names}: it stays in the instruction as it is."


def wire_page(
    studio: Studio,
    jobs: JobQueue,
    examples: Examples,
    *,
    page: gr.Blocks,
    checkpoint_dropdown: gr.Dropdown,
    about: gr.HTML,
    loading: gr.HTML,
    tabs: gr.Tabs,
    forms: Sequence[Form],
    stage: StagePanel,
    queue: gr.HTML,
) -> None:
    """Connect the components of the page. `checkpoint_dropdown` is shared by all forms."""
    _wire_checkpoint(studio, examples, checkpoint_dropdown, about, forms)
    preloaded = wire_preload(studio, jobs, checkpoint_dropdown, loading)
    wire_loras(studio, checkpoint_dropdown, forms)
    estimate_lock = asyncio.Lock()
    for form in forms:
        _wire_seed(form)
        _wire_size(studio, checkpoint_dropdown, form)
        _wire_examples(studio, examples, checkpoint_dropdown, form)
        # stage.job_id changes when a run begins and when it ends.
        wire_estimate(studio, form, [preloaded, stage.job_id.change], estimate_lock)
        if form.reference_panel is not None:
            wire_references(studio, checkpoint_dropdown, form, form.reference_panel)
    _wire_runs(studio, jobs, page, checkpoint_dropdown, forms, stage, queue)
    _wire_identity(studio, forms)
    _wire_stage(studio, jobs, checkpoint_dropdown, tabs, next(form for form in forms if form.name == "edit"), stage)


def read_form(
    values: Mapping[str, Any], *, locked: bool, checkpoint: Checkpoint, form_checkpoint: str, aspect: str
) -> Request:
    """Convert a form's values to a request, without the API key among them. Raises `StudioError`.

    An unlocked seed becomes None, a random one. If the user chose a checkpoint and ran at once, the numbers still
    belong to `form_checkpoint`, the previous one: then they are left to `checkpoint`, and so is the size unless it was
    typed.
    """
    request_fields = {name: value for name, value in values.items() if name not in UPSAMPLING_INPUTS}
    request_fields["upsampling"] = read_upsampling(values)
    if form_checkpoint != checkpoint.name:
        request_fields |= {"steps": None, "guidance": None, "negative_prompt": None}
        if aspect in fields.ASPECTS:
            request_fields["width"], request_fields["height"] = fields.size_of(aspect, checkpoint)
    if aspect != fields.AS_REFERENCE:
        _check_typed_size(request_fields["width"], request_fields["height"])
    if not locked:
        request_fields["seed"] = None
    request_fields["loras"] = read_loras(request_fields.get("loras"))
    if "references" in request_fields:
        request_fields["prompt"] = names.expand_names(request_fields["prompt"], request_fields["references"])
        request_fields["references"] = gallery_paths(request_fields["references"])
        if not request_fields["references"]:
            raise RequestError("Add a picture first: drop one above the instruction, or choose an example.")
        request_fields["mask"] = read_mask(request_fields.get("mask"))
        request_fields["outpaint"] = read_outpaint(request_fields.get("outpaint"))
    return Request(**request_fields)


def _check_typed_size(width: int | None, height: int | None) -> None:
    for label, side in (("width", width), ("height", height)):
        if side is None:  # a missing side would silently get a default
            raise RequestError(f"Give the {label} in pixels, or choose a shape.")


# --- a run ------------------------------------------------------------------------------------------------------


def _wire_runs(
    studio: Studio,
    jobs: JobQueue,
    page: gr.Blocks,
    checkpoint_dropdown: gr.Dropdown,
    forms: Sequence[Form],
    stage: StagePanel,
    queue: gr.HTML,
) -> None:
    def read(locked: bool, form_checkpoint: str, aspect: str, values: Mapping[str, Any]) -> Request:
        checkpoint = studio.settings.checkpoint(values["checkpoint"])
        return read_form(values, locked=locked, checkpoint=checkpoint, form_checkpoint=form_checkpoint, aspect=aspect)

    def end_update(view: RunViewProtocol, form: Form, request: Request) -> Update:
        enhances_prompt = request.upsampling.by != "none"
        return {
            **(show_enhancement_end(form.upsampling, view.upsampled, DRAWN_INFO) if enhances_prompt else {}),
            stage.stop: gr.Button(visible=False),
            **_offer_unenhanced_run(stage, form if view.upsampling_failed else None),
        }

    def make_view(request: Request, form: Form) -> RunView:
        return RunView(stage, form.upsampling, studio.settings.checkpoint(request.checkpoint), studio.pictures)

    def make_begun_view(job: Job) -> RunView:
        view = make_view(job.request, next(form for form in forms if form.name == form_name_for(job.request)))
        view.begin(job)
        return view

    async def start_run(
        form: Form,
        tab_state: TabState,
        request: gr.Request,
        ask: Callable[[], Request],
        key_of: Callable[[], ApiKey | None],
    ) -> AsyncIterator[Update]:
        """Queue a run of `form` with the request from `ask`. Raises `gr.Error` if that fails."""
        # Large references take time to check before there is a job that reports progress.
        checking = form.reference_panel and not tab_state.is_following
        first = {stage.progress: render.status(Status(text="Checking the pictures"))} if checking else {}
        yield {**_set_run_buttons(forms, can_start=False), **first, **_offer_unenhanced_run(stage, None)}
        submitted: Request | None = None
        try:
            submitted = await asyncio.to_thread(ask)  # a mask is decoded and written
            if submitted.upsampling.by != "none":
                yield clear_enhanced_prompt(form.upsampling)
            job = await asyncio.to_thread(
                jobs.submit, submitted, owner_of(request), key_of(), tab=tab_owner_of(request)
            )
        except StudioError as error:
            enhances_prompt = submitted is not None and submitted.upsampling.by != "none"
            yield {
                **_set_run_buttons(forms, can_start=True),
                **(show_enhancement_end(form.upsampling, None, DRAWN_INFO) if enhances_prompt else {}),
                **({} if tab_state.is_following else {stage.progress: ""}),
                stage.message: render.problem(str(error)),
                **_offer_unenhanced_run(
                    stage, form if isinstance(error, UpsampleError) and submitted is not None else None
                ),
            }
            raise gr.Error(translate_message(str(error)), print_exception=False) from error
        yield {
            **_set_run_buttons(forms, can_start=True),
            **follower.begin(tab_state, job, form.name),
            form.fields["seed"]: job.request.seed,
        }

    follower = Follower(jobs, forms, stage, make_view, end_update)
    tab_state_component = gr.State(TabState())
    followed = [*stage.components, *(part for form in forms for part in upsampling_outputs(form.upsampling))]
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "multiple"}

    def follow_after(event: Any, follows: Any = follower.follow) -> None:
        """Make the tab follow its runs after `event`, and confirm when it has received everything."""
        done = event(follows, tab_state_component, followed, concurrency_limit=None, **private)
        done.then(follower.confirm_shown, tab_state_component, None, queue=False, **private)

    follow_after(page.load, follower.attach)  # also after a lost connection is restored
    for form in forms:
        form_state = [form.seed_lock, form.form_checkpoint, form.aspect]

        async def run(
            request: gr.Request, tab_state: TabState, *form_state: Any, form: Form = form, **values: Any
        ) -> AsyncIterator[Update]:
            def ask() -> Request:
                locked, form_checkpoint, aspect = form_state
                form_request = read(locked, form_checkpoint, aspect, values)
                if (
                    form.reference_panel
                    and form.reference_panel.tools
                    and (unknown := names.unknown_names(form_request.prompt))
                ):
                    gr.Warning(translate(NO_SUCH_NAME, names=", ".join(unknown)))
                return form_request

            async for update in start_run(form, tab_state, request, ask, lambda: read_api_key(values)):
                yield update

        async def run_unenhanced(
            request: gr.Request, tab_state: TabState, *form_state: Any, run: Any = run, **values: Any
        ) -> AsyncIterator[Update]:
            async for update in run(request, tab_state, *form_state, **values | {"upsample_by": "none"}):
                yield update

        for button, action in ((form.run, run), (getattr(stage, f"{form.name}_unenhanced"), run_unenhanced)):
            listen(button.click, None, js=SCROLL_TO_STAGE_JS)
            started_run = listen(
                button.click,
                action,
                [tab_state_component, *form_state],
                [*_run_outputs(stage, form), *(other.run for other in forms)],
                inputs_kwargs=form.fields | form.upsampling.inputs,
                concurrency_limit=None,
            )
            follow_after(started_run.then)
        wire_upsampling(studio, jobs, checkpoint_dropdown, form, read, form_state)
    wire_live(studio, jobs, checkpoint_dropdown, forms, stage, tab_state_component, read)
    keep_preview.wire_keep_preview(jobs, stage, make_begun_view)
    follow_after(queue_panel.wire_queue_panel(studio, jobs, queue, follower, tab_state_component, stage).then)


def _offer_unenhanced_run(stage: StagePanel, failed: Form | None) -> Update:
    """Offer to run `failed`, a form whose prompt enhancement failed, without it; None offers nothing."""
    buttons = {"generate": stage.generate_unenhanced, "edit": stage.edit_unenhanced, "multi": stage.multi_unenhanced}
    return {button: gr.Button(visible=failed is not None and failed.name == name) for name, button in buttons.items()}


def _set_run_buttons(forms: Sequence[Form], *, can_start: bool) -> Update:
    return {form.run: gr.Button(interactive=can_start) for form in forms}


def _run_outputs(stage: StagePanel, form: Form) -> list[Any]:
    """The components that a run of `form` changes, except the run buttons."""
    return [*stage.components, form.fields["seed"], *upsampling_outputs(form.upsampling)]


def _wire_stage(
    studio: Studio, jobs: JobQueue, checkpoint_dropdown: gr.Dropdown, tabs: gr.Tabs, edit: Form, stage: StagePanel
) -> None:
    def pick(images: list[str], before: Image.Image | None, event: gr.SelectData) -> Sequence[Any]:
        index = int(event.index)
        if not 0 <= index < len(images):
            return [gr.skip()] * 4
        slider = compare.slider_update(before, images[index])
        return index, download_button(images, index), gr.Button(use_in_edit_label(index, len(images))), slider

    def use(index: int | None, images: list[str], name: str) -> Any:
        if index is None or not 0 <= index < len(images):  # another run replaced the one that was shown
            return gr.skip()
        picture = Path(images[index])
        return {
            tabs: gr.Tabs(selected=edit.name),
            **set_references(edit, [picture], studio.settings.checkpoint(name), studio.pictures),
        }

    listen(stage.stop.click, make_stop_handler(jobs), stage.shown_job_id, stage.stop, queue=False)
    comparison = stage.comparison
    listen(
        stage.gallery.select,
        pick,
        [stage.result_paths, comparison.original],
        [stage.selected_index, stage.download, stage.use_in_edit, comparison.slider],
        trigger_mode="multiple",  # the last selection wins
    )
    listen(stage.use_in_edit.click, None, js=SCROLL_TO_FORM_JS)
    listen(
        stage.use_in_edit.click,
        use,
        [stage.selected_index, stage.result_paths, checkpoint_dropdown],
        [tabs, *reference_outputs(edit)],
        js=SELECTED_INDEX_JS,
    )


# --- the checkpoint and what depends on it ----------------------------------------------------------------------


def _wire_checkpoint(
    studio: Studio, examples: Examples, checkpoint_dropdown: gr.Dropdown, about: gr.HTML, forms: Sequence[Form]
) -> None:
    def describe(name: str) -> str:
        checkpoint = studio.settings.checkpoint(name)
        return fields.checkpoint_summary_html(checkpoint, studio.is_on_disk(checkpoint))

    def apply_checkpoint(name: str, *form_state: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        update: Update = {}
        for form, aspect, form_checkpoint in zip(
            forms, form_state[: len(forms)], form_state[len(forms) :], strict=True
        ):
            update[form.examples] = fields.other_examples(examples.of(form.name, checkpoint))
            if form_checkpoint == name:  # set together with the checkpoint, with values that must stay
                continue
            update |= {
                form.form_checkpoint: name,
                form.fields["steps"]: fields.steps(checkpoint),
                form.fields["guidance"]: fields.guidance(checkpoint),
                form.fields["negative_prompt"]: fields.negative_prompt(checkpoint),
            }
            if aspect in fields.ASPECTS:
                update |= dict(zip(_sides(form), fields.size_of(aspect, checkpoint), strict=True))
        return update

    outputs: list[Any] = []
    for form in forms:
        numbers = (form.fields[key] for key in ("steps", "guidance", "negative_prompt"))
        outputs += [form.form_checkpoint, *_sides(form), form.examples, *numbers]
    form_state = [*(form.aspect for form in forms), *(form.form_checkpoint for form in forms)]
    listen(checkpoint_dropdown.change, apply_checkpoint, [checkpoint_dropdown, *form_state], outputs)
    # Without a trigger: at every choice and when the page is opened, because a download may have finished.
    listen(None, describe, checkpoint_dropdown, about)


def _wire_examples(studio: Studio, examples: Examples, checkpoint_dropdown: gr.Dropdown, form: Form) -> None:
    def use_example(index: int, name: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        example = examples.of(form.name, checkpoint)[index]
        update: Update = {form.fields["prompt"]: example.prompt}
        return (
            update | set_references(form, example.references, checkpoint, studio.pictures)
            if form.reference_panel
            else update
        )

    outputs = [form.fields["prompt"], *(reference_outputs(form) if form.reference_panel else [])]
    listen(form.examples.click, use_example, [form.examples, checkpoint_dropdown], outputs)


def _wire_identity(studio: Studio, forms: Sequence[Form]) -> None:
    def describe_identity() -> list[str]:
        try:
            html = render.notes([studio.signer.identity.signature_meaning])
        except StudioError as error:
            html = render.problem(str(error))
        return [html] * len(forms)

    # When the page is opened. The first time, this makes the local identity.
    listen(None, describe_identity, None, [form.identity for form in forms])
    for form in forms:
        listen(
            form.fields["sign"].change,
            lambda signs: (gr.HTML(visible=signs), gr.Checkbox(interactive=signs)),
            form.fields["sign"],
            [form.identity, form.fields["sign_prompt"]],
            queue=False,
        )


# --- seed and size ----------------------------------------------------------------------------------------------


def _wire_seed(form: Form) -> None:
    seed = form.fields["seed"]
    # Gradio shows a Number created with None as 0 until it is set again, so set it when the page is opened. In the
    # browser, because a server response might overwrite what the user types meanwhile.
    listen(None, None, None, seed, js="() => null")
    # A new or typed seed is meant to be used, so both lock it. In the browser, so that a run started at once has it.
    roll = f"() => [Math.floor(Math.random() * {MAX_SEED - MAX_COUNT}), true]"
    listen(form.new_seed.click, None, None, [seed, form.seed_lock], js=roll)
    listen(seed.input, None, seed, form.seed_lock, js="(seed) => seed !== null")


def _wire_size(studio: Studio, checkpoint_dropdown: gr.Dropdown, form: Form) -> None:
    width, height = _sides(form)

    def preset(aspect: str, name: str, *now: int | None) -> Sequence[Any]:
        if aspect == fields.AS_REFERENCE:
            return *fields.sides(None), ""
        if aspect == fields.FREE and None not in now:
            return gr.Number(visible=True), gr.Number(visible=True), ""
        return *fields.sides(fields.size_of(aspect, studio.settings.checkpoint(name))), ""

    # `input`, not `change`: a change made by `settle` must not set the size again.
    size_outputs = [width, height, form.size_note]
    size_inputs = [form.aspect, checkpoint_dropdown, width, height]
    # First in the browser, so that a run started at once has it.
    listen(form.aspect.input, None, size_inputs, [width, height], js=_sizes(studio.settings.checkpoints))
    listen(form.aspect.input, preset, size_inputs, size_outputs, queue=False, trigger_mode="always_last")
    for side, label in ((width, "width"), (height, "height")):

        def settle(across: int | None, down: int | None, name: str, label: str = label) -> Sequence[Any]:
            pixels = across if label == "width" else down
            rounded, note, aspect = settle_side(pixels, across, down, label, studio.settings.checkpoint(name))
            # Update only this field: the user may be typing in the other one.
            return gr.skip() if rounded == pixels else rounded, note, aspect

        listen(
            [side.blur, side.submit],
            settle,
            [width, height, checkpoint_dropdown],
            [side, form.size_note, form.aspect],
            queue=False,
        )


def _sizes(checkpoints: Sequence[Checkpoint]) -> str:
    """The JavaScript version of `preset` in `_wire_size`."""
    shapes = [*fields.ASPECTS, fields.FREE]
    table = {each.name: {shape: fields.size_of(shape, each) for shape in shapes} for each in checkpoints}
    return f"""(aspect, name, ...now) => {{
      if (aspect === {json.dumps(fields.AS_REFERENCE)}) return [null, null];
      if (aspect === {json.dumps(fields.FREE)} && !now.includes(null)) return now;
      return ({json.dumps(table)})[name]?.[aspect] ?? now;
    }}"""


def settle_side(
    pixels: int | None, width: int | None, height: int | None, label: str, checkpoint: Checkpoint
) -> tuple[int | None, str, str]:
    """Round a typed side of `pixels`. Returns it, a note as HTML, and the shape of `width` x `height` when rounded."""
    try:
        _check_typed_size(width, height)
        assert pixels is not None and width is not None and height is not None
        side = round_side(pixels, label)
        size = round_side(width, "width"), round_side(height, "height")
        # The same check as at the start of the run.
        Request(prompt="size", width=width, height=height).resolve(checkpoint)
    except RequestError as error:
        return pixels, render.problem(str(error)), fields.FREE
    note = f"The {label} was rounded from {pixels} to {side}: FLUX.2 draws in multiples of 16."
    shapes = [shape for shape in fields.ASPECTS if fields.size_of(shape, checkpoint) == size]
    return side, "" if side == pixels else render.notes([note]), shapes[0] if shapes else fields.FREE


def _sides(form: Form) -> tuple[gr.Number, gr.Number]:
    return form.fields["width"], form.fields["height"]
