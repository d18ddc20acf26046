"""What happens on the page: events to `Request`s, a run's events to components.

One `run` serves every form. It builds the request, follows the job and maps what the job says; the work is done by
the job queue, so a closed tab ends only the following.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError, StudioError, UpsampleError
from flux2_studio.events import (
    Event,
    Failed,
    Notice,
    Preview,
    Queued,
    Result,
    Saved,
    Status,
    Stopped,
    Upsampled,
    Withheld,
    Writing,
)
from flux2_studio.jobs import Job, JobQueue
from flux2_studio.request import MAX_COUNT, MAX_SEED, Request, Upsampling, round_side
from flux2_studio.ui import compare, fields, show
from flux2_studio.ui.examples import Examples
from flux2_studio.ui.lora_panel import choices, wire_loras
from flux2_studio.ui.mask_panel import read_mask, read_outpaint
from flux2_studio.ui.readiness import wire_outlook, wire_preparation
from flux2_studio.ui.reference_panel import offer, offered_to, paths, wire_references
from flux2_studio.ui.tabs import EMPTY, Form, Stage, UpsamplingPanel
from flux2_studio.ui.upsample_panel import (
    DRAWN,
    INPUTS,
    begun,
    ended,
    enriched,
    read_choice,
    read_key,
    shown,
    wire_upsampling,
    writing,
)
from flux2_studio.ui.wiring import Update, follow, listen, stopper
from flux2_studio.upsample import ApiKey

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

# On a narrow screen the stage lies below the form: go there, where the picture appears, or why there is none.
GO_TO_STAGE = """() => {
  const stage = document.getElementById('stage');
  if (stage && stage.getBoundingClientRect().top > window.innerHeight - 200) stage.scrollIntoView({behavior: 'smooth'});
}"""
# And back, where the form that takes the picture lies above it.
GO_TO_FORM = """() => {
  const [tabs, stage] = ['tabs', 'stage'].map((id) => document.getElementById(id).getBoundingClientRect());
  if (tabs.bottom <= stage.top) document.getElementById('tabs').scrollIntoView({behavior: 'smooth'});
}"""


def wire(
    studio: Studio,
    jobs: JobQueue,
    examples: Examples,
    *,
    chosen: gr.Dropdown,
    about: gr.HTML,
    loading: gr.HTML,
    tabs: gr.Tabs,
    forms: Sequence[Form],
    stage: Stage,
) -> None:
    """Connect the laid-out components. `chosen` is the checkpoint choice that the forms share."""
    _wire_checkpoint(studio, examples, chosen, about, forms)
    wire_preparation(studio, jobs, chosen, loading)
    wire_loras(studio, chosen, forms)
    for form in forms:
        _wire_seed(form)
        _wire_size(studio, chosen, form)
        _wire_examples(studio, examples, chosen, form)
        wire_outlook(studio, form)
        if form.panel is not None:
            wire_references(studio, chosen, form, form.panel)
    _wire_runs(studio, jobs, chosen, forms, stage)
    _wire_identity(studio, forms)
    _wire_stage(studio, jobs, chosen, tabs, next(form for form in forms if form.name == "edit"), stage)


def read_form(
    values: Mapping[str, Any], *, locked: bool, checkpoint: Checkpoint, laid_out_for: str, aspect: str
) -> Request:
    """A form's values as a request, without the key that is among them. An unlocked seed is left to chance. Raises
    `StudioError`.

    Whoever chooses a checkpoint and runs at once sends the numbers that were `laid_out_for` the one before: then they
    are left to `checkpoint`, and so is the size unless it was typed.
    """
    read = {name: value for name, value in values.items() if name not in INPUTS}
    read["upsampling"] = read_choice(values)
    if laid_out_for != checkpoint.name:
        read |= {"steps": None, "guidance": None, "negative_prompt": None}
        if aspect in fields.ASPECTS:
            read["width"], read["height"] = fields.size_of(aspect, checkpoint)
    if aspect != fields.AS_REFERENCE:
        _check_typed(read["width"], read["height"])
    if not locked:
        read["seed"] = None
    read["loras"] = choices(read.get("loras"))
    if "references" in read:
        read["references"] = paths(read["references"])
        if not read["references"]:
            raise RequestError("Add a picture first: drop one above the instruction, or choose an example.")
        read["mask"] = read_mask(read.get("mask"))
        read["outpaint"] = read_outpaint(read.get("outpaint"))
    return Request(**read)


def _check_typed(width: int | None, height: int | None) -> None:
    for label, side in (("width", width), ("height", height)):
        if side is None:  # alone, it would be left to chance or to the checkpoint
            raise RequestError(f"Give the {label} in pixels, or choose a shape.")


# --- a run ------------------------------------------------------------------------------------------------------


def _wire_runs(studio: Studio, jobs: JobQueue, chosen: gr.Dropdown, forms: Sequence[Form], stage: Stage) -> None:
    def read(locked: bool, laid_out_for: str, aspect: str, values: Mapping[str, Any]) -> Request:
        checkpoint = studio.settings.checkpoint(values["checkpoint"])
        return read_form(values, locked=locked, checkpoint=checkpoint, laid_out_for=laid_out_for, aspect=aspect)

    async def carried_out(
        form: Form, ask: Callable[[], Request], key_of: Callable[[], ApiKey | None], owner: str
    ) -> AsyncIterator[Update]:
        """A run of `form`, from the request that `ask` gives to its end. Raises `gr.Error` where it failed."""
        # Large references take their time before the job is there to tell of it.
        checking = {stage.progress: show.status(Status(text="Checking the pictures"))} if form.panel else {}
        yield {**_runs(forms, can_start=False), **checking, **_without(stage, None)}
        asked: Request | None = None
        failure: str | None = None
        without = False  # whether it would go on without enriching the prompt
        done: Upsampled | None = None
        try:
            asked = ask()
            if asked.upsampling.by != "none":
                yield begun(form.upsampling)
            job = await asyncio.to_thread(jobs.submit, asked, owner, key_of())
        except StudioError as error:
            failure, without = str(error), isinstance(error, UpsampleError) and asked is not None
            yield {stage.message: show.problem(str(error)), stage.progress: ""}
        else:
            view = RunView(stage, form.upsampling, studio.settings.checkpoint(job.request.checkpoint))
            yield {**view.begin(job), form.fields["seed"]: job.request.seed}
            async for event in follow(job):
                if update := await asyncio.to_thread(view.update, event):  # Gradio takes none for a mistake
                    yield update
            failure, without = view.failure, view.upsampling_failed
            done = view.upsampled
        yield {
            **_runs(forms, can_start=True),
            **(ended(form.upsampling, done, DRAWN) if asked and asked.upsampling.by != "none" else {}),
            # Once more: where a run ends as soon as it begins, the browser may mix up the two updates.
            stage.stop: gr.Button(visible=False),
            **_without(stage, form if without else None),
        }
        if failure is not None:
            raise gr.Error(failure, print_exception=False)

    for form in forms:
        around = [form.lock, form.laid_out_for, form.aspect]

        async def run(request: gr.Request, *around: Any, form: Form = form, **values: Any) -> AsyncIterator[Update]:
            def ask() -> Request:
                locked, laid_out_for, aspect = around
                return read(locked, laid_out_for, aspect, values)

            async for update in carried_out(form, ask, lambda: read_key(values), request.session_hash or ""):
                yield update

        async def plain(request: gr.Request, *around: Any, run: Any = run, **values: Any) -> AsyncIterator[Update]:
            async for update in run(request, *around, **values | {"upsample_by": "none"}):
                yield update

        for button, action in ((form.run, run), (getattr(stage, f"without_{form.name}"), plain)):
            listen(button.click, None, js=GO_TO_STAGE)
            listen(
                button.click,
                action,
                around,
                [*_staged(stage, form), *(other.run for other in forms)],
                inputs_kwargs=form.fields | form.upsampling.inputs,
                concurrency_limit=None,
            )
        wire_upsampling(studio, jobs, chosen, form, read, around)


def _without(stage: Stage, failed: Form | None) -> Update:
    """Offer to run the form whose prompt could not be enriched without that; None where there is none."""
    buttons = {"generate": stage.without_generate, "edit": stage.without_edit, "multi": stage.without_multi}
    return {button: gr.Button(visible=failed is not None and failed.name == name) for name, button in buttons.items()}


def _runs(forms: Sequence[Form], *, can_start: bool) -> Update:
    return {form.run: gr.Button(interactive=can_start) for form in forms}


def _staged(stage: Stage, form: Form) -> list[Any]:
    """The components that a run of `form` changes, but for the buttons that start one."""
    comparison = stage.comparison
    parts = [part for part in vars(stage).values() if part is not comparison]
    return [*parts, *vars(comparison).values(), form.fields["seed"], *shown(form.upsampling)]


class RunView:
    """What the page shows of one run, event by event: on the stage, and in its form's panel what a language model
    writes."""

    def __init__(self, stage: Stage, panel: UpsamplingPanel, checkpoint: Checkpoint) -> None:
        self.failure: str | None = None
        self.upsampling_failed = False
        self._stage = stage
        self._panel = panel
        self.upsampled: Upsampled | None = None
        self._saved: dict[Path, int] = {}  # with the seed of each
        self._count = 1
        self._checkpoint = checkpoint
        self._notices: list[str] = []
        self._images: dict[int, Image.Image] = {}
        self._request: Request | None = None

    def begin(self, job: Job) -> Update:
        stage = self._stage
        self._request = job.request
        return {
            stage.job: job.id,
            stage.message: "",
            stage.preview: gr.HTML(EMPTY, visible=True),
            stage.gallery: gr.Gallery(visible=False),
            stage.progress: show.status(Status(text="Starting")),
            stage.stop: gr.Button("Stop", visible=True, interactive=True),
            stage.notices: show.notices(self._notices),
            stage.actions: gr.Row(visible=False),
            stage.details: gr.Accordion(visible=False),
            **compare.hidden(stage.comparison),
        }

    def update(self, event: Event) -> Update:
        """The components that `event` changes. Draws previews, so not for the event loop."""
        stage = self._stage
        match event:
            case Queued():
                return {stage.progress: show.queued(event)}
            case Status():
                return {stage.progress: show.status(event)}
            case Notice():
                self._notices.append(event.text)
                return {stage.notices: show.notices(self._notices)}
            case Writing():
                return writing(event, self._panel)
            case Upsampled():
                self.upsampled = event
                assert self._request is not None, "begin first"
                self._request = replace(self._request, prompt=event.prompt, upsampling=Upsampling())
                return enriched(event, self._panel, DRAWN)
            case Preview():
                shown: Update = {stage.progress: show.step(event)}
                self._count = event.count
                if event.images:
                    self._images.update(enumerate(event.images, event.first))
                    shown[stage.preview] = self._previews()
                return shown
            case Saved():
                self._saved[event.image] = event.seed
                return {}
            case Withheld():
                self._images.pop(event.index, None)
                return {stage.preview: self._previews()}
            case Result():
                return {
                    stage.progress: show.done(event),
                    **self._pictures(event.images, event.seeds, event.provenance),
                }
            case Stopped():
                update: Update = {stage.progress: show.stopped(len(event.images)), **self._end()}
                return {**update, **self._pictures(event.images, event.seeds)} if event.images else update
            case Failed():
                self.failure, self.upsampling_failed = event.message, event.upsampling
                failed: Update = {stage.progress: "", stage.message: show.problem(event.message), **self._end()}
                if not self._saved:
                    return failed
                return {**failed, **self._pictures(list(self._saved), list(self._saved.values()))}
            case _:
                raise AssertionError(f"{event} is no run's")

    def _previews(self) -> str:
        return show.picture(self._images, self._count) if self._images else EMPTY

    def _end(self) -> Update:
        return {self._stage.stop: gr.Button(visible=False), self._stage.job: ""}

    def _pictures(
        self, images: Sequence[Path], seeds: Sequence[int], provenance: Sequence[str] | None = None
    ) -> Update:
        stage, request = self._stage, self._request
        assert request is not None, "begin first"
        one = len(images) == 1
        captions = [f"seed {seed}" for seed in seeds]
        return {
            **self._end(),
            stage.results: [str(path) for path in images],
            stage.picked: 0,
            stage.preview: gr.HTML(visible=False),
            stage.gallery: gr.Gallery(
                [(str(path), caption) for path, caption in zip(images, captions, strict=True)],
                visible=True,
                columns=show.columns(len(images)),
                selected_index=0 if one else None,
            ),
            stage.actions: gr.Row(visible=True),
            stage.download: _download(images, 0),
            stage.edit: gr.Button(_use_label(0, len(images))),
            **compare.shown(stage.comparison, request, self._checkpoint, images[0]),
            stage.details: gr.Accordion(visible=True),
            stage.table: show.settings(request, seeds, self._checkpoint, self.upsampled) + show.provenance(provenance),
            stage.json: show.settings_json(request),
        }


def _download(images: Sequence[Path | str], index: int) -> gr.DownloadButton:
    label = "Download" if len(images) == 1 else f"Download picture {index + 1} of {len(images)}"
    return gr.DownloadButton(label, value=str(images[index]))


def _use_label(index: int, count: int) -> str:
    return "Use in Edit" if count == 1 else f"Use picture {index + 1} in Edit"


def _wire_stage(studio: Studio, jobs: JobQueue, chosen: gr.Dropdown, tabs: gr.Tabs, edit: Form, stage: Stage) -> None:
    def pick(images: list[str], before: Image.Image | None, event: gr.SelectData) -> Sequence[Any]:
        index = int(event.index)
        other = compare.picked(before, images[index])
        return index, _download(images, index), gr.Button(_use_label(index, len(images))), other

    def use(images: list[str], index: int, name: str) -> Update:
        picture = Path(images[index])
        return {tabs: gr.Tabs(selected=edit.name), **offer(edit, [picture], studio.settings.checkpoint(name))}

    listen(stage.stop.click, stopper(jobs), stage.job, stage.stop, queue=False)
    comparison = stage.comparison
    listen(
        stage.gallery.select,
        pick,
        [stage.results, comparison.before],
        [stage.picked, stage.download, stage.edit, comparison.slider],
    )
    listen(stage.edit.click, None, js=GO_TO_FORM)
    listen(stage.edit.click, use, [stage.results, stage.picked, chosen], [tabs, *offered_to(edit)])


# --- the checkpoint and what depends on it ----------------------------------------------------------------------


def _wire_checkpoint(
    studio: Studio, examples: Examples, chosen: gr.Dropdown, about: gr.HTML, forms: Sequence[Form]
) -> None:
    def describe(name: str) -> str:
        checkpoint = studio.settings.checkpoint(name)
        return fields.about(checkpoint, studio.on_disk(checkpoint))

    def adopt(name: str, *around: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        update: Update = {}
        for form, aspect, laid_out_for in zip(forms, around[: len(forms)], around[len(forms) :], strict=True):
            update[form.examples] = fields.other_examples(examples.of(form.name, checkpoint))
            if laid_out_for == name:  # whoever chose the checkpoint laid it out, with values that are to stay
                continue
            update |= {
                form.laid_out_for: name,
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
        outputs += [form.laid_out_for, *_sides(form), form.examples, *numbers]
    around = [*(form.aspect for form in forms), *(form.laid_out_for for form in forms)]
    listen(chosen.change, adopt, [chosen, *around], outputs)
    # With no trigger named: at every choice and when the page is opened, for a download may have happened meanwhile.
    listen(None, describe, chosen, about)


def _wire_examples(studio: Studio, examples: Examples, chosen: gr.Dropdown, form: Form) -> None:
    def take(index: int, name: str) -> Update:
        checkpoint = studio.settings.checkpoint(name)
        example = examples.of(form.name, checkpoint)[index]
        update: Update = {form.fields["prompt"]: example.prompt}
        return update | offer(form, example.references, checkpoint) if form.panel else update

    filled = [form.fields["prompt"], *(offered_to(form) if form.panel else [])]
    listen(form.examples.click, take, [form.examples, chosen], filled)


def _wire_identity(studio: Studio, forms: Sequence[Form]) -> None:
    def who() -> list[str]:
        try:
            told = show.notes([studio.signer.identity.proves])
        except StudioError as error:
            told = show.problem(str(error))
        return [told] * len(forms)

    # When the page is opened: the first time, the local identity is made.
    listen(None, who, None, [form.identity for form in forms])
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
    # When the page is opened, for Gradio shows a Number that was made with None as 0 until it is set once more.
    listen(None, lambda: None, None, seed, queue=False)
    # A seed that somebody rolled or typed is one they want to see used: both lock it. In the browser, so that a run
    # that is started at once has it.
    roll = f"() => [Math.floor(Math.random() * {MAX_SEED - MAX_COUNT}), true]"
    listen(form.roll.click, None, None, [seed, form.lock], js=roll)
    listen(seed.input, None, seed, form.lock, js="(seed) => seed !== null")


def _wire_size(studio: Studio, chosen: gr.Dropdown, form: Form) -> None:
    width, height = _sides(form)

    def preset(aspect: str, name: str, *now: int | None) -> Sequence[Any]:
        if aspect == fields.AS_REFERENCE:
            return *fields.sides(None), ""
        if aspect == fields.FREE and None not in now:
            return gr.skip(), gr.skip(), ""
        return *fields.sides(fields.size_of(aspect, studio.settings.checkpoint(name))), ""

    # `input`, not `change`: a change that came from settling must not set the size again.
    shown = [width, height, form.size_note]
    listen(form.aspect.input, preset, [form.aspect, chosen, width, height], shown, queue=False)
    for side, label in ((width, "width"), (height, "height")):

        def settle(across: int | None, down: int | None, name: str, label: str = label) -> Sequence[Any]:
            pixels = across if label == "width" else down
            rounded, note, aspect = settled(pixels, across, down, label, studio.settings.checkpoint(name))
            # Only what has to change: meanwhile somebody may be typing in the other field.
            return gr.skip() if rounded == pixels else rounded, note, aspect

        listen(
            [side.blur, side.submit],
            settle,
            [width, height, chosen],
            [side, form.size_note, form.aspect],
            queue=False,
        )


def settled(
    pixels: int | None, width: int | None, height: int | None, label: str, checkpoint: Checkpoint
) -> tuple[int | None, str, str]:
    """What a side of `pixels`, as typed, becomes; a note on it, as HTML; and the shape of `width` x `height` then."""
    try:
        _check_typed(width, height)
        assert pixels is not None and width is not None and height is not None
        side = round_side(pixels, label)
        size = round_side(width, "width"), round_side(height, "height")
        # The check that the run will make, told before the run.
        Request(prompt="size", width=width, height=height).resolve(checkpoint)
    except RequestError as error:
        return pixels, show.problem(str(error)), fields.FREE
    note = f"The {label} was rounded from {pixels} to {side}: FLUX.2 draws in multiples of 16."
    shapes = [shape for shape in fields.ASPECTS if fields.size_of(shape, checkpoint) == size]
    return side, "" if side == pixels else show.notes([note]), shapes[0] if shapes else fields.FREE


def _sides(form: Form) -> tuple[gr.Number, gr.Number]:
    return form.fields["width"], form.fields["height"]
