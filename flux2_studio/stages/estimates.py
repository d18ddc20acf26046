"""What a run takes, learnt by `durations.py` from those that were done, and what that says of the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import SaveError
from flux2_studio.models.manager import Session
from flux2_studio.models.memory.plan import DRAWING, Plan, Workload
from flux2_studio.request import MULTIPLE, Request
from flux2_studio.stages.drawing import Run, Timer, strips
from flux2_studio.stages.durations import Batch, Pace, Timed, Way

log = logging.getLogger(__name__)

EIGHTHS = 8  # how exactly it is told how much of a transformer is streamed: free memory varies, and with it that


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What a request will take. fit: how it will fit into memory, "" where that cannot be told; tokens: of the picture
    and of each reference, in the transformer's sequence; guided: every step is computed twice.

    seconds: of the run, without what is loaded for it; None where nothing like it was timed on this machine. there,
    loaded: whether the checkpoint is on disk, and in memory.
    """

    fit: str
    tokens: int
    reference_tokens: tuple[int, ...]
    steps: int
    pictures: int
    guided: bool
    seconds: float | None
    there: bool
    loaded: bool


def foresee(
    request: Request,
    checkpoint: Checkpoint,
    workload: Workload,
    *,
    fit: str = "",
    way: Way | None = None,
    batch: int = 1,
    pace: Pace | None = None,
    there: bool,
    loaded: bool,
) -> Outlook:
    """The outlook of a resolved request. way, batch: how it would be drawn, and how many pictures at once; None where
    that is not known. Raises `SaveError` where what was learnt cannot be read."""
    assert request.steps, "resolve the request first"
    seconds = None
    if way is not None and pace is not None:
        sizes = [min(batch, workload.count - first) for first in range(0, workload.count, batch)]
        batches = [_batch(checkpoint, workload, pictures) for pictures in sizes]
        seconds = pace.seconds(way, batches, request.steps)
    return Outlook(
        fit=fit,
        tokens=workload.tokens,
        reference_tokens=_reference_tokens(workload),
        steps=request.steps,
        pictures=workload.count,
        guided=workload.guided,
        seconds=seconds,
        there=there,
        loaded=loaded,
    )


def way_of(device: str, computed: str, checkpoint: Checkpoint, plan: Plan, preview: str, request: Request) -> Way:
    """What decides how long a step takes beside the size. computed: precision and storage of the weights."""
    drawing = plan.stage(DRAWING)
    blocks = plan.blocks.get("flow", 0)
    streamed = -(-drawing.streamed * EIGHTHS // blocks) if blocks else 0  # rounded up: none is another thing
    how = [computed, plan.together, f"{streamed}/{EIGHTHS} streamed", f"autoencoder {strips(plan)}"]
    how += [f"preview {preview}"] + (["LoRAs"] if request.loras else [])
    return Way(device=device, checkpoint=checkpoint.name, how=", ".join(how))


class Stopwatch:
    """Seconds that a session's stages take, without what it loads meanwhile. spent: what came before it."""

    def __init__(self, session: Session, spent: float = 0.0) -> None:
        self._session = session
        self._spent = spent
        self._since, self._loaded = time.monotonic(), session.loading

    def lap(self) -> float:
        """Seconds since the last one."""
        now, loaded = time.monotonic(), self._session.loading
        seconds = self._spent + (now - self._since) - (loaded - self._loaded)
        self._spent, self._since, self._loaded = 0.0, now, loaded
        return max(0.0, seconds)


def learn(
    pace: Pace,
    way: Way,
    run: Run,
    timer: Timer,
    *,
    pictures: int,
    finishing: float,
    once: float | None,
) -> None:
    """Have `pace` know what a batch of `run` took. finishing: seconds from the last step on, of all its pictures; once:
    those before the first step, None after the first batch. A run does not fail for it."""
    timed = Timed(
        batch=_batch(run.session.checkpoint, run.workload, pictures),
        step=sum(timer.batch) / len(timer.batch),
        each=finishing / pictures,
        once=None if run.session.remembered else once,
        cold=run.session.loading > 0,
    )
    try:
        pace.learn(way, timed)
    except SaveError as error:  # the next estimate will know a run less
        log.error("how long a run took is not written down: %s", error)


def _batch(checkpoint: Checkpoint, workload: Workload, pictures: int) -> Batch:
    return Batch(
        text=checkpoint.recipe.length,
        image=workload.tokens,
        references=sum(_reference_tokens(workload)),
        pictures=pictures,
        guided=workload.guided,
    )


def _reference_tokens(workload: Workload) -> tuple[int, ...]:
    return tuple(_tokens(size) for size in workload.references)


def _tokens(size: Sequence[int]) -> int:
    return (size[0] // MULTIPLE) * (size[1] // MULTIPLE)
