"""Presets on the page: how they are laid out, what there is to choose from, and what a card says.

What happens when one is applied is in `preset_use`, and what becomes of one's own in `own_preset_panel`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import gradio as gr

from flux2_studio.errors import PresetError
from flux2_studio.storage.own_presets import OwnPresets
from flux2_studio.storage.presets import SUBJECT, Preset, Presets
from flux2_studio.ui.gradio_compat.language import say, t

SHIPPED, OWN = "shipped:", "own:"  # what a choice begins with; then the file's name, or the id
PARTS: Mapping[str, tuple[str, ...]] = {  # of a form, as they are offered to be saved
    "Prompt": ("prompt", "negative_prompt"),
    "Size": ("width", "height"),
    "Checkpoint, steps, guidance": ("checkpoint", "steps", "guidance"),
    "LoRAs": ("loras",),
    "Pictures, format": ("count", "format"),
}


@dataclass(frozen=True, kw_only=True)
class PresetPanel:
    """`before` is what can be undone, the last one last; `applied` the preset in the form and the user's words then.

    `pending` waits to be told whether it may replace another one; `deleted` was the last one to go.
    """

    choice: gr.Dropdown
    apply: gr.Button
    card: gr.HTML
    said: gr.HTML  # what was set
    undo: gr.Button
    before: gr.State
    applied: gr.State
    folded: gr.Accordion
    name: gr.Textbox
    parts: gr.CheckboxGroup
    save: gr.Button
    rename: gr.Button
    delete: gr.Button
    export: gr.DownloadButton
    take: gr.UploadButton
    question: gr.HTML
    replace: gr.Button
    keep: gr.Button
    restore: gr.Button
    told: gr.HTML  # what became of one's own
    pending: gr.State
    deleted: gr.State


def layout() -> PresetPanel:
    with gr.Column(elem_classes=["presets", "extra"]):
        with gr.Row(elem_classes="preset-choice"):
            choice = gr.Dropdown(
                choices=[],  # when the page is opened, for some are of whoever opens it
                value=None,
                label=t("Start from a preset"),
                info=t("Type to search. What you write in the prompt becomes its subject."),
                min_width=180,
                elem_classes="preset",
            )
            apply = gr.Button(t("Apply"), size="sm", min_width=80, interactive=False, elem_classes="preset-apply")
        card = gr.HTML(elem_classes="preset-card")
        said = gr.HTML(elem_classes=["note", "preset-said"])
        with gr.Row(elem_classes="acts"):
            undo = gr.Button(t("Undo"), size="sm", visible=False, elem_classes="preset-undo")
        with gr.Accordion(t("Save and share presets"), open=False, elem_classes="preset-own") as folded:
            name = gr.Textbox(label=t("Name"), max_lines=1, max_length=60, elem_classes="preset-name")
            parts = gr.CheckboxGroup(
                [(t(part), part) for part in PARTS],
                value=list(PARTS),
                label=t("What to save of this form"),
                info=t("Write {subject} in the prompt where other words are to go in."),
                elem_classes="preset-parts",
            )
            with gr.Row(elem_classes="acts"):
                save = gr.Button(t("Save this form"), size="sm", elem_classes="preset-save")
                rename = gr.Button(t("Rename"), size="sm", visible=False, elem_classes="preset-rename")
                delete = gr.Button(t("Delete"), size="sm", visible=False, elem_classes="preset-delete")
                export = gr.DownloadButton(t("Export"), size="sm", visible=False, elem_classes="preset-export")
                take = gr.UploadButton(
                    t("Import a file"), size="sm", file_types=[".json"], elem_classes="preset-import"
                )
            question = gr.HTML(elem_classes=["note", "preset-question"])
            with gr.Row(elem_classes="acts"):
                replace = gr.Button(t("Replace it"), size="sm", visible=False, elem_classes="preset-replace")
                keep = gr.Button(t("Keep it"), size="sm", visible=False, elem_classes="preset-keep")
            told = gr.HTML(elem_classes=["note", "preset-told"])
            with gr.Row(elem_classes="acts"):
                restore = gr.Button(t("Undo the deletion"), size="sm", visible=False, elem_classes="preset-restore")
    return PresetPanel(
        choice=choice,
        apply=apply,
        card=card,
        said=said,
        undo=undo,
        before=gr.State([]),
        applied=gr.State(None),
        folded=folded,
        name=name,
        parts=parts,
        save=save,
        rename=rename,
        delete=delete,
        export=export,
        take=take,
        question=question,
        replace=replace,
        keep=keep,
        restore=restore,
        told=told,
        pending=gr.State(None),
        deleted=gr.State(None),
    )


class Shelf:
    """The presets that a visitor may choose from: the studio's, and their own."""

    def __init__(self, presets: Presets, own: OwnPresets) -> None:
        self.presets = presets
        self.own = own

    def choices(self, form: str, owner: str) -> list[tuple[str, str]]:
        """(label, choice) of each, one's own first. Raises `StudioError`."""
        mine = [(f"{say('Yours')} · {it.name}", f"{OWN}{id}") for id, it in self.own.of(owner, form).items()]
        return [*mine, *self.shipped(form)]

    def shipped(self, form: str) -> list[tuple[str, str]]:
        return [(f"{it.group} · {it.name}", f"{SHIPPED}{slug}") for slug, it in self.presets.of(form).items()]

    def find(self, choice: str | None, owner: str) -> Preset:
        """The preset that a browser calls `choice`. Raises `StudioError` where `owner` has none such."""
        if choice and choice.startswith(OWN):
            return self.own.find(owner, choice.removeprefix(OWN))
        preset = self.presets.found.get((choice or "").removeprefix(SHIPPED))
        if preset is None:
            raise PresetError("Choose a preset first.")
        return preset


def card(preset: Preset) -> str:
    """What to know of `preset` before it is applied, as HTML. Its texts may be a stranger's."""
    lines = [f"<p>{escape(preset.description)}</p>"]
    if preset.shows:
        lines.append(f'<p class="shows">{escape(preset.shows)}</p>')
    if preset.template:
        before, placeholder, after = preset.template.partition(SUBJECT)
        subject = f"<mark>{escape(preset.subject or say('your words'))}</mark>" if placeholder else ""
        lines.append(f'<p class="template" tabindex="0">{escape(before)}{subject}{escape(after)}</p>')
    picture = ""
    if preset.picture is not None:
        data = base64.b64encode(preset.picture.read_bytes()).decode()
        drawn = say("Example of {name}, drawn by the toy on board", name=preset.name)
        picture = f'<img alt="{escape(drawn)}" src="data:image/webp;base64,{data}">'
    return f'<div class="card">{picture}{"".join(lines)}</div>'
