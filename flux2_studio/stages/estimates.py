"""What a run takes, learnt by `durations.py` from those that were done, and what that says of the next one."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import SaveError
from flux2_studio.models.memory.plan import DENOISING_STAGE, MemoryPlan, RequestShape
from flux2_studio.models.session import Session
from flux2_studio.request import SIZE_MULTIPLE, Request
from flux2_studio.stages.denoising import StepTimer, describe_tiling
from flux2_studio.stages.durations import BatchShape, BatchTiming, DurationModel, RunFeatures
from flux2_studio.stages.run_context import RunContext

log = logging.getLogger(__name__)

# The streamed share of a transformer is rounded up to eighths, because it varies with free memory.
STREAMED_FRACTION_STEPS = 8


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """What a request will take.

    memory_fit: how it fits into memory, in sentences; "" if unknown. tokens, reference_tokens: length of the picture
    and of each reference in the transformer's sequence. use_cfg: every step is computed for two prompts. seconds:
    duration of the run without loading; None if no similar run was timed on this machine. is_on_disk, is_loaded:
    whether the checkpoint is on disk, and whether it is in memory.
    """

    memory_fit: str
    tokens: int
    reference_tokens: tuple[int, ...]
    steps: int
    pictures: int
    use_cfg: bool
    seconds: float | None
    is_on_disk: bool
    is_loaded: bool


def make_estimate(
    request: Request,
    checkpoint: Checkpoint,
    shape: RequestShape,
    *,
    memory_fit: str = "",
    features: RunFeatures | None = None,
    batch_size: int = 1,
    durations: DurationModel | None = None,
    is_on_disk: bool,
    is_loaded: bool,
) -> RunEstimate:
    """Return the estimate for a resolved request. Raises `SaveError` if the learnt times cannot be read.

    features: how the run would be computed; None if unknown. batch_size: how many pictures would be drawn at once.
    """
    assert request.steps, "resolve the request first"
    seconds = None
    if features is not None and durations is not None:
        sizes = [min(batch_size, shape.count - first) for first in range(0, shape.count, batch_size)]
        batches = [_batch(checkpoint, shape, pictures) for pictures in sizes]
        seconds = durations.predict_seconds(features, batches, request.steps)
    return RunEstimate(
        memory_fit=memory_fit,
        tokens=shape.tokens,
        reference_tokens=_reference_tokens(shape),
        steps=request.steps,
        pictures=shape.count,
        use_cfg=shape.use_cfg,
        seconds=seconds,
        is_on_disk=is_on_disk,
        is_loaded=is_loaded,
    )


def make_run_features(
    device: str, computed: str, checkpoint: Checkpoint, plan: MemoryPlan, preview: str, request: Request
) -> RunFeatures:
    """What decides how long a step takes beside the size. computed: precision and storage of the weights."""
    drawing = plan.stage(DENOISING_STAGE)
    blocks = plan.block_counts.get("flow", 0)
    streamed = (
        -(-drawing.streamed * STREAMED_FRACTION_STEPS // blocks) if blocks else 0
    )  # rounded up: none is another thing
    how = [
        computed,
        plan.resident_parts,
        f"{streamed}/{STREAMED_FRACTION_STEPS} streamed",
        f"autoencoder {describe_tiling(plan)}",
    ]
    how += [f"preview {preview}"] + (["LoRAs"] if request.loras else [])
    return RunFeatures(device=device, checkpoint=checkpoint.name, how=", ".join(how))


class StageStopwatch:
    """Times the stages of a session, without loading. initial_seconds: time spent before the session was opened."""

    def __init__(self, session: Session, initial_seconds: float = 0.0) -> None:
        self._session = session
        self._spent = initial_seconds
        self._since, self._loaded = time.monotonic(), session.loading_seconds

    def lap(self) -> float:
        """Seconds since the last one."""
        now, loaded = time.monotonic(), self._session.loading_seconds
        seconds = self._spent + (now - self._since) - (loaded - self._loaded)
        self._spent, self._since, self._loaded = 0.0, now, loaded
        return max(0.0, seconds)


def learn_duration(
    durations: DurationModel,
    features: RunFeatures,
    run: RunContext,
    timer: StepTimer,
    *,
    pictures: int,
    finish_seconds: float,
    setup_seconds: float | None,
) -> None:
    """Record in `durations` how long a batch of `run` took. Never fails the run.

    finish_seconds: seconds after the last step, for all pictures of the batch. setup_seconds: seconds before the first
    step; None after the first batch.
    """
    timed = BatchTiming(
        batch=_batch(run.session.checkpoint, run.request_shape, pictures),
        step_seconds=sum(timer.step_seconds) / len(timer.step_seconds),
        picture_seconds=finish_seconds / pictures,
        setup_seconds=None if run.session.used_cache else setup_seconds,
        is_cold=run.session.loading_seconds > 0,
    )
    try:
        durations.learn(features, timed)
    except SaveError as error:  # the next estimate will know a run less
        log.error("how long a run took is not written down: %s", error)


def _batch(checkpoint: Checkpoint, shape: RequestShape, pictures: int) -> BatchShape:
    return BatchShape(
        text=checkpoint.recipe.length,
        image=shape.tokens,
        references=sum(_reference_tokens(shape)),
        pictures=pictures,
        use_cfg=shape.use_cfg,
    )


def _reference_tokens(shape: RequestShape) -> tuple[int, ...]:
    return tuple(_tokens(size) for size in shape.references)


def _tokens(size: Sequence[int]) -> int:
    return (size[0] // SIZE_MULTIPLE) * (size[1] // SIZE_MULTIPLE)
