"""Presets: those that ship with the studio are good for every checkpoint, and a file may come from anybody."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS, DEV, KLEIN_4B, KLEIN_BASE_4B, NANO, Checkpoint
from flux2_studio.errors import PresetError, RequestError
from flux2_studio.request import Request
from flux2_studio.settings import PRESETS
from flux2_studio.storage.presets import (
    MAX_PRESET_BYTES,
    Preset,
    Presets,
    apply_preset,
    describe_fields,
    form_for,
    make_preset,
    parse_preset,
    read_preset,
)
from tools.presets.examples import REFERENCES

SHIPPED = Presets.load(PRESETS)
CARD: dict[str, Any] = {
    "name": "Ink",
    "group": "Drawings",
    "form": "generate",
    "description": "Ink on paper.",
    "subject": "a heron",
    "request": {"prompt": "An ink drawing of {subject}, bold.", "width": 1024, "height": 768},
}


def preset(**changes: Any) -> Preset:
    return parse_preset(json.dumps({**CARD, **changes}).encode())


def asking(**request: Any) -> Preset:
    card = {name: value for name, value in CARD.items() if name != "subject"}
    return parse_preset(json.dumps({**card, "request": request}).encode())


# --- those that ship --------------------------------------------------------------------------------------------


def test_many_ship_for_every_form_and_all_can_be_read() -> None:
    assert SHIPPED.problems == ()
    assert len(SHIPPED.by_slug) == len(list(PRESETS.glob("*.json")))
    assert len(SHIPPED.for_form("generate")) >= 24
    assert len(SHIPPED.for_form("edit")) >= 10
    assert len(SHIPPED.for_form("multi")) >= 5


def test_no_two_are_alike() -> None:
    for of in ("name", "description", "template"):
        said = [getattr(it, of).casefold() for it in SHIPPED.by_slug.values()]
        assert len(said) == len(set(said)), of


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda it: it.name)
def test_each_runs_with_every_checkpoint(checkpoint: Checkpoint) -> None:
    for slug, it in SHIPPED.by_slug.items():
        try:
            check_runs(it, checkpoint)
        except Exception as error:
            error.add_note(f"preset {slug}")
            raise


def check_runs(it: Preset, checkpoint: Checkpoint) -> None:
    if it.request.get("checkpoint", checkpoint.name) != checkpoint.name:
        return
    references = {"generate": 0, "edit": 1, "multi": 2}[it.form]
    for words in ("", "a red kite"):
        made = apply_preset(it, words, checkpoint)
        request = Request.from_dict(
            {**made.values, "checkpoint": checkpoint.name, "references": ["a.png"] * references}
        ).resolve(checkpoint, [(128, 128)] * references)
        assert "{" not in request.prompt
        assert ("a red kite" in request.prompt) is (it.takes_subject and bool(words))
        # Only a size may be too large; nothing that a checkpoint cannot do at all is asked of it.
        assert all("nearly the same shape" in note for note in made.notes)
        assert not made.notes or checkpoint.is_toy


def test_each_shows_what_comes_out() -> None:
    for slug, it in SHIPPED.by_slug.items():
        if it.picture is None:
            assert it.shows, slug
            continue
        assert it.picture.stem == slug
        assert it.picture.stat().st_size < 12_000, slug
        with Image.open(it.picture) as image:
            assert image.format == "WEBP", slug
            assert image.height == 128, slug
        if it.form != "generate":
            assert len(REFERENCES[slug]) == (1 if it.form == "edit" else 2), slug


def test_every_example_is_some_presets() -> None:
    assert {path.stem for path in (PRESETS / "examples").iterdir()} == {
        slug for slug, it in SHIPPED.by_slug.items() if it.picture
    }


# --- what a preset does -----------------------------------------------------------------------------------------


def test_the_words_take_the_subjects_place_and_are_found_again() -> None:
    ink = preset()
    assert ink.fill_prompt("a fox ") == "An ink drawing of a fox, bold."
    assert ink.fill_prompt(" ") == "An ink drawing of a heron, bold."
    assert ink.extract_subject("An ink drawing of a fox, bold.") == "a fox"
    assert ink.extract_subject("An ink drawing of a heron, bold.") == ""
    assert ink.extract_subject("a fox") is None
    # A template that somebody is writing is no subject, and words that look like a pattern are only words.
    assert ink.fill_prompt("{subject} in snow") == "An ink drawing of a heron, bold."
    assert ink.fill_prompt(r"\1 {0} %s") == r"An ink drawing of \1 {0} %s, bold."
    # Where beginning and end overlap, there are no words between them.
    assert asking(prompt="aa {subject} aa").extract_subject("aa aa") is None


def test_without_a_subject_the_user_is_asked_for_one() -> None:
    with pytest.raises(PresetError, match="write in the prompt what it should be about"):
        asking(prompt="A photograph of {subject}.").fill_prompt("")
    assert asking(steps=9).fill_prompt("a fox") is None


def test_a_size_beyond_a_checkpoint_keeps_its_shape() -> None:
    made = apply_preset(preset(), "", NANO)
    assert (made.values["width"], made.values["height"]) == (144, 112)
    assert "does not draw 1024 x 768" in made.notes[0]
    made = apply_preset(preset(), "", DEV)
    assert (made.values["width"], made.values["height"], made.notes) == (1024, 768, ())


def test_what_a_checkpoint_has_fixed_is_told_and_left_out() -> None:
    it = asking(prompt="x", steps=30, guidance=5, negative_prompt="blur")
    assert apply_preset(it, "", KLEIN_BASE_4B).values == it.request
    made = apply_preset(it, "", KLEIN_4B)
    assert dict(made.values) == {"prompt": "x"}
    assert [note.partition(".")[0] for note in made.notes] == [
        "Left out of the preset: steps",
        "Left out of the preset: guidance",
        "Left out of the preset: negative prompt",
    ]


def test_what_is_given_already_is_left_alone() -> None:
    made = apply_preset(asking(prompt="x", steps=30, count=2), "", KLEIN_4B, given={"steps", "prompt"})
    assert (dict(made.values), made.notes) == ({"count": 2}, ())


def test_a_lora_without_a_weight_counts_fully() -> None:
    assert apply_preset(asking(loras=[{"name": "ink"}]), "", NANO).values == {"loras": [{"name": "ink", "weight": 1.0}]}


def test_saying_what_is_set() -> None:
    names = describe_fields({"width": 1, "height": 2, "prompt": "", "loras": [], "count": 2})
    assert names == ["prompt", "pictures", "LoRAs", "size"]
    assert [form_for(number) for number in (0, 1, 2, 9)] == ["generate", "edit", "multi", "multi"]


def test_holding_keeps_what_says_something_and_nothing_secret() -> None:
    kept = make_preset(" Mine ", "edit", {"prompt": "p {subject}", "negative_prompt": "", "steps": None, "seed": 7})
    assert kept.as_dict() == {
        "name": "Mine",
        "group": "Yours",
        "form": "edit",
        "description": "Sets prompt.",
        "request": {"prompt": "p {subject}"},
    }
    with pytest.raises(PresetError, match="The request is empty"):
        make_preset("Mine", "edit", {"prompt": ""})


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for number, it in enumerate(
        [*SHIPPED.by_slug.values(), asking(loras=[{"name": "ö/b", "weight": -1}], format="webp")]
    ):
        file = tmp_path / f"{number}.json"
        file.write_text(it.as_json(), encoding="utf-8")
        again = read_preset(file)
        assert again.as_dict() == it.as_dict()
        assert again.picture is None


# --- files by anybody -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", ["seed", "references", "upsampling", "watermark", "metadata", "sign", "sign_prompt"])
def test_what_no_preset_may_hold(field: str) -> None:
    with pytest.raises(PresetError, match=f"has no field '{field}'"):
        asking(prompt="x", **{field: True})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"colour": "red"}, "has no field 'colour'"),
        ({"name": ""}, "name must be one line"),
        ({"name": "a\nb"}, "name must be one line"),
        ({"name": "a\u202eb"}, "name must be one line"),
        ({"name": ["a"]}, "name must be a text"),
        ({"name": "x" * 61}, "shorten it to 60"),
        ({"form": "inspect"}, "form must be one of"),
        ({"form": ["edit"]}, "form must be one of"),
        ({"picture": "../../secret.webp"}, "Only presets that come with the studio"),
        ({"subject": "a {subject}"}, "must not hold"),
        ({"request": {}}, "The request is empty"),
        ({"request": []}, "must be an object"),
        ({"request": {"prompt": "no place"}}, "no {subject} in the prompt"),
        ({"request": {"prompt": "{subject} and {subject}"}}, "leave one of them"),
        ({"request": {"prompt": "{subject}"}}, "nothing but"),
        ({"request": {"prompt": 5}}, "Write a prompt first"),
        ({"request": {"prompt": "{subject}!", "steps": "9"}}, "steps must be a whole number"),
        ({"request": {"prompt": "{subject}!", "steps": True}}, "steps must be a whole number"),
        ({"request": {"prompt": "{subject}!", "guidance": True}}, "guidance must be a number"),
        ({"request": {"prompt": "{subject}!", "guidance": None}}, "null"),
        ({"request": {"prompt": "{subject}!", "width": 512}}, "width and height together"),
        ({"request": {"prompt": "{subject}!", "width": 8, "height": 8}}, "at least 64"),
        ({"request": {"prompt": "{subject}!", "width": 10**9, "height": 64}}, "no checkpoint draws that"),
        ({"request": {"prompt": "{subject}!", "count": 0}}, "between 1 and 16"),
        ({"request": {"prompt": "{subject}!", "format": "exe"}}, "Save as one of"),
        ({"request": {"prompt": "{subject}!", "loras": "ink"}}, "must be a list"),
        ({"request": {"prompt": "{subject}!", "loras": [{"name": "../x"}]}}, "no LoRA's name"),
        ({"request": {"prompt": "{subject}!", "loras": [{"name": "x", "path": "/"}]}}, "no request"),
    ],
)
def test_wrong_values_are_told(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(PresetError) as caught:
        preset(**changes)
    assert reason in str(caught.value)


@pytest.mark.parametrize("missing", ["name", "group", "form", "description", "request"])
def test_what_is_missing_is_told(missing: str) -> None:
    card = {name: value for name, value in CARD.items() if name != missing}
    with pytest.raises(PresetError, match=f"It has no {missing}"):
        parse_preset(json.dumps(card).encode())


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe\x00", "no UTF-8"),
        (b"[1, 2]", "A preset is a JSON object"),
        (b'{"name": "a", "name": "b"}', "'name' stands there twice"),
        (b'{"request": {"guidance": NaN}}', "NaN is no number"),
        (b'{"request": {"steps": ' + b"9" * 5000 + b"}}", "no JSON"),
        (b"[" * 90_000, "no JSON"),
        (b'{"name": ' + b"[" * 6 + b"]" * 6 + b"}", "deep"),
        (b" " * (MAX_PRESET_BYTES + 1), "larger than"),
        (b'{"\\u001b[31m' + b"x" * 500 + b'": 1}', "has no field '?[31mxxx"),
    ],
)
def test_hostile_files_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(PresetError) as caught:
        parse_preset(data)
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 250


def test_only_plain_files_are_read(tmp_path: Path) -> None:
    good = tmp_path / "good.json"
    good.write_text(json.dumps(CARD), encoding="utf-8")
    (tmp_path / "link.json").symlink_to(good)
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "pipe.json")  # opening one waits for a writer, if you let it
    assert read_preset(good).name == "Ink"
    for name in ("link", "folder", "pipe", "missing"):
        with pytest.raises(PresetError, match="plain file"):
            read_preset(tmp_path / f"{name}.json")


def test_a_broken_file_hides_no_other(tmp_path: Path) -> None:
    for name, text in (
        ("good.json", json.dumps(CARD)),
        ("twin.json", json.dumps({**CARD, "name": "INK"})),
        ("broken.json", "{"),
        ("Odd name.json", json.dumps(CARD)),
        ("unknown.json", json.dumps({**CARD, "name": "Two", "request": {"prompts": "x"}})),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "link.json").symlink_to("/etc/passwd")
    read = Presets.load(tmp_path)
    assert list(read.by_slug) == ["good"]
    assert [problem.partition(":")[0] for problem in read.problems] == [
        "Odd name.json",
        "broken.json",
        "link.json",
        "twin.json",
        "unknown.json",
    ]
    assert "has no field 'prompts'" in read.problems[-1]
    assert Presets.load(tmp_path / "nowhere") == Presets()


@pytest.mark.parametrize("picture", ["missing.webp", "../a.webp", "link.webp", "a.png", 5])
def test_a_picture_is_one_of_the_examples(tmp_path: Path, picture: object) -> None:
    (tmp_path / "examples").mkdir()
    (tmp_path / "a.webp").write_bytes(b"x")
    (tmp_path / "examples" / "link.webp").symlink_to(tmp_path / "a.webp")
    (tmp_path / "it.json").write_text(json.dumps({**CARD, "picture": picture}), encoding="utf-8")
    read = Presets.load(tmp_path)
    assert not read.by_slug
    assert "picture" in read.problems[0] or "examples/" in read.problems[0]


def test_one_is_found_by_either_name() -> None:
    assert SHIPPED.find("icon-flat") is SHIPPED.find(" Flat Icon")
    with pytest.raises(RequestError, match="no preset called 'x'"):
        SHIPPED.find("x")
