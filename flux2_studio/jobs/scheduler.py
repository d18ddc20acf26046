"""In which order waiting runs are taken, and how an owner changes that among their own.

The oldest goes first, but one of the checkpoint that is loaded may go before it, as long as nobody is passed over more
than a few times: users of two checkpoints do not have them swapped after every picture. An owner who put one run before
another has it so, whatever is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

PASSED = 3  # runs of the loaded checkpoint that may go before an older one of another


class Waiting(Protocol):
    """A run that waits. needs: the checkpoint that it runs with; leaves: the one that is loaded when it is done.

    passed: how many younger ones were taken before it. behind: those that its owner put before it.
    """

    passed: int

    @property
    def owner(self) -> str: ...

    @property
    def needs(self) -> str | None: ...

    @property
    def leaves(self) -> str | None: ...

    @property
    def behind(self) -> set[Waiting]: ...


W = TypeVar("W", bound=Waiting)


def take(waiting: list[W], loaded: str | None) -> W:
    """Remove from `waiting`, oldest first, the one to run now, and count which older ones it goes before."""
    passed = {id(job): job.passed for job in waiting}
    chosen = _pick(waiting, loaded, passed)
    for job in waiting:
        job.passed = passed[id(job)]
    waiting.remove(chosen)
    return chosen


def order(waiting: Sequence[W], loaded: str | None) -> list[W]:
    """`waiting`, oldest first, in the order in which they will be taken unless others come."""
    left, passed, ordered = list(waiting), {id(job): job.passed for job in waiting}, []
    while left:
        chosen = _pick(left, loaded, passed)
        left.remove(chosen)
        loaded = chosen.leaves
        ordered.append(chosen)
    return ordered


def move(waiting: list[W], job: W, loaded: str | None, *, later: bool) -> bool:
    """Have `job` taken before the one of its owner's that would go just before it, or, `later`, after the next one.

    The two change places in `waiting`, where nobody else's changes. False where there is no such other.
    """
    own = [other for other in order(waiting, loaded) if other.owner == job.owner]
    place = own.index(job) + (1 if later else -1)
    if not 0 <= place < len(own):
        return False
    other = own[place]
    first, second = (other, job) if later else (job, other)
    first.behind.discard(second)
    second.behind.add(first)
    here, there = waiting.index(first), waiting.index(second)
    if there < here:
        waiting[here], waiting[there] = second, first
        first.passed, second.passed = second.passed, first.passed  # it is the place that has waited
    return True


def _pick(waiting: Sequence[W], loaded: str | None, passed: dict[int, int]) -> W:
    """The one of `waiting` to run now; counts in `passed`, by identity, which older ones it goes before."""
    free = [job for job in waiting if not any(other in job.behind for other in waiting)]
    chosen = free[0]
    if passed[id(chosen)] < PASSED:
        chosen = next((job for job in free if job.needs == loaded), chosen)
    for older in free[: free.index(chosen)]:
        passed[id(older)] += 1
    return chosen
