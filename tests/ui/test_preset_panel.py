"""Presets on the page, without a browser: what is filled in, what is put back, and what a card says."""

from __future__ import annotations

import json
from pathlib import Path

import gradio as gr
import pytest

from flux2_studio.checkpoints import KLEIN_BASE_4B, NANO
from flux2_studio.errors import PresetError, RequestError
from flux2_studio.settings import PRESETS, Settings
from flux2_studio.storage.database import Database
from flux2_studio.storage.own_presets import OwnPresets
from flux2_studio.storage.presets import Preset, Presets, make_preset, parse_preset
from flux2_studio.ui.forms import fields, own_preset_panel, preset_apply, preset_panel, tabs
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.forms.preset_panel import AvailablePresets

ANN, BOB = "browser:ann", "browser:bob"
FLAT = Presets.load(PRESETS).by_slug["icon-flat"]
NIGHT = Presets.load(PRESETS).by_slug["icon-night"]
GREY = Presets.load(PRESETS).by_slug["icon-grey"]


@pytest.fixture
def shelf(tmp_path: Path) -> AvailablePresets:
    return AvailablePresets(Presets.load(PRESETS), OwnPresets(Database(tmp_path / "studio.sqlite3")))


@pytest.fixture
def form(tmp_path: Path) -> tabs.Form:
    settings = Settings(home=tmp_path)
    with gr.Blocks():
        chosen = fields.checkpoint(settings.checkpoints, "nano")
        return tabs.edit(chosen, NANO, Examples.load(settings.assets / "examples"), settings)


def test_words_stay_the_users_from_preset_to_preset() -> None:
    assert preset_apply.user_words("a bus", None) == "a bus"
    first = FLAT.fill_prompt("a bus") or ""
    assert preset_apply.user_words(first, (FLAT, "a bus")) == "a bus"
    assert preset_apply.user_words(first.replace("bus", "red bus"), (FLAT, "a bus")) == "a red bus"
    assert preset_apply.user_words("all new", (FLAT, "a bus")) == "all new"
    # An example's words are nobody's, and a preset without a subject keeps them for the next.
    assert preset_apply.user_words(NIGHT.fill_prompt("") or "", (NIGHT, "")) == ""
    assert preset_apply.user_words(GREY.template, (GREY, "a bus")) == "a bus"


def test_only_what_it_holds_is_filled_in(form: tabs.Form) -> None:
    update = preset_apply.preset_update(form, {"prompt": "p", "count": 2}, NANO, "4:3", switched=False)
    assert update == {form.fields["prompt"]: "p", form.fields["count"]: 2}
    update = preset_apply.preset_update(form, {"width": 144, "height": 112}, NANO, fields.AS_REFERENCE, switched=False)
    assert update[form.aspect] == "4:3"
    assert update[form.fields["width"]].visible
    assert set(update) <= set(preset_apply.preset_outputs(form))


def test_another_checkpoint_lays_the_form_out_anew(form: tabs.Form) -> None:
    values = {"checkpoint": "klein-base-4b", "steps": 30}
    update = preset_apply.preset_update(form, values, KLEIN_BASE_4B, "4:3", switched=True)
    assert update[form.fields["checkpoint"]] == update[form.form_checkpoint] == "klein-base-4b"
    assert update[form.fields["steps"]].value == 30
    assert update[form.fields["guidance"]].value == KLEIN_BASE_4B.guidance
    assert update[form.fields["negative_prompt"]].visible
    assert (update[form.fields["width"]].value, update[form.fields["height"]].value) == (1184, 880)
    # A size that was typed stays, and so does that of the first reference.
    assert form.fields["width"] not in preset_apply.preset_update(
        form, values, KLEIN_BASE_4B, fields.FREE, switched=True
    )


def test_going_back_hides_the_size_of_the_reference(form: tabs.Form) -> None:
    then = {"width": None, "height": None}
    update = preset_apply.preset_update(form, then, NANO, fields.AS_REFERENCE, switched=False, is_undo=True)
    assert update[form.aspect] == fields.AS_REFERENCE
    assert not update[form.fields["width"]].visible


def test_choices_are_the_studios_and_ones_own(shelf: AvailablePresets) -> None:
    mine = make_preset("<b>Mine</b>", "edit", {"prompt": "p"})
    id = shelf.own_presets.save(ANN, mine)
    assert shelf.choices("edit", ANN)[0] == ("Yours · <b>Mine</b>", f"own:{id}")
    assert shelf.choices("edit", BOB) == shelf.shipped("edit")
    assert shelf.find(f"own:{id}", ANN) == mine
    for choice, owner in ((f"own:{id}", BOB), ("own:", ANN), ("shipped:../x", ANN), ("", ANN), (None, ANN), (id, ANN)):
        with pytest.raises(PresetError):
            shelf.find(choice, owner)


def test_a_card_shows_no_html_of_a_strangers() -> None:
    hostile = '<img src=x onerror="alert(1)">'
    text = preset_panel.preset_card_html(
        Preset(
            name=hostile,
            group=hostile,
            form="edit",
            description=hostile,
            subject=hostile,
            shows=hostile,
            request={"prompt": f"{hostile} {{subject}} {hostile}"},
        )
    )
    assert "<img" not in text
    assert text.count("&lt;img") == 5
    assert 'src="data:image/webp;base64,' in preset_panel.preset_card_html(FLAT)


def test_a_form_is_saved_by_its_parts() -> None:
    values = {
        "prompt": "p",
        "negative_prompt": "n",
        "checkpoint": "klein-base-4b",
        "width": None,
        "height": None,
        "steps": 30,
        "guidance": 4.0,
        "count": 2,
        "loras": [{"name": "a", "weight": 0.5, "more": "x"}],
        "format": "png",
    }
    every = list(preset_panel.PRESET_PARTS)
    saved = own_preset_panel.saved_values(values, every, KLEIN_BASE_4B)
    assert saved["loras"] == [{"name": "a", "weight": 0.5}]
    assert {**saved, "loras": 0} == {
        "prompt": "p",
        "negative_prompt": "n",
        "checkpoint": "klein-base-4b",
        "steps": 30,
        "guidance": 4.0,
        "count": 2,
        "format": "png",
        "loras": 0,
    }
    assert own_preset_panel.saved_values(values, ["Prompt", "made up"], NANO) == {"prompt": "p", "negative_prompt": "n"}
    assert "steps" not in own_preset_panel.saved_values(values, every, NANO)  # they are its own
    with pytest.raises(RequestError):
        own_preset_panel.saved_values({**values, "loras": [{"name": "../x", "weight": 1}]}, every, NANO)


@pytest.mark.parametrize(
    ("name", "file"),
    [("Ärger & Öl", "arger-ol.json"), ("../../etc/passwd", "etc-passwd.json"), ("日本", "preset.json")],
)
def test_a_file_is_called_as_the_preset(name: str, file: str) -> None:
    assert own_preset_panel.preset_file_name(make_preset(name, "edit", {"count": 2})) == file


def test_presets_can_be_written_for_programs() -> None:
    assert parse_preset(json.dumps(FLAT.as_dict()).encode()).template == FLAT.template
