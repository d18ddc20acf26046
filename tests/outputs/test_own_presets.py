"""Presets of one's own: kept, found again, and never another's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_studio.errors import PresetError
from flux2_studio.storage import own_presets
from flux2_studio.storage.database import Database
from flux2_studio.storage.own_presets import OwnPresets, PresetNameTaken
from flux2_studio.storage.presets import FormName, Preset, make_preset

ANN, BOB = "browser:ann", "browser:bob"


@pytest.fixture
def own(tmp_path: Path) -> OwnPresets:
    return OwnPresets(Database(tmp_path / "studio.sqlite3"))


def mine(name: str = "Ink", prompt: str = "ink of {subject}", form: FormName = "generate") -> Preset:
    return make_preset(name, form, {"prompt": prompt, "loras": [{"name": "a", "weight": 0.5}]})


def test_what_is_kept_is_found_again(own: OwnPresets, tmp_path: Path) -> None:
    id = own.save(ANN, mine("Öl"))
    own.save(ANN, mine("Edit", form="edit"))
    again = OwnPresets(Database(tmp_path / "studio.sqlite3"))
    assert again.for_form(ANN, "generate") == {id: mine("Öl")}
    assert again.find(ANN, id) == mine("Öl")


def test_names_are_taken_once_a_form(own: OwnPresets) -> None:
    id = own.save(ANN, mine())
    with pytest.raises(PresetNameTaken) as caught:
        own.save(ANN, mine("INK", "other"))
    assert caught.value.name == "Ink"
    assert own.find(ANN, id).template == "ink of {subject}"
    assert own.save(ANN, mine("INK", "other"), replace=True) == id
    assert own.for_form(ANN, "generate") == {id: mine("INK", "other")}
    own.save(ANN, mine(form="edit"))
    own.save(BOB, mine())


def test_renaming_and_deleting(own: OwnPresets) -> None:
    first, second = own.save(ANN, mine("One")), own.save(ANN, mine("Two"))
    assert own.rename(ANN, first, " one ").name == "one"  # its own name is not in its way
    with pytest.raises(PresetNameTaken):
        own.rename(ANN, first, "TWO")
    with pytest.raises(PresetError, match="one line"):
        own.rename(ANN, first, "\x00")
    assert own.delete(ANN, second) == mine("Two")
    assert [it.name for it in own.for_form(ANN, "generate").values()] == ["one"]


@pytest.mark.parametrize(
    "act",
    [
        lambda own, id: own.find(BOB, id),
        lambda own, id: own.rename(BOB, id, "Stolen"),
        lambda own, id: own.delete(BOB, id),
        lambda own, id: own.find(ANN, "' OR 1=1 --"),
    ],
)
def test_nobody_else_gets_at_them(own: OwnPresets, act: Callable[[OwnPresets, str], object]) -> None:
    id = own.save(ANN, mine())
    with pytest.raises(PresetError, match="not there any more"):
        act(own, id)
    assert own.for_form(BOB, "generate") == {}
    assert own.find(ANN, id) == mine()


def test_somebody_unknown_has_none(own: OwnPresets) -> None:
    for act in (lambda: own.for_form("", "generate"), lambda: own.save("", mine())):
        with pytest.raises(PresetError, match="cookie"):
            act()


def test_there_is_an_end_to_them(own: OwnPresets) -> None:
    for number in range(own_presets.MAX_PRESETS_PER_OWNER):
        own.save(ANN, mine(f"Ink {number}"))
    with pytest.raises(PresetError, match="delete one first"):
        own.save(ANN, mine("One more"))
    own.save(ANN, mine("Ink 0", "still replaced"), replace=True)
    own.save(BOB, mine())


def test_a_studio_has_room_for_so_many(tmp_path: Path) -> None:
    small = OwnPresets(Database(tmp_path / "studio.sqlite3"), max_total_bytes=700)
    small.save(ANN, mine(prompt="x" * 300))
    with pytest.raises(PresetError, match="no room for more"):
        small.save(BOB, mine(prompt="x" * 300))
