"""What a request may be, and what a checkpoint makes of it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError
from flux2_studio.request import (
    MAX_COUNT,
    MAX_LORAS,
    MAX_PROMPT,
    MAX_SEED,
    LoraChoice,
    Outpaint,
    Request,
    Upsampling,
    describe_changes,
    round_side,
    size_for_aspect,
)

BY_NAME = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
DISTILLED, BASE, DEV = BY_NAME["klein-4b"], BY_NAME["klein-base-4b"], BY_NAME["dev"]


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"prompt": ""}, "Write a prompt"),
        ({"prompt": " \n\t"}, "Write a prompt"),
        ({"prompt": None}, "Write a prompt"),
        ({"prompt": "x" * (MAX_PROMPT + 1)}, "20,001 characters"),
        ({"negative_prompt": "x" * (MAX_PROMPT + 1)}, "20,001 characters"),
        ({"width": 512.0}, "width must be a whole number, not 512.0"),
        ({"height": "512"}, "height must be a whole number, not '512'"),
        ({"steps": True}, "steps must be a whole number, not True"),
        ({"guidance": float("nan")}, "guidance must be a number"),
        ({"guidance": float("inf")}, "guidance must be a number"),
        ({"guidance": "4"}, "guidance must be a number"),
        ({"guidance": True}, "guidance must be a number"),
        ({"count": 0}, f"between 1 and {MAX_COUNT}"),
        ({"count": MAX_COUNT + 1}, f"between 1 and {MAX_COUNT}"),
        ({"seed": -1}, "Choose a seed between 0"),
        ({"seed": MAX_SEED + 1}, "Choose a seed between 0"),
    ],
)
def test_what_no_checkpoint_could_do(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=re.escape(says)):
        Request(**{"prompt": "a fox", **fields})


def test_resolving_leaves_no_none_and_is_idempotent() -> None:
    for checkpoint in CHECKPOINTS:
        resolved = Request(prompt="a fox").resolve(checkpoint)
        assert [name for name, value in vars(resolved).items() if value is None] == ["mask"]
        assert resolved.checkpoint == checkpoint.name
        assert (resolved.steps, resolved.guidance) == (checkpoint.steps, checkpoint.guidance)
        assert resolved.resolve(checkpoint) == resolved


def test_size_defaults_to_the_checkpoint() -> None:
    resolved = Request(prompt="a fox").resolve(DISTILLED)
    assert (resolved.width, resolved.height) == (1024, 1024)
    toy = Request(prompt="a fox").resolve(BY_NAME["nano"])
    assert (toy.width, toy.height) == (128, 128)


def test_size_defaults_to_the_first_reference() -> None:
    request = Request(prompt="a fox", references=(Path("a.png"), Path("b.png")))
    resolved = request.resolve(DISTILLED, [(640, 480), (1024, 1024)])
    assert (resolved.width, resolved.height) == (640, 480)
    wide = replace(request, width=800).resolve(DISTILLED, [(640, 480), (1024, 1024)])
    assert (wide.width, wide.height) == (800, 480)


@pytest.mark.parametrize("size", [(157, 211), (64, 65), (1023, 640)])
def test_an_edit_has_its_references_size_to_the_pixel(size: tuple[int, int]) -> None:
    request = Request(prompt="a fox", references=(Path("a.png"),))
    resolved = request.resolve(DISTILLED, [size])
    assert (resolved.width, resolved.height) == size
    assert resolved.resolve(DISTILLED, [size]) == resolved and describe_changes(request, resolved) == ()
    across, down = resolved.padded_size
    assert across % 16 == down % 16 == 0 and 0 <= across - size[0] < 16 and 0 <= down - size[1] < 16
    other = replace(resolved, width=size[0] + 1).resolve(DISTILLED, [size])
    assert (other.width, other.height) == (round_side(size[0] + 1, "width"), round_side(size[1], "height"))


def test_outpainting_adds_to_the_reference() -> None:
    margins = Outpaint(left=10, right=21, bottom=3)
    request = Request(prompt="a fox", references=(Path("a.png"),), outpaint=margins)
    resolved = request.resolve(DISTILLED, [(157, 211)])
    assert (resolved.width, resolved.height) == (188, 214) == margins.grown((157, 211))
    assert margins.shrunk((188, 214)) == (157, 211)
    assert resolved.resolve(DISTILLED, [(157, 211)]) == resolved
    assert Request.from_dict(json.loads(json.dumps(resolved.as_dict()))) == resolved
    assert not Outpaint() and margins
    with pytest.raises(RequestError, match="keeps its scale, which gives 188 x 214, not 188 x 300"):
        replace(request, height=300).resolve(DISTILLED, [(157, 211)])
    with pytest.raises(RequestError, match="too large"):
        replace(request, outpaint=Outpaint(left=8192)).resolve(DISTILLED, [(1024, 1024)])


@pytest.mark.parametrize("pixels", [-1, 9000, 1.5, True, "7", None])
def test_margins_are_whole_numbers(pixels: Any) -> None:
    with pytest.raises(RequestError, match="pixels on the top as a whole number"):
        Outpaint(top=pixels)


@pytest.mark.parametrize("fields", [{"mask": Path("m.png")}, {"outpaint": Outpaint(left=8)}, {"match_colours": True}])
def test_what_edits_needs_something_to_edit(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="need a picture to edit"):
        Request(prompt="a fox", **fields).resolve(DISTILLED)


@pytest.mark.parametrize(("asked", "given"), [(64, 64), (65, 64), (71, 64), (72, 80), (1000, 1008), (1024, 1024)])
def test_sides_are_rounded_to_multiples_of_16(asked: int, given: int) -> None:
    assert round_side(asked, "width") == given


def test_rounding_is_told() -> None:
    asked = Request(prompt="a fox", width=1000, height=512)
    resolved = asked.resolve(DISTILLED)
    assert (resolved.width, resolved.height) == (1008, 512)
    (note,) = describe_changes(asked, resolved)
    assert "width" in note and "1000" in note and "1008" in note
    assert describe_changes(Request(prompt="a fox"), resolved) == ()


def test_too_small_and_too_large() -> None:
    with pytest.raises(RequestError, match="width must be at least 64 pixels, not 63"):
        Request(prompt="a fox", width=63).resolve(DISTILLED)
    with pytest.raises(RequestError, match=re.escape("4096 x 2048 is too large for FLUX.2 klein 4B")):
        Request(prompt="a fox", width=4096, height=2048).resolve(DISTILLED)
    assert Request(prompt="a fox", width=2048, height=2048).resolve(DISTILLED).width == 2048


def test_fixed_values_are_refused_not_replaced() -> None:
    with pytest.raises(RequestError, match="always runs with steps 4"):
        Request(prompt="a fox", steps=8).resolve(DISTILLED)
    with pytest.raises(RequestError, match="always runs with guidance 1"):
        Request(prompt="a fox", guidance=4.0).resolve(DISTILLED)
    same = Request(prompt="a fox", steps=4, guidance=1).resolve(DISTILLED)
    assert (same.steps, same.guidance) == (4, 1.0)
    assert isinstance(same.guidance, float)


def test_free_values_have_limits() -> None:
    free = Request(prompt="a fox", steps=20, guidance=2.5).resolve(BASE)
    assert (free.steps, free.guidance) == (20, 2.5)
    for fields, says in (
        ({"steps": 0}, "steps from 1 to 100, not 0"),
        ({"steps": 101}, "steps from 1 to 100, not 101"),
        ({"guidance": 0.5}, "guidance from 1 to 10, not 0.5"),
        ({"guidance": 11}, "guidance from 1 to 10, not 11"),
    ):
        with pytest.raises(RequestError, match=re.escape(says)):
            Request(prompt="a fox", **fields).resolve(DEV)


def test_negative_prompt_only_where_it_is_used() -> None:
    request = Request(prompt="a fox", negative_prompt="snow")
    assert request.resolve(BASE).negative_prompt == "snow"
    for checkpoint in (DISTILLED, DEV):
        with pytest.raises(RequestError, match="does not use a negative prompt"):
            request.resolve(checkpoint)
    assert replace(request, negative_prompt="").resolve(DISTILLED).negative_prompt == ""


def test_too_many_references() -> None:
    paths = tuple(Path(f"{i}.png") for i in range(11))
    with pytest.raises(RequestError, match="at most 10 references, not 11"):
        Request(prompt="a fox", references=paths).resolve(DISTILLED, [(64, 64)] * 11)
    ten = Request(prompt="a fox", references=paths[:10]).resolve(DISTILLED, [(64, 64)] * 10)
    assert len(ten.references) == 10


def test_seeds() -> None:
    assert Request(prompt="a fox", seed=7, count=3).resolve(DISTILLED).seeds == (7, 8, 9)
    drawn = {Request(prompt="a fox").resolve(DISTILLED).seed for _ in range(8)}
    assert len(drawn) > 1
    assert all(seed is not None and 0 <= seed <= MAX_SEED - MAX_COUNT for seed in drawn)
    with pytest.raises(AssertionError):
        _ = Request(prompt="a fox").seeds


def test_every_picture_of_a_run_can_be_asked_for_again() -> None:
    for seed in Request(prompt="a fox", seed=MAX_SEED - 2, count=3).seeds:
        assert Request(prompt="a fox", seed=seed).seed == seed
    with pytest.raises(RequestError, match=f"between 0 and {MAX_SEED - 2}"):
        Request(prompt="a fox", seed=MAX_SEED - 1, count=3)


@pytest.mark.parametrize("across_down", [(1, 1), (16, 9), (9, 16), (3, 2), (21, 9), (8, 1)])
def test_size_for_aspect(across_down: tuple[int, int]) -> None:
    width, height = size_for_aspect(*across_down, 1024 * 1024)
    assert width % 16 == height % 16 == 0
    assert width * height == pytest.approx(1024 * 1024, rel=0.05)
    assert width / height == pytest.approx(across_down[0] / across_down[1], rel=0.05)


def test_as_dict_is_json() -> None:
    request = Request(prompt="a fox", references=(Path("pictures/a.png"),), seed=3).resolve(DISTILLED, [(64, 64)])
    fields = json.loads(json.dumps(request.as_dict()))
    assert fields["references"] == [str(Path("pictures/a.png"))]
    assert (fields["prompt"], fields["seed"], fields["width"], fields["checkpoint"]) == ("a fox", 3, 64, "klein-4b")


def test_loras_are_a_name_and_a_weight() -> None:
    request = Request(prompt="a fox", loras=(LoraChoice(name="styles/ink 2.1", weight=-0.5), LoraChoice(name="名前")))
    assert [choice.weight for choice in request.loras] == [-0.5, 1.0]
    assert request.resolve(DISTILLED).loras == request.loras
    assert request.as_dict()["loras"] == [{"name": "styles/ink 2.1", "weight": -0.5}, {"name": "名前", "weight": 1.0}]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), 4.01, -5, "1", None, True, 10**400])
def test_weights_have_limits(weight: object) -> None:
    with pytest.raises(RequestError, match="weight of the LoRA ink must be a number from -4 to 4"):
        LoraChoice(name="ink", weight=weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "ink ", "/ink", "ink/", "a//b", ".", "..", "../ink", "a/../b", "a/./b", "a\\b"),
        *("a\nb", "a\0b", "a\ud800b", "a\u202eb", "x" * 251, None, 5),
    ],
)
def test_names_of_loras_lead_nowhere(name: object) -> None:
    with pytest.raises(RequestError, match="is no LoRA's name"):
        LoraChoice(name=name)  # type: ignore[arg-type]


def test_too_many_loras_and_the_same_twice() -> None:
    many = tuple(LoraChoice(name=f"{number}") for number in range(MAX_LORAS + 1))
    assert len(Request(prompt="a fox", loras=many[:-1]).loras) == MAX_LORAS
    with pytest.raises(RequestError, match=f"at most {MAX_LORAS} LoRAs, not {MAX_LORAS + 1}"):
        Request(prompt="a fox", loras=many)
    with pytest.raises(RequestError, match="The LoRA ink is chosen twice"):
        Request(prompt="a fox", loras=(LoraChoice(name="ink"), LoraChoice(name="ink", weight=0.5)))


def test_json_and_back() -> None:
    request = Request(
        prompt="a fox",
        references=(Path("a.png"),),
        seed=3,
        loras=(LoraChoice(name="ink", weight=0.5),),
        upsampling=Upsampling(by="openrouter", model="some/model", temperature=0.5, top_p=0.9, max_tokens=100),
        format="webp",
        watermark=False,
        metadata=False,
        sign=False,
        sign_prompt=True,
    )
    assert Request.from_dict(json.loads(json.dumps(request.as_dict()))) == request
    resolved = request.resolve(DISTILLED, [(64, 64)])
    assert Request.from_dict(json.loads(json.dumps(resolved.as_dict()))) == resolved
    assert Request.from_dict({"prompt": "a fox"}) == Request(prompt="a fox")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "a fox", "colour": "red"},
        {"prompt": "a fox", 5: "red"},
        {"prompt": "a fox", "references": 5},
        {"prompt": "a fox", "references": [None]},
        {"prompt": "a fox", "loras": "ink"},
        {"prompt": "a fox", "loras": [["ink", 1]]},
        {"prompt": "a fox", "loras": [{"weight": 1}]},
        {"prompt": "a fox", "loras": [{"name": "ink", "strength": 1}]},
        {"prompt": "a fox", "loras": [{"name": "ink", "weight": "NaN"}]},
        {"prompt": "a fox", "negative_prompt": 5},
        {"prompt": "a fox", "negative_prompt": ["a dog"]},
        {"prompt": "a fox", "checkpoint": ["nano"]},
        {"prompt": "a fox", "format": "gif"},
        {"prompt": "a fox", "format": ["png"]},
        {"prompt": "a fox", "watermark": "yes"},
        {"prompt": "a fox", "sign": 1},
        {"prompt": "a fox", "upsampling": "openrouter"},
        {"prompt": "a fox", "upsampling": {"by": "magic"}},
        {"prompt": "a fox", "upsampling": {"by": "openrouter", "key": "sk-1"}},
        {"prompt": "a fox", "upsampling": {"by": "openrouter", "model": "a\nb"}},
        {"prompt": "a fox", "upsampling": {"by": "openrouter", "model": 5}},
        {"prompt": "a fox", "upsampling": {"by": "openrouter", "model": " "}},
        {"prompt": "a fox", "upsampling": {"temperature": 2.5}},
        {"prompt": "a fox", "upsampling": {"temperature": float("nan")}},
        {"prompt": "a fox", "upsampling": {"temperature": True}},
        {"prompt": "a fox", "upsampling": {"top_p": 0}},
        {"prompt": "a fox", "upsampling": {"max_tokens": 100.5}},
        {"prompt": "a fox", "upsampling": {"max_tokens": 10**9}},
        {"prompt": "a fox", "count": "many"},
    ],
)
def test_what_is_no_request_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        Request.from_dict(fields)


@pytest.mark.parametrize("field", ["prompt", "negative_prompt"])
def test_broken_characters_are_refused(field: str) -> None:
    with pytest.raises(RequestError, match="broken characters"):
        Request(**{"prompt": "a fox", field: "a \ud800 fox"})


def test_the_text_that_is_too_long_is_named() -> None:
    with pytest.raises(RequestError, match="The negative prompt has"):
        Request(prompt="a fox", negative_prompt="x" * 30_000)


def test_a_guidance_beyond_all_numbers_is_refused() -> None:
    with pytest.raises(RequestError, match="guidance"):
        Request(prompt="a fox", guidance=10**400)
