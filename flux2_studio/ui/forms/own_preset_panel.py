"""The user's own presets: save a form, rename, delete, export to and import from a file.

The visitor's cookie identifies the owner, never data from the browser: see `visitors`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache
from gradio.utils import get_upload_folder

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import PresetError, StudioError
from flux2_studio.storage.own_presets import PresetNameTaken
from flux2_studio.storage.presets import PRESET_FIELDS, FormName, Preset, make_preset, read_preset
from flux2_studio.ui.forms.lora_panel import read_loras
from flux2_studio.ui.forms.preset_panel import OWN_PREFIX, PRESET_PARTS, AvailablePresets, PresetPanel, preset_card_html
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import i18n, translate
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

TABS: Mapping[FormName, str] = {"generate": "Generate", "edit": "Edit", "multi": "Multi-reference"}


def wire_own_presets(studio: Studio, available_presets: AvailablePresets, forms: Sequence[Form]) -> None:
    """Connect the actions on the visitor's own presets in each of `forms`."""
    panels = {form.name: form.presets for form in forms}
    for form in forms:
        _wire_form(studio, available_presets, form, panels)


def _wire_form(
    studio: Studio, available_presets: AvailablePresets, form: Form, panels: Mapping[str, PresetPanel]
) -> None:
    panel = form.presets
    choices = [it.choice for it in panels.values()]
    shown = [panel.card, panel.apply, panel.name, panel.rename, panel.delete, panel.export]
    question_outputs = [panel.question, panel.replace, panel.keep_existing, panel.pending]
    outcome = [*choices, *shown, *question_outputs, panel.own_message, panel.restore, panel.deleted]

    def choose(choice: str | None, request: gr.Request) -> Update:
        if not choice:
            return _clear_chosen(panel)
        try:
            return {
                **_show_chosen(
                    panel, available_presets.find(choice, owner_of(request)), own=choice.startswith(OWN_PREFIX)
                ),
                panel.own_message: "",
            }
        except StudioError as error:
            return {**_clear_chosen(panel), panel.card: render.problem(str(error))}

    def change_update(owner: str, preset: Preset, id: str, message: str) -> Update:
        """The update after `preset` of `owner`, with the given id, was created or changed."""
        target = panels[preset.form]
        update: Update = {target.choice: gr.Dropdown(choices=available_presets.choices(preset.form, owner), value=None)}
        if target is panel:
            update[panel.choice] = gr.Dropdown(
                choices=available_presets.choices(preset.form, owner), value=f"{OWN_PREFIX}{id}"
            )
            update |= _show_chosen(panel, preset, own=True)
        else:
            message += " " + translate("It is in the tab {tab}.", tab=translate(TABS[preset.form]))
        return {
            **update,
            **_clear_question(panel),
            panel.own_message: render.notes([message]),
            panel.restore: gr.Button(visible=False),
            panel.deleted: None,
        }

    def add(owner: str, make: Any, message_for: Callable[[str], str]) -> Update:
        """Save the preset from `make`, or ask first if its name is taken. message_for: preset name -> message."""
        preset: Preset | None = None
        try:
            preset = make()
            assert preset is not None
            return change_update(
                owner, preset, available_presets.own_presets.save(owner, preset), message_for(preset.name)
            )
        except PresetNameTaken as error:
            return {
                panel.question: render.notes(
                    [translate("You have a preset called {name} already. Replace it?", name=error.name)]
                ),
                panel.replace: gr.Button(visible=True),
                panel.keep_existing: gr.Button(visible=True),
                panel.pending: preset,
                panel.own_message: "",
            }
        except StudioError as error:
            return {**_clear_question(panel), panel.own_message: render.problem(str(error))}

    def save(name: str, parts: list[str], request: gr.Request, **values: Any) -> Update:
        checkpoint = studio.settings.checkpoint(values["checkpoint"])
        return add(
            owner_of(request),
            lambda: make_preset(name or "", form.name, saved_values(values, parts, checkpoint)),  # type: ignore[arg-type]
            lambda name: translate("Saved as {name}. Only you see it.", name=name),
        )

    def import_preset(file: str | None, request: gr.Request) -> Update:
        def read() -> Preset:
            if not file:
                raise PresetError("Choose a preset's file, as Export writes it.")
            try:
                return read_preset(Path(file))
            except PresetError as error:
                raise PresetError(f"{Path(file).name}: {error}") from error

        return add(owner_of(request), read, lambda name: translate("Imported {name}. Only you see it.", name=name))

    def replace(pending: Preset | None, request: gr.Request) -> Update:
        if pending is None:
            return _clear_question(panel)
        owner = owner_of(request)
        try:
            id = available_presets.own_presets.save(owner, pending, replace=True)
            return change_update(owner, pending, id, translate("{name} is replaced.", name=pending.name))
        except StudioError as error:
            return {**_clear_question(panel), panel.own_message: render.problem(str(error))}

    def rename(choice: str | None, name: str, request: gr.Request) -> Update:
        owner, id = owner_of(request), (choice or "").removeprefix(OWN_PREFIX)
        try:
            preset = available_presets.own_presets.rename(owner, id, name or "")
            return change_update(owner, preset, id, translate("It is called {name} now.", name=preset.name))
        except StudioError as error:
            return {panel.own_message: render.problem(str(error))}

    def delete(choice: str | None, request: gr.Request) -> Update:
        owner = owner_of(request)
        try:
            deleted = available_presets.own_presets.delete(owner, (choice or "").removeprefix(OWN_PREFIX))
            choices_left = available_presets.choices(form.name, owner)
        except StudioError as error:
            return {panel.own_message: render.problem(str(error))}
        return {
            **_clear_chosen(panel),
            **_clear_question(panel),
            panel.choice: gr.Dropdown(choices=choices_left, value=None),
            panel.own_message: render.notes([translate("{name} is deleted.", name=deleted.name)]),
            panel.restore: gr.Button(visible=True),
            panel.deleted: deleted,
        }

    def restore(gone: Preset | None, request: gr.Request) -> Update:
        if gone is None:
            return {panel.restore: gr.Button(visible=False)}
        return add(owner_of(request), lambda: gone, lambda name: translate("{name} is back.", name=name))

    listen(panel.choice.input, choose, panel.choice, [*shown, panel.own_message])
    values = {name: form.fields[name] for name in PRESET_FIELDS}
    listen(panel.save.click, save, [panel.name, panel.parts], outcome, inputs_kwargs=values)
    listen(panel.import_file.upload, import_preset, panel.import_file, outcome)
    listen(panel.replace.click, replace, panel.pending, outcome)
    listen(panel.keep_existing.click, lambda: _clear_question(panel), None, question_outputs, queue=False)
    listen(panel.rename.click, rename, [panel.choice, panel.name], outcome)
    listen(panel.delete.click, delete, panel.choice, outcome)
    listen(panel.restore.click, restore, panel.deleted, outcome)


def saved_values(values: Mapping[str, Any], parts: Sequence[str], checkpoint: Checkpoint) -> dict[str, Any]:
    """The non-empty form `values` of the given `parts`. Raises `RequestError`."""
    names = [name for part in parts for name in PRESET_PARTS.get(part, ())]
    saved = {name: values[name] for name in names if values[name] not in (None, "", [])}
    if "loras" in saved:
        saved["loras"] = [asdict(choice) for choice in read_loras(saved["loras"])]
    for name, is_fixed in (("steps", checkpoint.steps_fixed), ("guidance", checkpoint.guidance_fixed)):
        if is_fixed:
            saved.pop(name, None)
    return saved


def preset_file_name(preset: Preset) -> str:
    """The file name of `preset`, like those that ship with the studio."""
    plain = unicodedata.normalize("NFKD", preset.name).encode("ascii", "ignore").decode().lower()
    return f"{re.sub('[^a-z0-9]+', '-', plain).strip('-') or 'preset'}.json"


def _show_chosen(panel: PresetPanel, preset: Preset, *, own: bool) -> Update:
    file = save_bytes_to_cache(preset.as_json().encode(), preset_file_name(preset), get_upload_folder())
    return {
        panel.card: preset_card_html(preset),
        panel.apply: gr.Button(interactive=True),
        panel.name: gr.Textbox(preset.name) if own else gr.Textbox(),
        panel.rename: gr.Button(visible=own),
        panel.delete: gr.Button(visible=own),
        panel.export: gr.DownloadButton(i18n("Export"), value=file, visible=True),
    }


def _clear_chosen(panel: PresetPanel) -> Update:
    return {
        panel.card: "",
        panel.apply: gr.Button(interactive=False),
        panel.rename: gr.Button(visible=False),
        panel.delete: gr.Button(visible=False),
        panel.export: gr.DownloadButton(visible=False),
    }


def _clear_question(panel: PresetPanel) -> Update:
    """Hide the question about replacement."""
    return {
        panel.question: "",
        panel.replace: gr.Button(visible=False),
        panel.keep_existing: gr.Button(visible=False),
        panel.pending: None,
    }
