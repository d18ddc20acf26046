"""The order of waiting runs, and how their owners change it."""

from __future__ import annotations

from typing import Any

import pytest

from flux2_studio.jobs import scheduler


class Run:
    def __init__(self, name: str) -> None:
        """name: owner, checkpoint and a number, as in "aX1"."""
        self.name = name
        self.owner, self.required_checkpoint, self.checkpoint_after = name[0], name[1], name[1]
        self.skipped = 0
        self.predecessors: set[Any] = set()


def runs(names: str) -> list[Run]:
    return [Run(name) for name in names.split()]


def ordered(waiting: list[Run], loaded: str | None = None) -> str:
    return " ".join(run.name for run in scheduler.predict_order(waiting, loaded))


def named(waiting: list[Run], name: str) -> Run:
    return next(run for run in waiting if run.name == name)


def test_the_loaded_checkpoint_goes_first_and_looking_changes_nothing() -> None:
    waiting = runs("aX1 bY1 aX2 bY2")
    assert ordered(waiting, "Y") == "bY1 bY2 aX1 aX2"
    assert ordered(waiting, "X") == "aX1 aX2 bY1 bY2"
    assert [run.skipped for run in waiting] == [0, 0, 0, 0]
    assert scheduler.take_next(waiting, "Y").name == "bY1" and named(waiting, "aX1").skipped == 1


@pytest.mark.parametrize(
    ("name", "later", "expected"),
    [
        ("aX2", False, "aX2 bX1 aX1 bX2 aX3"),
        ("aX1", True, "aX2 bX1 aX1 bX2 aX3"),
        ("aX3", False, "aX1 bX1 aX3 bX2 aX2"),
        ("bX2", False, "aX1 bX2 aX2 bX1 aX3"),
        ("aX1", False, None),
        ("aX3", True, None),
        ("bX2", True, None),
    ],
)
def test_ones_own_change_places_and_nobody_elses_do(name: str, later: bool, expected: str | None) -> None:
    waiting = runs("aX1 bX1 aX2 bX2 aX3")
    before = ordered(waiting)
    assert scheduler.move_run(waiting, named(waiting, name), None, later=later) is (expected is not None)
    assert ordered(waiting) == (expected or before)


def test_the_owners_order_counts_more_than_what_is_loaded() -> None:
    waiting = runs("aX1 aY1 aY2")
    assert ordered(waiting, "Y") == "aY1 aY2 aX1"
    for expected in ("aY1 aX1 aY2", "aX1 aY1 aY2"):
        assert scheduler.move_run(waiting, named(waiting, "aX1"), "Y", later=False)
        assert ordered(waiting, "Y") == expected
    assert scheduler.move_run(waiting, named(waiting, "aX1"), "Y", later=True)
    assert ordered(waiting, "Y") == "aY1 aX1 aY2", "and can be changed back"


def test_a_place_keeps_its_claim_when_another_run_gets_it() -> None:
    waiting = runs("aX1 bY1 aX2")
    waiting[0].skipped = scheduler.MAX_SKIPS
    scheduler.move_run(waiting, named(waiting, "aX2"), "Y", later=False)
    assert ordered(waiting, "Y").startswith("aX2"), "it has waited long enough"
    assert named(waiting, "aX1").skipped == 0


def test_a_run_that_went_first_holds_up_nobody_any_more() -> None:
    waiting = runs("aX1 aX2")
    scheduler.move_run(waiting, named(waiting, "aX2"), None, later=False)
    assert scheduler.take_next(waiting, None).name == "aX2"
    assert scheduler.take_next(waiting, None).name == "aX1"
