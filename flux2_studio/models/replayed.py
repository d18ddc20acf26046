"""Whose runs are recorded and replayed as CUDA graphs: of models on an NVIDIA card with memory to spare."""

from __future__ import annotations

import torch

from flux2_studio.engine.replay import Record, Replays
from flux2_studio.engine.text import TextEncoder
from flux2_studio.engine.tower import Tower
from flux2_studio.engine.transformer import Transformer
from flux2_studio.engine.writer import Writer
from flux2_studio.models.memory import free_memory
from flux2_studio.settings import Graphs

ROOM = 4 << 30  # bytes that must be free: recordings hold what a run of theirs computes with, which no plan counts


class ReplayedRuns:
    """The `Replays` of a device. choice: on or off. record: in place of CUDA's, which then need not be there."""

    def __init__(self, choice: Graphs, device: torch.device, record: Record | None = None) -> None:
        self._device = device
        self._on = choice == "on" and (record is not None or device.type == "cuda")
        self._replays = Replays(record)
        self._said = False

    def use(self, model: Transformer | Tower) -> None:
        """Have `model`, which is about to run, replay what it ran before. To be said after whatever changes it."""
        if not self._on:
            return
        if free_memory(self._device) < ROOM:
            self._replays.forget(model)
        else:
            self._replays.attach(model)

    def forget(self, model: object) -> None:
        """Give back what the recordings of `model`, a part that is about to leave the device, hold of its memory."""
        encoder = model.encoder if isinstance(model, Writer) else model
        runs = encoder.tower if isinstance(encoder, TextEncoder) else encoder
        if isinstance(runs, Transformer | Tower):
            self._replays.forget(runs)

    def clear(self) -> None:
        """`forget` all models."""
        self._replays.clear()

    def notes(self) -> tuple[str, ...]:
        """Why nothing is recorded that should be; said once."""
        if self._replays.trouble is None or self._said:
            return ()
        self._said = True
        return (
            f"Runs cannot be recorded as CUDA graphs here ({self._replays.trouble}), so small pictures take longer "
            f"than they might. FLUX2_GRAPHS=off stops the attempts.",
        )
