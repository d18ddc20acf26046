"""Presets on the page: layout, available presets, and the card of a preset.

`preset_apply` applies presets, and `own_preset_panel` manages the user's own.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import gradio as gr

from flux2_studio.errors import PresetError
from flux2_studio.storage.own_presets import OwnPresets
from flux2_studio.storage.presets import SUBJECT_PLACEHOLDER, Preset, Presets
from flux2_studio.ui.gradio_compat.language import i18n, translate

SHIPPED_PREFIX, OWN_PREFIX = "shipped:", "own:"  # prefixes of a choice, before the file's name or the id
PRESET_PARTS: Mapping[str, tuple[str, ...]] = {  # parts of a form that can be saved
    "Prompt": ("prompt", "negative_prompt"),
    "Size": ("width", "height"),
    "Checkpoint, steps, guidance": ("checkpoint", "steps", "guidance"),
    "LoRAs": ("loras",),
    "Pictures, format": ("count", "format"),
}


@dataclass(frozen=True, kw_only=True)
class PresetPanel:
    """The components. `undo_stack`: what can be undone, latest last; `applied`: the preset in the form and the user's
    words.

    `pending`: a preset that waits for the user to confirm the replacement of another; `deleted`: the last deleted
    preset.
    """

    choice: gr.Dropdown
    apply: gr.Button
    card: gr.HTML
    apply_message: gr.HTML  # result of applying a preset
    undo: gr.Button
    undo_stack: gr.State
    applied: gr.State
    own_accordion: gr.Accordion
    name: gr.Textbox
    parts: gr.CheckboxGroup
    save: gr.Button
    rename: gr.Button
    delete: gr.Button
    export: gr.DownloadButton
    import_file: gr.UploadButton
    question: gr.HTML
    replace: gr.Button
    keep_existing: gr.Button
    restore: gr.Button
    own_message: gr.HTML  # result of an action on the user's own presets
    pending: gr.State
    deleted: gr.State


def build_preset_panel() -> PresetPanel:
    with gr.Column(elem_classes=["presets", "extra"]):
        with gr.Row(elem_classes="preset-choice"):
            choice = gr.Dropdown(
                choices=[],  # set when the page is opened, because some are the visitor's own
                value=None,
                label=i18n("Start from a preset"),
                info=i18n("Type to search. What you write in the prompt becomes its subject."),
                min_width=180,
                elem_classes="preset",
            )
            apply = gr.Button(i18n("Apply"), size="sm", min_width=80, interactive=False, elem_classes="preset-apply")
        card = gr.HTML(elem_classes="preset-card")
        apply_message = gr.HTML(elem_classes=["note", "preset-said"])
        with gr.Row(elem_classes="acts"):
            undo = gr.Button(i18n("Undo"), size="sm", visible=False, elem_classes="preset-undo")
        with gr.Accordion(i18n("Save and share presets"), open=False, elem_classes="preset-own") as own_accordion:
            name = gr.Textbox(label=i18n("Name"), max_lines=1, max_length=60, elem_classes="preset-name")
            parts = gr.CheckboxGroup(
                [(i18n(part), part) for part in PRESET_PARTS],
                value=list(PRESET_PARTS),
                label=i18n("What to save of this form"),
                info=i18n("Write {subject} in the prompt where other words are to go in."),
                elem_classes="preset-parts",
            )
            with gr.Row(elem_classes="acts"):
                save = gr.Button(i18n("Save this form"), size="sm", elem_classes="preset-save")
                rename = gr.Button(i18n("Rename"), size="sm", visible=False, elem_classes="preset-rename")
                delete = gr.Button(i18n("Delete"), size="sm", visible=False, elem_classes="preset-delete")
                export = gr.DownloadButton(i18n("Export"), size="sm", visible=False, elem_classes="preset-export")
                import_file = gr.UploadButton(
                    i18n("Import a file"), size="sm", file_types=[".json"], elem_classes="preset-import"
                )
            question = gr.HTML(elem_classes=["note", "preset-question"])
            with gr.Row(elem_classes="acts"):
                replace = gr.Button(i18n("Replace it"), size="sm", visible=False, elem_classes="preset-replace")
                keep_existing = gr.Button(i18n("Keep it"), size="sm", visible=False, elem_classes="preset-keep")
            own_message = gr.HTML(elem_classes=["note", "preset-told"])
            with gr.Row(elem_classes="acts"):
                restore = gr.Button(i18n("Undo the deletion"), size="sm", visible=False, elem_classes="preset-restore")
    return PresetPanel(
        choice=choice,
        apply=apply,
        card=card,
        apply_message=apply_message,
        undo=undo,
        undo_stack=gr.State([]),
        applied=gr.State(None),
        own_accordion=own_accordion,
        name=name,
        parts=parts,
        save=save,
        rename=rename,
        delete=delete,
        export=export,
        import_file=import_file,
        question=question,
        replace=replace,
        keep_existing=keep_existing,
        restore=restore,
        own_message=own_message,
        pending=gr.State(None),
        deleted=gr.State(None),
    )


class AvailablePresets:
    """The presets that a visitor may choose from: the studio's and their own."""

    def __init__(self, presets: Presets, own_presets: OwnPresets) -> None:
        self.presets = presets
        self.own_presets = own_presets

    def choices(self, form: str, owner: str) -> list[tuple[str, str]]:
        """(label, choice) of each preset, the visitor's own first. Raises `StudioError`."""
        mine = [
            (f"{translate('Yours')} · {it.name}", f"{OWN_PREFIX}{id}")
            for id, it in self.own_presets.for_form(owner, form).items()
        ]
        return [*mine, *self.shipped(form)]

    def shipped(self, form: str) -> list[tuple[str, str]]:
        return [
            (f"{it.group} · {it.name}", f"{SHIPPED_PREFIX}{slug}") for slug, it in self.presets.for_form(form).items()
        ]

    def find(self, choice: str | None, owner: str) -> Preset:
        """The preset for a choice sent by the browser. Raises `StudioError` if `owner` has no such preset."""
        if choice and choice.startswith(OWN_PREFIX):
            return self.own_presets.find(owner, choice.removeprefix(OWN_PREFIX))
        preset = self.presets.by_slug.get((choice or "").removeprefix(SHIPPED_PREFIX))
        if preset is None:
            raise PresetError("Choose a preset first.")
        return preset


def preset_card_html(preset: Preset) -> str:
    """A summary of `preset` as HTML. Its texts may come from a stranger."""
    lines = [f"<p>{escape(preset.description)}</p>"]
    if preset.shows:
        lines.append(f'<p class="shows">{escape(preset.shows)}</p>')
    if preset.template:
        before, placeholder, after = preset.template.partition(SUBJECT_PLACEHOLDER)
        subject = f"<mark>{escape(preset.subject or translate('your words'))}</mark>" if placeholder else ""
        lines.append(f'<p class="template" tabindex="0">{escape(before)}{subject}{escape(after)}</p>')
    picture = ""
    if preset.picture is not None:
        data = base64.b64encode(preset.picture.read_bytes()).decode()
        alt = translate("Example of {name}, drawn by the toy on board", name=preset.name)
        picture = f'<img alt="{escape(alt)}" src="data:image/webp;base64,{data}">'
    return f'<div class="card">{picture}{"".join(lines)}</div>'
