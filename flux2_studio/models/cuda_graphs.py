"""Decides which models use CUDA graphs: models on an NVIDIA card with enough free memory."""

from __future__ import annotations

import torch

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.graphs import CaptureFn, CudaGraphCapture, GraphRunner
from flux2_studio.engine.text.decoder import TextDecoder
from flux2_studio.engine.text.encoder import TextEncoder
from flux2_studio.engine.text.writer import Writer
from flux2_studio.models.memory.available import free_memory
from flux2_studio.settings import GraphsMode

# Graphs keep the activations of a run allocated, which no memory plan counts.
MIN_FREE_GRAPH_BYTES = 4 << 30


class CudaGraphPolicy:
    """Attaches the `GraphRunner` of a device to models.

    choice: on or off. capture: replaces `CudaGraphCapture`, so that no CUDA device is needed.
    """

    def __init__(self, choice: GraphsMode, device: torch.device, capture: CaptureFn | None = None) -> None:
        self._device = device
        self._on = choice == "on"
        self._runner = GraphRunner(lambda: capture or CudaGraphCapture(device))
        self._reasons: dict[str, bool] = {}  # why graphs are not used, and whether the user was notified
        if self._on and capture is None and (device.type != "cuda" or torch.version.hip is not None):
            self.disable("only NVIDIA's cards can")

    def prepare(self, model: Transformer | TextDecoder, *, resident: bool, compiling: bool) -> None:
        """Attaches the graph runner to `model`, which is about to run. Call it after every change of the model.

        resident: whether all parts stay on the device; otherwise graphs would soon be invalid. compiling: whether a
        background compiler may synchronise with the device, which aborts a capture.
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
        """Stops capturing and replaying, and drops all graphs."""
        if self._on:
            self._on = False
            self._reasons.setdefault(reason, False)
            self._runner.clear()

    def forget(self, model: object) -> None:
        """Drops the graphs of `model`, a part that is about to leave the device."""
        encoder = model.encoder if isinstance(model, Writer) else model
        captured = encoder.text_decoder if isinstance(encoder, TextEncoder) else encoder
        if isinstance(captured, Transformer | TextDecoder):
            self._runner.forget(captured)

    def clear(self) -> None:
        """Drops the graphs of all models."""
        self._runner.clear()

    def take_notes(self) -> tuple[str, ...]:
        """Returns messages about why graphs are not used although they are on, each only once."""
        if self._runner.error is not None:
            self.disable(self._runner.error)
        new_reasons = [reason for reason, was_reported in self._reasons.items() if not was_reported]
        self._reasons.update(dict.fromkeys(new_reasons, True))
        return tuple(
            f"Runs are not recorded as CUDA graphs ({reason}), so small pictures take longer than they might. "
            f"FLUX2_GRAPHS=off asks for none."
            for reason in new_reasons
        )
