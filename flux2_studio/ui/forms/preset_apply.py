"""Apply presets to a form, and undo that.

A preset sets only the fields it has. What the user wrote in the prompt becomes its subject, and stays the subject of
the next preset they try.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import StudioError
from flux2_studio.storage.presets import PRESET_FIELDS, Preset, apply_preset, describe_fields
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.lora_panel import keep_compatible
from flux2_studio.ui.forms.preset_panel import AvailablePresets
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

MAX_UNDO_STEPS = 20  # applied presets that can be undone
# Fields with the same meaning for every checkpoint.
CHECKPOINT_INDEPENDENT_FIELDS = ("prompt", "count", "format")
CHECKPOINT_DEPENDENT_FIELDS = ("steps", "guidance", "negative_prompt", "width", "height")


@dataclass(frozen=True, kw_only=True)
class FormSnapshot:
    """A form before a preset was applied: the changed fields, and the state around them."""

    values: Mapping[str, Any]
    aspect: str
    checkpoint: str
    applied: tuple[Preset, str] | None


def wire_presets(studio: Studio, available_presets: AvailablePresets, forms: Sequence[Form]) -> None:
    """Connect choosing, applying and undoing in each of `forms`."""

    def offer(request: gr.Request) -> Update:
        update: Update = {}
        for form in forms:
            try:
                choices, problem = available_presets.choices(form.name, owner_of(request)), ""
            except StudioError as error:  # presets that ship with the studio need no database
                choices, problem = available_presets.shipped(form.name), render.problem(str(error))
            broken = [
                f"{translate('A preset could not be read.')} {text}" for text in available_presets.presets.problems
            ]
            update |= {
                form.presets.choice: gr.Dropdown(choices=choices, value=None),
                form.presets.own_message: problem + render.notes(broken),
            }
        return update

    # When the page is opened.
    listen(None, offer, None, [it for form in forms for it in (form.presets.choice, form.presets.own_message)])
    for form in forms:
        _wire_form(studio, available_presets, form)


def _wire_form(studio: Studio, available_presets: AvailablePresets, form: Form) -> None:
    panel = form.presets

    def apply(
        choice: str | None,
        aspect: str,
        before: list[FormSnapshot],
        last: tuple[Preset, str] | None,
        request: gr.Request,
        **now: Any,
    ) -> Update:
        try:
            preset = available_presets.find(choice, owner_of(request))
            checkpoint = studio.settings.checkpoint(preset.request.get("checkpoint", now["checkpoint"]))
            subject = user_words(now["prompt"] or "", last)
            result = apply_preset(preset, subject, checkpoint)
        except StudioError as error:
            return {panel.apply_message: render.problem(str(error))}
        values, notes = dict(result.values), list(result.notes)
        if "loras" in values:
            values["loras"], dropped = keep_compatible(values["loras"], studio.loras.scan()[0], checkpoint)
            notes += dropped
        switched = checkpoint.name != now["checkpoint"]
        changed = {*values, *(CHECKPOINT_DEPENDENT_FIELDS if switched else ())}
        snapshot = FormSnapshot(
            values={name: now[name] for name in PRESET_FIELDS if name in changed},
            aspect=aspect,
            checkpoint=now["checkpoint"],
            applied=last,
        )
        field_names = ", ".join(map(translate_message, describe_fields(values)))
        sentence = translate("{name} set: {fields}.", name=preset.name, fields=field_names)
        if preset.takes_subject and not subject:
            sentence += " " + translate(
                'Its subject is an example, "{words}": write your own there.', words=preset.subject
            )
        return {
            **preset_update(form, values, checkpoint, aspect, switched=switched),
            panel.apply_message: render.notes([sentence, *notes]),
            panel.undo_stack: [*before, snapshot][-MAX_UNDO_STEPS:],
            panel.applied: (preset, subject),
            panel.undo: gr.Button(visible=True),
        }

    def undo(before: list[FormSnapshot], name: str) -> Update:
        if not before:
            return {panel.undo: gr.Button(visible=False)}
        *remaining, snapshot = before
        switched = "checkpoint" in snapshot.values and snapshot.checkpoint != name
        checkpoint = studio.settings.checkpoint(snapshot.checkpoint if switched else name)
        values, sentence = dict(snapshot.values), translate("As it was before the preset.")
        if checkpoint.name != snapshot.checkpoint:  # another checkpoint was chosen since: keep its numbers
            values = {field: value for field, value in values.items() if field not in CHECKPOINT_DEPENDENT_FIELDS}
            sentence = translate(
                "As it was before the preset, but for the size and the numbers, which are {label}'s.",
                label=checkpoint.label,
            )
        return {
            **preset_update(form, values, checkpoint, snapshot.aspect, switched=switched, is_undo=True),
            panel.apply_message: render.notes([sentence]),
            panel.undo_stack: remaining,
            panel.applied: snapshot.applied,
            panel.undo: gr.Button(visible=bool(remaining)),
        }

    state = [panel.apply_message, panel.undo_stack, panel.applied, panel.undo]
    listen(
        panel.apply.click,
        apply,
        [panel.choice, form.aspect, panel.undo_stack, panel.applied],
        [*preset_outputs(form), *state],
        inputs_kwargs={name: form.fields[name] for name in PRESET_FIELDS},
    )
    listen(panel.undo.click, undo, [panel.undo_stack, form.fields["checkpoint"]], [*preset_outputs(form), *state])


def user_words(prompt: str, last_applied: tuple[Preset, str] | None) -> str:
    """The user's own words in `prompt`.

    last_applied: the preset that `prompt` may contain, and the user's words when it was applied.
    """
    if last_applied is None:
        return prompt
    preset, earlier = last_applied
    subject = preset.extract_subject(prompt)
    return prompt if subject is None else subject or earlier


def preset_update(
    form: Form,
    values: Mapping[str, Any],
    checkpoint: Checkpoint,
    aspect: str,
    *,
    switched: bool,
    is_undo: bool = False,
) -> Update:
    """The update that puts `values` of a request into `form`, whose shape is `aspect`; other fields stay.

    switched: whether `checkpoint` changes. is_undo: whether `values` and `aspect` are earlier ones of the form itself.
    """
    components = form.fields
    update: Update = {components[name]: values[name] for name in CHECKPOINT_INDEPENDENT_FIELDS if name in values}
    if switched:
        # Otherwise the change event would overwrite these values.
        update |= {components["checkpoint"]: checkpoint.name, form.form_checkpoint: checkpoint.name}
    for name, make in (("steps", fields.steps), ("guidance", fields.guidance)):
        if name in values or switched:
            update[components[name]] = make(checkpoint, values.get(name))
    if "negative_prompt" in values or switched:
        update[components["negative_prompt"]] = fields.negative_prompt(checkpoint, values.get("negative_prompt"))
    if "loras" in values:
        rows = values["loras"] or []
        update |= {components["loras"]: rows, form.loras.accordion: gr.Accordion(fields.lora_title(len(rows)))}
    size = (values["width"], values["height"]) if "width" in values else None
    if size is not None and not is_undo:
        aspect = _shape(size, checkpoint)
    elif size is None and switched and aspect in fields.ASPECTS:
        size = fields.size_of(aspect, checkpoint)
    if size is not None:
        sides = fields.sides(None if aspect == fields.AS_REFERENCE else size)
        update |= dict(zip((components["width"], components["height"]), sides, strict=True))
        update |= {form.aspect: aspect, form.size_note: ""}
    return update


def preset_outputs(form: Form) -> list[Any]:
    """The components that `preset_update` may set."""
    return [
        *(form.fields[name] for name in PRESET_FIELDS),
        form.form_checkpoint,
        form.loras.accordion,
        form.aspect,
        form.size_note,
    ]


def _shape(size: tuple[int, int], checkpoint: Checkpoint) -> str:
    return next((name for name in fields.ASPECTS if fields.size_of(name, checkpoint) == size), fields.FREE)
