"""Presets of one's own on the page: saved from a form, renamed, deleted, written to a file and taken from one.

Whose they are is said by the visitor's cookie, never by what the browser sends: see `visitors`.
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
from flux2_studio.storage.own_presets import NameTaken
from flux2_studio.storage.presets import HELD, FormName, Preset, holding, read_preset
from flux2_studio.ui.forms.lora_panel import choices
from flux2_studio.ui.forms.preset_panel import OWN, PARTS, PresetPanel, Shelf, card
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import say, t
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

TABS: Mapping[FormName, str] = {"generate": "Generate", "edit": "Edit", "multi": "Multi-reference"}


def wire_own_presets(studio: Studio, shelf: Shelf, forms: Sequence[Form]) -> None:
    """What the visitor does with presets of their own, in each of `forms`."""
    panels = {form.name: form.presets for form in forms}
    for form in forms:
        _wire_form(studio, shelf, form, panels)


def _wire_form(studio: Studio, shelf: Shelf, form: Form, panels: Mapping[str, PresetPanel]) -> None:
    panel = form.presets
    offered = [it.choice for it in panels.values()]
    shown = [panel.card, panel.apply, panel.name, panel.rename, panel.delete, panel.export]
    asked = [panel.question, panel.replace, panel.keep, panel.pending]
    outcome = [*offered, *shown, *asked, panel.told, panel.restore, panel.deleted]

    def chosen(choice: str | None, request: gr.Request) -> Update:
        if not choice:
            return _nothing(panel)
        try:
            return {**_chosen(panel, shelf.find(choice, owner_of(request)), own=choice.startswith(OWN)), panel.told: ""}
        except StudioError as error:
            return {**_nothing(panel), panel.card: show.problem(str(error))}

    def changed(owner: str, preset: Preset, id: str, said: str) -> Update:
        """The page after `preset` of `owner`, called `id`, became what it is now."""
        there = panels[preset.form]
        update: Update = {there.choice: gr.Dropdown(choices=shelf.choices(preset.form, owner), value=None)}
        if there is panel:
            update[panel.choice] = gr.Dropdown(choices=shelf.choices(preset.form, owner), value=f"{OWN}{id}")
            update |= _chosen(panel, preset, own=True)
        else:
            said += " " + say("It is in the tab {tab}.", tab=say(TABS[preset.form]))
        return {
            **update,
            **_answered(panel),
            panel.told: show.notes([said]),
            panel.restore: gr.Button(visible=False),
            panel.deleted: None,
        }

    def add(owner: str, make: Any, said: Callable[[str], str]) -> Update:
        """Keep the preset that `make` gives, or ask, where the name is taken. said: what is said of it, by its name."""
        preset: Preset | None = None
        try:
            preset = make()
            assert preset is not None
            return changed(owner, preset, shelf.own.save(owner, preset), said(preset.name))
        except NameTaken as error:
            return {
                panel.question: show.notes(
                    [say("You have a preset called {name} already. Replace it?", name=error.name)]
                ),
                panel.replace: gr.Button(visible=True),
                panel.keep: gr.Button(visible=True),
                panel.pending: preset,
                panel.told: "",
            }
        except StudioError as error:
            return {**_answered(panel), panel.told: show.problem(str(error))}

    def save(name: str, parts: list[str], request: gr.Request, **values: Any) -> Update:
        checkpoint = studio.settings.checkpoint(values["checkpoint"])
        return add(
            owner_of(request),
            lambda: holding(name or "", form.name, saved(values, parts, checkpoint)),  # type: ignore[arg-type]
            lambda name: say("Saved as {name}. Only you see it.", name=name),
        )

    def take(file: str | None, request: gr.Request) -> Update:
        def read() -> Preset:
            if not file:
                raise PresetError("Choose a preset's file, as Export writes it.")
            try:
                return read_preset(Path(file))
            except PresetError as error:
                raise PresetError(f"{Path(file).name}: {error}") from error

        return add(owner_of(request), read, lambda name: say("Imported {name}. Only you see it.", name=name))

    def replace(pending: Preset | None, request: gr.Request) -> Update:
        if pending is None:
            return _answered(panel)
        owner = owner_of(request)
        try:
            id = shelf.own.save(owner, pending, replace=True)
            return changed(owner, pending, id, say("{name} is replaced.", name=pending.name))
        except StudioError as error:
            return {**_answered(panel), panel.told: show.problem(str(error))}

    def rename(choice: str | None, name: str, request: gr.Request) -> Update:
        owner, id = owner_of(request), (choice or "").removeprefix(OWN)
        try:
            preset = shelf.own.rename(owner, id, name or "")
            return changed(owner, preset, id, say("It is called {name} now.", name=preset.name))
        except StudioError as error:
            return {panel.told: show.problem(str(error))}

    def delete(choice: str | None, request: gr.Request) -> Update:
        owner = owner_of(request)
        try:
            gone = shelf.own.delete(owner, (choice or "").removeprefix(OWN))
            left = shelf.choices(form.name, owner)
        except StudioError as error:
            return {panel.told: show.problem(str(error))}
        return {
            **_nothing(panel),
            **_answered(panel),
            panel.choice: gr.Dropdown(choices=left, value=None),
            panel.told: show.notes([say("{name} is deleted.", name=gone.name)]),
            panel.restore: gr.Button(visible=True),
            panel.deleted: gone,
        }

    def restore(gone: Preset | None, request: gr.Request) -> Update:
        if gone is None:
            return {panel.restore: gr.Button(visible=False)}
        return add(owner_of(request), lambda: gone, lambda name: say("{name} is back.", name=name))

    listen(panel.choice.input, chosen, panel.choice, [*shown, panel.told])
    values = {name: form.fields[name] for name in HELD}
    listen(panel.save.click, save, [panel.name, panel.parts], outcome, inputs_kwargs=values)
    listen(panel.take.upload, take, panel.take, outcome)
    listen(panel.replace.click, replace, panel.pending, outcome)
    listen(panel.keep.click, lambda: _answered(panel), None, asked, queue=False)
    listen(panel.rename.click, rename, [panel.choice, panel.name], outcome)
    listen(panel.delete.click, delete, panel.choice, outcome)
    listen(panel.restore.click, restore, panel.deleted, outcome)


def saved(values: Mapping[str, Any], parts: Sequence[str], checkpoint: Checkpoint) -> dict[str, Any]:
    """Of a form's `values` those that `parts` name and that say something. Raises `RequestError`."""
    names = [name for part in parts for name in PARTS.get(part, ())]
    held = {name: values[name] for name in names if values[name] not in (None, "", [])}
    if "loras" in held:
        held["loras"] = [asdict(choice) for choice in choices(held["loras"])]
    for name, fixed in (("steps", checkpoint.steps_fixed), ("guidance", checkpoint.guidance_fixed)):
        if fixed:
            held.pop(name, None)
    return held


def file_name(preset: Preset) -> str:
    """How the file of `preset` is called: as those that come with the studio are."""
    plain = unicodedata.normalize("NFKD", preset.name).encode("ascii", "ignore").decode().lower()
    return f"{re.sub('[^a-z0-9]+', '-', plain).strip('-') or 'preset'}.json"


def _chosen(panel: PresetPanel, preset: Preset, *, own: bool) -> Update:
    file = save_bytes_to_cache(preset.as_json().encode(), file_name(preset), get_upload_folder())
    return {
        panel.card: card(preset),
        panel.apply: gr.Button(interactive=True),
        panel.name: gr.Textbox(preset.name) if own else gr.Textbox(),
        panel.rename: gr.Button(visible=own),
        panel.delete: gr.Button(visible=own),
        panel.export: gr.DownloadButton(t("Export"), value=file, visible=True),
    }


def _nothing(panel: PresetPanel) -> Update:
    return {
        panel.card: "",
        panel.apply: gr.Button(interactive=False),
        panel.rename: gr.Button(visible=False),
        panel.delete: gr.Button(visible=False),
        panel.export: gr.DownloadButton(visible=False),
    }


def _answered(panel: PresetPanel) -> Update:
    """Nothing is asked any more."""
    return {
        panel.question: "",
        panel.replace: gr.Button(visible=False),
        panel.keep: gr.Button(visible=False),
        panel.pending: None,
    }
