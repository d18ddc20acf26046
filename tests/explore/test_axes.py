"""What varies along a side of a grid, as somebody types it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError
from flux2_studio.explore.axes import read_axis
from flux2_studio.explore.variants import Wildcards
from flux2_studio.request import LoraChoice, Request

BASE = Request(prompt="a red fox", seed=1, steps=20, guidance=2.0, loras=(LoraChoice(name="a"), LoraChoice(name="ink")))


def results(field: str, text: str, base: Request = BASE) -> list[tuple[str, Request]]:
    axis = read_axis(field, text, CHECKPOINTS, Wildcards(Path("nowhere")))
    return [(value.label, value.apply(base)) for value in axis.values]


@pytest.mark.parametrize(
    ("field", "text", "values"),
    [
        ("seed", "3, 7..9", [3, 7, 8, 9]),
        ("steps", "10..50 by 20", [10, 30, 50]),
        ("steps", "4..1", [4, 3, 2, 1]),
        ("guidance", "1..2 by 0.25", [1.0, 1.25, 1.5, 1.75, 2.0]),
        ("guidance", "0.1..0.3 step 0.1\n4", [0.1, 0.2, 0.3, 4.0]),
    ],
)
def test_numbers(field: str, text: str, values: list[float]) -> None:
    assert [getattr(request, field) for _, request in results(field, text)] == values


def test_words_take_each_others_place() -> None:
    found = results("words", "red, dark green,")
    assert [(label, request.prompt) for label, request in found] == [
        ("red", "a red fox"),
        ("dark green", "a dark green fox"),
        ("(nothing)", "a  fox"),
    ]


def test_prompts_a_line_with_choices() -> None:
    assert [request.prompt for _, request in results("prompt", "an owl\n\na {b|c}")] == ["an owl", "a b", "a c"]


def test_sizes() -> None:
    assert [(it.width, it.height) for _, it in results("size", "128x256, 64 \u00d7 64")] == [(128, 256), (64, 64)]


def test_checkpoints_leave_what_was_chosen_for_another() -> None:
    (label, request), (_, other) = results("checkpoint", "nano, FLUX.2 klein 4B")
    assert (label, request.checkpoint, request.steps, request.guidance) == (
        "Nano (a toy, on board)",
        "nano",
        None,
        None,
    )
    assert other.checkpoint == "klein-4b"


def test_a_loras_weight_keeps_its_place() -> None:
    (_, none), (_, half) = results("lora:a", "0, 0.5")
    assert none.loras == (LoraChoice(name="a", weight=0.0), LoraChoice(name="ink"))
    assert half.loras[0].weight == 0.5
    ((_, added),) = results("lora:new", "1")
    assert [choice.name for choice in added.loras] == ["a", "ink", "new"]


@pytest.mark.parametrize(
    ("field", "text", "told"),
    [
        ("seed", "", "write its values"),
        ("seed", "one", "no number"),
        ("seed", "1.5", "whole numbers"),
        ("seed", "-1", "whole numbers"),
        ("seed", "1, 1", "there twice"),
        ("seed", "1..1000", "is the most"),
        ("seed", "1..inf", "no number"),
        ("seed", "1..2 by 0", "no number"),
        ("guidance", "nan", "no number"),
        ("guidance", "1e999", "no number"),
        ("size", "large", "write it as"),
        ("checkpoint", "sdxl", "There is no checkpoint"),
        ("words", "fox", "at least two"),
        ("lora:../x", "1", "no LoRA's name"),
        ("references", "/etc/passwd", "cannot vary"),
        ("lora:a", "9", "must be a number"),
    ],
)
def test_what_is_no_axis(field: str, text: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        results(field, text)


def test_words_that_the_prompt_has_not() -> None:
    with pytest.raises(RequestError, match="has no 'blue'"):
        results("words", "blue, green")
