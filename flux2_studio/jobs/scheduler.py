"""In which order waiting runs are taken, and how an owner changes that among their own.

The oldest goes first, but one of the checkpoint that is loaded may go before it, as long as nobody is passed over more
than a few times: users of two checkpoints do not have them swapped after every picture. An owner who put one run before
another has it so, whatever is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

MAX_SKIPS = 3  # runs of the loaded checkpoint that may go before an older one of another


class WaitingRun(Protocol):
    """A run that waits. required_checkpoint: the checkpoint that it runs with; checkpoint_after: the one that is loaded
    when it is done.

    skipped: how many younger ones were taken before it. predecessors: those that its owner put before it.
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
    """Remove from `waiting`, oldest first, the one to run now, and count which older ones it goes before."""
    passed = {id(job): job.skipped for job in waiting}
    chosen = _choose_next(waiting, loaded, passed)
    for job in waiting:
        job.skipped = passed[id(job)]
    waiting.remove(chosen)
    return chosen


def predict_order(waiting: Sequence[RunT], loaded: str | None) -> list[RunT]:
    """`waiting`, oldest first, in the order in which they will be taken unless others come."""
    left, passed, ordered = list(waiting), {id(job): job.skipped for job in waiting}, []
    while left:
        chosen = _choose_next(left, loaded, passed)
        left.remove(chosen)
        loaded = chosen.checkpoint_after
        ordered.append(chosen)
    return ordered


def move_run(waiting: list[RunT], job: RunT, loaded: str | None, *, later: bool) -> bool:
    """Have `job` taken before the one of its owner's that would go just before it, or, `later`, after the next one.

    The two change places in `waiting`, where nobody else's changes. False where there is no such other.
    """
    own = [other for other in predict_order(waiting, loaded) if other.owner == job.owner]
    place = own.index(job) + (1 if later else -1)
    if not 0 <= place < len(own):
        return False
    other = own[place]
    first, second = (other, job) if later else (job, other)
    first.predecessors.discard(second)
    second.predecessors.add(first)
    here, there = waiting.index(first), waiting.index(second)
    if there < here:
        waiting[here], waiting[there] = second, first
        first.skipped, second.skipped = second.skipped, first.skipped  # it is the place that has waited
    return True


def _choose_next(waiting: Sequence[RunT], loaded: str | None, skipped: dict[int, int]) -> RunT:
    """The one of `waiting` to run now; counts in `skipped`, by identity, which older ones it goes before."""
    free = [job for job in waiting if not any(other in job.predecessors for other in waiting)]
    chosen = free[0]
    if skipped[id(chosen)] < MAX_SKIPS:
        chosen = next((job for job in free if job.required_checkpoint == loaded), chosen)
    for older in free[: free.index(chosen)]:
        skipped[id(older)] += 1
    return chosen
