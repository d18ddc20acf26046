"""The order in which waiting runs start, and how an owner reorders their own.

The oldest run goes first, but a run of the loaded checkpoint may skip it, as long as no run is skipped more than
`MAX_SKIPS` times. So users of two checkpoints do not cause a swap after every picture. An owner's explicit order always
holds, whatever is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

MAX_SKIPS = 3  # runs of the loaded checkpoint that may start before an older run of another one


class WaitingRun(Protocol):
    """A waiting run.

    required_checkpoint: the checkpoint that it uses. checkpoint_after: the one loaded when it is done. skipped: how
    many younger runs started before it. predecessors: the runs that its owner moved before it.
    """

    skipped: int

    @property
    def owner(self) -> str: ...

    @property
    def required_checkpoint(self) -> str | None: ...

    @property
    def checkpoint_after(self) -> str | None: ...

    @property
    def predecessors(self) -> set[WaitingRun]: ...


RunT = TypeVar("RunT", bound=WaitingRun)


def take_next(waiting: list[RunT], loaded: str | None) -> RunT:
    """Remove the run to start now from `waiting` (oldest first), and increment `skipped` of the runs it overtakes."""
    skipped = {id(job): job.skipped for job in waiting}
    chosen = _choose_next(waiting, loaded, skipped)
    for job in waiting:
        job.skipped = skipped[id(job)]
    waiting.remove(chosen)
    return chosen


def predict_order(waiting: Sequence[RunT], loaded: str | None) -> list[RunT]:
    """Return `waiting` (oldest first) in the order in which the runs will start if no others arrive."""
    remaining, skipped, ordered = list(waiting), {id(job): job.skipped for job in waiting}, []
    while remaining:
        chosen = _choose_next(remaining, loaded, skipped)
        remaining.remove(chosen)
        loaded = chosen.checkpoint_after
        ordered.append(chosen)
    return ordered


def move_run(waiting: list[RunT], job: RunT, loaded: str | None, *, later: bool) -> bool:
    """Move `job` before its owner's previous run in the predicted order, or, with `later`, after the next one.

    The two swap their positions in `waiting`; runs of other owners keep theirs. Returns False if there is no such run.
    """
    own_runs = [other for other in predict_order(waiting, loaded) if other.owner == job.owner]
    other_index = own_runs.index(job) + (1 if later else -1)
    if not 0 <= other_index < len(own_runs):
        return False
    other = own_runs[other_index]
    first, second = (other, job) if later else (job, other)
    first.predecessors.discard(second)
    second.predecessors.add(first)
    first_index, second_index = waiting.index(first), waiting.index(second)
    if second_index < first_index:
        waiting[first_index], waiting[second_index] = second, first
        first.skipped, second.skipped = second.skipped, first.skipped  # the count belongs to the position
    return True


def _choose_next(waiting: Sequence[RunT], loaded: str | None, skipped: dict[int, int]) -> RunT:
    """Return the run of `waiting` to start now; increment `skipped` (by identity) of the runs it overtakes."""
    unblocked = [job for job in waiting if not any(other in job.predecessors for other in waiting)]
    chosen = unblocked[0]
    if skipped[id(chosen)] < MAX_SKIPS:
        chosen = next((job for job in unblocked if job.required_checkpoint == loaded), chosen)
    for older in unblocked[: unblocked.index(chosen)]:
        skipped[id(older)] += 1
    return chosen
