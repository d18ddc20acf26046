"""Whose runs are recorded and replayed as CUDA graphs: of models on an NVIDIA card with memory to spare."""

from __future__ import annotations

import torch

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.graphs import CaptureFn, CudaGraphCapture, GraphRunner
from flux2_studio.engine.text.decoder import TextDecoder
from flux2_studio.engine.text.encoder import TextEncoder
from flux2_studio.engine.text.writer import Writer
from flux2_studio.models.memory.available import free_memory
from flux2_studio.settings import GraphsMode

MIN_FREE_GRAPH_BYTES = (
    4 << 30
)  # bytes that must be free: recordings hold what a run of theirs computes with, which no plan counts


class CudaGraphPolicy:
    """The `GraphRunner` of a device. choice: on or off. record: in place of CUDA's, which then need not be there."""

    def __init__(self, choice: GraphsMode, device: torch.device, capture: CaptureFn | None = None) -> None:
        self._device = device
        self._on = choice == "on"
        self._runner = GraphRunner(lambda: capture or CudaGraphCapture(device))
        self._reasons: dict[str, bool] = {}  # why runs are not recorded, and whether that was said
        if self._on and capture is None and (device.type != "cuda" or torch.version.hip is not None):
            self.disable("only NVIDIA's cards can")

    def prepare(self, model: Transformer | TextDecoder, *, resident: bool, compiling: bool) -> None:
        """Have `model`, which is about to run, replay what it ran before. To be said after whatever changes it.

        resident: whether all parts stay on the device, or its recordings would not last. compiling: whether a compiler
        may wait for the device meanwhile, which ends a recording.
        """
        if not self._on:
            return
        self._runner.is_paused = compiling
        if resident and free_memory(self._device) >= MIN_FREE_GRAPH_BYTES:
            self._runner.attach(model)
        else:
            self._runner.forget(model)
            self._reasons.setdefault(f"less than {MIN_FREE_GRAPH_BYTES / 2**30:.0f} GiB of memory would be left", False)

    def disable(self, reason: str) -> None:
        """Record and replay nothing any more."""
        if self._on:
            self._on = False
            self._reasons.setdefault(reason, False)
            self._runner.clear()

    def forget(self, model: object) -> None:
        """Drop the recordings of `model`, a part that is about to leave the device."""
        encoder = model.encoder if isinstance(model, Writer) else model
        runs = encoder.text_decoder if isinstance(encoder, TextEncoder) else encoder
        if isinstance(runs, Transformer | TextDecoder):
            self._runner.forget(runs)

    def clear(self) -> None:
        """`forget` all models."""
        self._runner.clear()

    def take_notes(self) -> tuple[str, ...]:
        """Why runs are not recorded that should be; each said once."""
        if self._runner.error is not None:
            self.disable(self._runner.error)
        fresh = [reason for reason, said in self._reasons.items() if not said]
        self._reasons.update(dict.fromkeys(fresh, True))
        return tuple(
            f"Runs are not recorded as CUDA graphs ({reason}), so small pictures take longer than they might. "
            f"FLUX2_GRAPHS=off asks for none."
            for reason in fresh
        )
