"""A hundred swaps of checkpoints leave nothing behind in memory."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from flux2_studio.checkpoints import DEV, GB, KLEIN_4B, Checkpoint
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import RequestShape
from tests.tiny import Toys


def silent(text: str, fraction: float | None) -> None:
    pass


def resident() -> int:
    """Bytes of this process's own memory, once what was freed has been given back to the system."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed pages; other allocators have no such call
        import ctypes

        ctypes.CDLL("libc.so.6").malloc_trim(0)
    memory = psutil.Process(os.getpid()).memory_info()
    return int(memory.rss - getattr(memory, "shared", 0))  # mapped files count as shared


def tensors() -> int:
    return sum(isinstance(it, torch.Tensor) for it in gc.get_objects())


def swaps(models: ModelManager, checkpoints: list[Checkpoint]) -> Iterator[int]:
    """Run one checkpoint after the other, for ever; yields how many parts had to be loaded."""
    while True:
        for checkpoint in checkpoints:
            told: list[str] = []
            session = models.open(checkpoint, RequestShape(width=64, height=64), silent)
            session.encode_prompts(["a house"], lambda text, _: told.append(text))  # noqa: B023 - called at once
            session.prepare_transformer(lambda text, _: told.append(text))  # noqa: B023
            session.decode(torch.zeros(1, 128, 4, 4), lambda text, _: told.append(text))  # noqa: B023
            yield sum(text.startswith("Loading") for text in told)


@pytest.mark.parametrize("host_budget", [0, 10**9])
def test_memory_stays_flat_over_a_hundred_swaps(toys: Toys, tmp_path: Path, host_budget: int) -> None:
    settings = toys.settings(tmp_path, ["klein-4b", "dev"])
    peaks = [
        ModelManager(settings, Hub(settings)).predict_plan(it, RequestShape(width=64, height=64)).peak
        for it in (KLEIN_4B, DEV)
    ]
    tight = replace(settings, memory_limit_gb=1.03 * max(peaks) / GB)  # either, but not both
    models: Any = ModelManager(tight, Hub(tight), host_budget=host_budget)
    running = swaps(models, [KLEIN_4B, DEV])
    for _ in range(20):
        next(running)
    before, counted = resident(), tensors()
    loaded = [next(running) for _ in range(100)]
    assert tensors() == counted
    assert abs(resident() - before) < 0.02 * before
    assert min(loaded) >= 1, "each swap moves a transformer"
    models.release_all()
    assert tensors() < counted
