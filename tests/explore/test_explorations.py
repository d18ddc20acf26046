"""The cells of an exploration."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from flux2_studio.checkpoints import CHECKPOINTS
from flux2_studio.errors import RequestError
from flux2_studio.explore.axes import Axis, read_axis
from flux2_studio.explore.plan import plan_grid, plan_list, plan_seeds
from flux2_studio.explore.variants import Wildcards
from flux2_studio.request import Request, Upsampling

LISTS = Wildcards(Path("nowhere"))
BASE = Request(prompt="a red fox", checkpoint="nano", count=3, upsampling=Upsampling(by="openrouter"))


def axis(field: str, text: str) -> Axis:
    return read_axis(field, text, CHECKPOINTS, LISTS)


def check(request: Request) -> None:
    request.resolve(next(it for it in CHECKPOINTS if it.name == request.checkpoint))


def test_three_sides() -> None:
    plan = plan_grid(
        BASE, [axis("seed", "1, 2"), axis("words", "red, green"), axis("size", "64x64, 128x64")], LISTS, check
    )
    assert len(plan.cells) == 8 and plan.prompt_count == 2
    assert (plan.columns, plan.rows, plan.tables) == (("1", "2"), ("red", "green"), ("64 x 64", "128 x 64"))
    at = {(it.column, it.row, it.table): it.request for it in plan.cells}
    assert (at[1, 0, 1].seed, at[1, 0, 1].prompt, at[1, 0, 1].width) == (2, "a red fox", 128)
    assert all(it.count == 1 and it.upsampling.by == "none" for it in at.values())


def test_one_seed_for_all_where_none_is_set() -> None:
    plan = plan_grid(BASE, [axis("words", "red, green")], LISTS, check)
    first, second = (cell.request.seed for cell in plan.cells)
    assert first is not None and first == second
    assert plan.rows == () and plan.tables == ()


def test_choices_in_the_prompt_vary_along_the_first_free_side() -> None:
    plan = plan_grid(Request(prompt="{a|b} fox", checkpoint="nano"), [axis("seed", "1, 2"), None, None], LISTS, check)
    assert plan.rows == ("a fox", "b fox") and len(plan.cells) == 4
    sides = [axis("seed", "1, 2"), axis("size", "64x64"), axis("negative_prompt", "x")]
    with pytest.raises(RequestError, match="free one"):
        plan_grid(Request(prompt="{a|b} fox", checkpoint="nano-base"), sides, LISTS, check)


def test_what_takes_long_to_change_changes_seldom() -> None:
    """Drawn by checkpoint, then by prompt, however the grid lies."""
    plan = plan_grid(
        BASE, [axis("words", "red, green"), axis("checkpoint", "nano, klein-4b"), axis("seed", "1, 2")], LISTS, check
    )
    order = [(cell.request.checkpoint, cell.request.prompt) for cell in plan.cells]
    assert len(order) == 8
    assert sum(a != b for a, b in itertools.pairwise(order)) == 3


def test_what_cannot_be_carried_out_is_told_at_once() -> None:
    with pytest.raises(RequestError, match="always runs with steps 4"):
        plan_grid(BASE, [axis("steps", "4, 8")], LISTS, check)
    with pytest.raises(RequestError, match="makes 800 pictures"):
        plan_grid(BASE, [axis("seed", "1..40"), axis("words", "red," + ",".join(map(str, range(19))))], LISTS, check)


def test_seeds_side_by_side() -> None:
    plan = plan_seeds(Request(prompt="x", checkpoint="nano", seed=10), 5, 3, check)
    assert [(it.request.seed, it.column, it.row) for it in plan.cells] == [
        (10, 0, 0),
        (11, 1, 0),
        (12, 2, 0),
        (13, 0, 1),
        (14, 1, 1),
    ]
    assert plan.columns == ("10", "11", "12", "13", "14")
    with pytest.raises(RequestError, match="between 1 and 400"):
        plan_seeds(BASE, 401, 20, check)
    with pytest.raises(RequestError, match="first seed"):
        plan_seeds(Request(prompt="x", seed=2**32 - 2), 5, 3, check)


def test_a_listing_keeps_its_places() -> None:
    requests = [Request(prompt=prompt, checkpoint="nano") for prompt in ("a", "b", "a")]
    plan = plan_list(requests, 2, ["a", "b", "a"], "Prompt")
    assert [(it.request.prompt, it.column, it.row) for it in plan.cells] == [("a", 0, 0), ("a", 0, 1), ("b", 1, 0)]
