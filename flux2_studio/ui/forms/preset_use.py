"""Presets in a form: applied and undone.

A preset fills in what it holds and nothing else. What the user wrote in the prompt becomes its subject, and still is
the subject of the next preset that they try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import StudioError
from flux2_studio.storage.presets import HELD, Preset, applied, field_names
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.lora_panel import kept
from flux2_studio.ui.forms.preset_panel import Shelf
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import say, told
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

STEPS_BACK = 20  # presets that can be undone
# What keeps its meaning under every checkpoint.
ANYWHERE = ("prompt", "count", "format")
BY_CHECKPOINT = ("steps", "guidance", "negative_prompt", "width", "height")


@dataclass(frozen=True, kw_only=True)
class Before:
    """A form before a preset was put into it: the fields that were changed, and what stood beside them."""

    values: Mapping[str, Any]
    aspect: str
    checkpoint: str
    applied: tuple[Preset, str] | None


def wire_presets(studio: Studio, shelf: Shelf, forms: Sequence[Form]) -> None:
    """Choosing, applying and undoing in each of `forms`."""

    def offer(request: gr.Request) -> Update:
        update: Update = {}
        for form in forms:
            try:
                choices, problem = shelf.choices(form.name, owner_of(request)), ""
            except StudioError as error:  # the studio's own presets need no database
                choices, problem = shelf.shipped(form.name), show.problem(str(error))
            broken = [f"{say('A preset could not be read.')} {text}" for text in shelf.presets.problems]
            update |= {
                form.presets.choice: gr.Dropdown(choices=choices, value=None),
                form.presets.told: problem + show.notes(broken),
            }
        return update

    # When the page is opened.
    listen(None, offer, None, [it for form in forms for it in (form.presets.choice, form.presets.told)])
    for form in forms:
        _wire_form(studio, shelf, form)


def _wire_form(studio: Studio, shelf: Shelf, form: Form) -> None:
    panel = form.presets

    def apply(
        choice: str | None,
        aspect: str,
        before: list[Before],
        last: tuple[Preset, str] | None,
        request: gr.Request,
        **now: Any,
    ) -> Update:
        try:
            preset = shelf.find(choice, owner_of(request))
            checkpoint = studio.settings.checkpoint(preset.request.get("checkpoint", now["checkpoint"]))
            words = words_of(now["prompt"] or "", last)
            made = applied(preset, words, checkpoint)
        except StudioError as error:
            return {panel.said: show.problem(str(error))}
        values, notes = dict(made.values), list(made.notes)
        if "loras" in values:
            values["loras"], dropped = kept(values["loras"], studio.loras.look()[0], checkpoint)
            notes += dropped
        switched = checkpoint.name != now["checkpoint"]
        changed = {*values, *(BY_CHECKPOINT if switched else ())}
        earlier = Before(
            values={name: now[name] for name in HELD if name in changed},
            aspect=aspect,
            checkpoint=now["checkpoint"],
            applied=last,
        )
        held = ", ".join(map(told, field_names(values)))
        sentence = say("{name} set: {fields}.", name=preset.name, fields=held)
        if preset.takes_subject and not words:
            sentence += " " + say('Its subject is an example, "{words}": write your own there.', words=preset.subject)
        return {
            **put(form, values, checkpoint, aspect, switched=switched),
            panel.said: show.notes([sentence, *notes]),
            panel.before: [*before, earlier][-STEPS_BACK:],
            panel.applied: (preset, words),
            panel.undo: gr.Button(visible=True),
        }

    def undo(before: list[Before], name: str) -> Update:
        if not before:
            return {panel.undo: gr.Button(visible=False)}
        *left, then = before
        switched = "checkpoint" in then.values and then.checkpoint != name
        checkpoint = studio.settings.checkpoint(then.checkpoint if switched else name)
        values, said = dict(then.values), say("As it was before the preset.")
        if checkpoint.name != then.checkpoint:  # meanwhile another one was chosen: its numbers stay
            values = {field: value for field, value in values.items() if field not in BY_CHECKPOINT}
            said = say(
                "As it was before the preset, but for the size and the numbers, which are {label}'s.",
                label=checkpoint.label,
            )
        return {
            **put(form, values, checkpoint, then.aspect, switched=switched, back=True),
            panel.said: show.notes([said]),
            panel.before: left,
            panel.applied: then.applied,
            panel.undo: gr.Button(visible=bool(left)),
        }

    state = [panel.said, panel.before, panel.applied, panel.undo]
    listen(
        panel.apply.click,
        apply,
        [panel.choice, form.aspect, panel.before, panel.applied],
        [*fillable(form), *state],
        inputs_kwargs={name: form.fields[name] for name in HELD},
    )
    listen(panel.undo.click, undo, [panel.before, form.fields["checkpoint"]], [*fillable(form), *state])


def words_of(prompt: str, last: tuple[Preset, str] | None) -> str:
    """What the user themselves said in `prompt`, in which `last` may stand: a preset, and their words by then."""
    if last is None:
        return prompt
    preset, earlier = last
    said = preset.words(prompt)
    return prompt if said is None else said or earlier


def put(
    form: Form,
    values: Mapping[str, Any],
    checkpoint: Checkpoint,
    aspect: str,
    *,
    switched: bool,
    back: bool = False,
) -> Update:
    """`values` of a request in `form`, which shows the shape `aspect`, and the rest as it stands there.

    switched: whether `checkpoint` is another one than before. back: whether the values are the form's own of earlier,
    with `aspect`.
    """
    components = form.fields
    update: Update = {components[name]: values[name] for name in ANYWHERE if name in values}
    if switched:
        # Or the choice would overwrite what is put here.
        update |= {components["checkpoint"]: checkpoint.name, form.laid_out_for: checkpoint.name}
    for name, make in (("steps", fields.steps), ("guidance", fields.guidance)):
        if name in values or switched:
            update[components[name]] = make(checkpoint, values.get(name))
    if "negative_prompt" in values or switched:
        update[components["negative_prompt"]] = fields.negative_prompt(checkpoint, values.get("negative_prompt"))
    if "loras" in values:
        rows = values["loras"] or []
        update |= {components["loras"]: rows, form.loras.folded: gr.Accordion(fields.lora_title(len(rows)))}
    size = (values["width"], values["height"]) if "width" in values else None
    if size is not None and not back:
        aspect = _shape(size, checkpoint)
    elif size is None and switched and aspect in fields.ASPECTS:
        size = fields.size_of(aspect, checkpoint)
    if size is not None:
        sides = fields.sides(None if aspect == fields.AS_REFERENCE else size)
        update |= dict(zip((components["width"], components["height"]), sides, strict=True))
        update |= {form.aspect: aspect, form.size_note: ""}
    return update


def fillable(form: Form) -> list[Any]:
    """The components that `put` may set."""
    return [
        *(form.fields[name] for name in HELD),
        form.laid_out_for,
        form.loras.folded,
        form.aspect,
        form.size_note,
    ]


def _shape(size: tuple[int, int], checkpoint: Checkpoint) -> str:
    return next((name for name in fields.ASPECTS if fields.size_of(name, checkpoint) == size), fields.FREE)
