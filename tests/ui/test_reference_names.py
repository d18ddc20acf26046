"""Names of reference pictures: what the model reads for them, and what is no name."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.errors import RequestError
from flux2_studio.ui.forms.fields import captioned_items
from flux2_studio.ui.forms.reference_names import (
    MAX_REFERENCE_NAME_CHARS,
    expand_names,
    names_in,
    parse_name,
    rename_reference,
    unknown_names,
)

FOX, CAR, HAT = Path("/up/fox.png"), Path("/up/car.png"), Path("/up/hat.png")
ITEMS = captioned_items([FOX, CAR, HAT], {FOX: "fox", HAT: "red-hat"})


@pytest.mark.parametrize(
    ("prompt", "read"),
    [
        ("put @red-hat on @fox", "put image 3 on image 1"),
        ("@Fox, @FOX! (@fox)", "image 1, image 1! (image 1)"),
        ("the @foxes of @fox-land, @fox's tail, fox@fox", "the @foxes of @fox-land, image 1's tail, fox@fox"),
        ("@fox-", "image 1-"),
        ("write to me@fox.example", "write to me@fox.example"),
        ("@car stays", "@car stays"),
        ("no name at all", "no name at all"),
    ],
)
def test_a_name_is_read_as_its_picture(prompt: str, read: str) -> None:
    assert expand_names(prompt, ITEMS) == read


def test_the_longer_of_two_names_is_meant() -> None:
    items = captioned_items([FOX, CAR], {FOX: "hat", CAR: "hat-box"})
    assert expand_names("@hat-box beside @hat", items) == "image 2 beside image 1"


@pytest.mark.parametrize("name", ["Straße", "İstanbul", "ﬁn", "Ωmega"])
def test_a_name_is_found_in_any_alphabet(name: str) -> None:
    """Lower case is not the same length for all letters, nor do all agree on it."""
    items = captioned_items([FOX, CAR], {FOX: "other", CAR: name})
    assert expand_names(f"@{name} and @i", items) == "image 2 and @i"


def test_letters_that_fold_differently_are_still_a_name() -> None:
    assert expand_names("@İstanbul", captioned_items([FOX], {FOX: "istanbul"})) == "image 1"


def test_names_stand_within_chinese_and_japanese() -> None:
    items = captioned_items([FOX, CAR, HAT], {FOX: "狐狸", CAR: "きつね", HAT: "fox"})
    assert expand_names("把@狐狸放在@fox旁边", items) == "把image 1放在image 3旁边"
    assert expand_names("@きつねを描く", items) == "image 2を描く"
    assert expand_names("@füchse", captioned_items([FOX], {FOX: "f"})) == "@füchse", "not so with other letters"


def test_what_no_picture_is_called_is_told() -> None:
    spelled = expand_names("@fox, @dog and @dog; @Red-Hat and me@example.com, 在@猫 there", ITEMS)
    assert unknown_names(spelled) == ["@dog", "@猫"]
    assert unknown_names("nobody") == []
    assert len(unknown_names(" ".join(f"@n{number}" for number in range(99)))) == 5


def test_the_captions_carry_the_names_through_any_order() -> None:
    assert [caption for _, caption in ITEMS] == ["image 1 · @fox", "image 2", "image 3 · @red-hat"]
    names = names_in(ITEMS)
    assert names == {FOX: "fox", HAT: "red-hat"}
    assert captioned_items([HAT, CAR, FOX], names)[0] == (str(HAT), "image 1 · @red-hat")
    assert names_in(None) == {} and expand_names("@fox", None) == "@fox"


def test_a_picture_that_is_there_twice_is_meant_where_it_is_first() -> None:
    items = captioned_items([CAR, FOX, FOX], {FOX: "fox"})
    assert expand_names("@fox", items) == "image 2"


@pytest.mark.parametrize("caption", ["image 1 · fox", "@fox", "image 1 · @<b>", "image 1 · @fox\nmore", "", None])
def test_what_a_browser_makes_up_is_no_name(caption: str | None) -> None:
    assert names_in([(str(FOX), caption)]) == {}


def test_a_made_up_name_is_cut() -> None:
    assert names_in([(str(FOX), f"image 1 · @{'x' * 999}")]) == {FOX: "x" * MAX_REFERENCE_NAME_CHARS}


@pytest.mark.parametrize(
    ("typed", "name"),
    [("fox", "fox"), ("  my red fox ", "my-red-fox"), ("@fox", "fox"), ("", ""), ("  ", ""), ("狐狸", "狐狸")],
)
def test_what_is_typed_becomes_a_name(typed: str, name: str) -> None:
    assert parse_name(typed) == name


@pytest.mark.parametrize("typed", ["fox!", "<b>", "-fox", "a.b", "x" * (MAX_REFERENCE_NAME_CHARS + 1)])
def test_what_cannot_be_one_is_refused(typed: str) -> None:
    with pytest.raises(RequestError, match="name has"):
        parse_name(typed)


def test_one_name_is_one_picture() -> None:
    names = {FOX: "fox"}
    with pytest.raises(RequestError, match="called @FOX already"):
        rename_reference(names, CAR, "FOX")
    assert rename_reference(names, FOX, "Fox") == {FOX: "Fox"}
    assert rename_reference(names, CAR, "car") == {FOX: "fox", CAR: "car"}
    assert rename_reference(names, FOX, "") == {}
