"""Residency: the only code that moves weights. Keeps the parts of the last checkpoint in memory and swaps on demand.

A part stays as long as the checkpoint in use has it: a swap drops what the next checkpoint does not need, then loads
what it lacks, so parts that two checkpoints share (the autoencoder, a text encoder) are not moved at all.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.engine.text import TextEncoder, context_width, load_text_encoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.engine.weights import inspect_transformer, load_autoencoder, load_tiny_decoder, load_transformer
from flux2_studio.errors import DeviceError, WeightsError
from flux2_studio.models.hub import Hub, PartFiles
from flux2_studio.settings import Settings

Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0..1) where that is known

LARGE = 2 * 10**9  # bytes of bfloat16 weights (a billion parameters) from which a CPU had better stay at bfloat16


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint in memory, ready to run. `previewer` is None where previews are off."""

    checkpoint: Checkpoint
    text: TextEncoder
    transformer: Transformer
    autoencoder: Autoencoder
    previewer: Previewer | None
    notes: tuple[str, ...]  # what the user should know, such as a preview that is not the one that was set


class ModelManager:
    """Loads checkpoints. One run at a time: not made for concurrent calls."""

    def __init__(self, settings: Settings, hub: Hub) -> None:
        self._settings = settings
        self._hub = hub
        self._parts: dict[tuple[Part, torch.dtype], Any] = {}
        self.device = choose_device(settings.device)

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can be loaded without a download."""
        return all(self._hub.on_disk(part) for part in checkpoint.parts)

    def load(self, checkpoint: Checkpoint, progress: Progress) -> Loaded:
        """`checkpoint`, from memory, disk or the hub. `progress` may raise to give up.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint, before anything of the
        last checkpoint is given up.
        """
        files = {part: self._hub.locate(part, progress) for part in checkpoint.parts}
        if any(self._key(part, checkpoint) not in self._parts for part in checkpoint.parts):
            check_fit(checkpoint, files[checkpoint.flow].weights, files[checkpoint.text].weights)
        self._release_all_but(checkpoint)

        def part(which: Part, what: str, build: Callable[[PartFiles, torch.dtype], Any]) -> Any:
            key = self._key(which, checkpoint)
            if key not in self._parts:
                progress(f"Loading {checkpoint.label}: {what}", None)
                self._parts[key] = build(files[which], key[1])
            return self._parts[key]

        device = self.device
        text = part(
            checkpoint.text,
            "text encoder",
            lambda at, dtype: load_text_encoder(
                at.weights, at.tokenizer or at.weights, checkpoint.recipe, device=device, dtype=dtype
            ),
        )
        transformer = part(
            checkpoint.flow, "transformer", lambda at, dtype: load_transformer(at.weights, device=device, dtype=dtype)
        )
        autoencoder = part(
            checkpoint.autoencoder,
            "autoencoder",
            lambda at, dtype: load_autoencoder(at.weights, device=device, dtype=dtype),
        )
        previewer, notes = self._previewer(checkpoint, autoencoder, progress)
        return Loaded(
            checkpoint=checkpoint,
            text=text,
            transformer=transformer,
            autoencoder=autoencoder,
            previewer=previewer,
            notes=notes,
        )

    def release_scratch(self) -> None:
        """Give memory that no weight occupies back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def _previewer(
        self, checkpoint: Checkpoint, autoencoder: Autoencoder, progress: Progress
    ) -> tuple[Previewer | None, tuple[str, ...]]:
        if self._settings.preview == "off":
            return None, ()
        if checkpoint.tiny_autoencoder == checkpoint.autoencoder:
            return AutoencoderPreview(autoencoder), ()
        if self._settings.preview == "linear":
            return LinearPreview(), ()
        key = self._key(checkpoint.tiny_autoencoder, checkpoint)
        if key not in self._parts:
            try:
                at = self._hub.locate(checkpoint.tiny_autoencoder, progress)
                self._parts[key] = load_tiny_decoder(at.weights, device=self.device, dtype=key[1])
            except WeightsError as error:
                return LinearPreview(), (f"Previews show rough colours only: {error}",)
        return TinyPreview(self._parts[key]), ()

    def _release_all_but(self, checkpoint: Checkpoint) -> None:
        wanted = {self._key(part, checkpoint) for part in (*checkpoint.parts, checkpoint.tiny_autoencoder)}
        unwanted = self._parts.keys() - wanted
        for key in unwanted:
            del self._parts[key]
        if unwanted:
            self.release_scratch()

    def _key(self, part: Part, checkpoint: Checkpoint) -> tuple[Part, torch.dtype]:
        return part, choose_dtype(self._settings.dtype, self.device, checkpoint, part)


def choose_device(name: str) -> torch.device:
    """The device called `name`; for "auto" the fastest there is. Raises `DeviceError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise DeviceError(f"There is no device called {name!r}. Choose auto, cuda, cuda:1, mps or cpu.") from error
    available: dict[str, Callable[[], bool]] = {
        "cuda": torch.cuda.is_available,
        "mps": torch.backends.mps.is_available,
        "cpu": lambda: True,
    }
    if device.type not in available:
        raise DeviceError(f"{name!r} cannot be used. Choose auto, cuda, mps or cpu.")
    if not available[device.type]():
        raise DeviceError(f"This machine has no usable {device.type} device. Choose cpu, or leave the choice at auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"There is no {name}: this machine has {torch.cuda.device_count()} CUDA device(s).")
    return device


def choose_dtype(name: str, device: torch.device, checkpoint: Checkpoint, part: Part) -> torch.dtype:
    """The precision of `part`.

    auto: bfloat16, except small checkpoints on a CPU, which are as quick and exact in float32. float16 is kept to the
    transformer, which guards its range; the text encoders and autoencoders were trained in bfloat16 and would overflow.
    """
    if name == "auto":
        name = "float32" if device.type == "cpu" and checkpoint.flow.size < LARGE else "bfloat16"
    if name == "float16" and part.kind != "flow":
        name = "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def check_fit(checkpoint: Checkpoint, flow: Path, text: Path) -> None:
    """Raise `WeightsError` if transformer and text encoder do not belong together; reads headers and config only."""
    params = inspect_transformer(flow)
    width = context_width(text, checkpoint.recipe)
    variable = f" ({checkpoint.flow.override})" if checkpoint.flow.override else ""
    if params.context_width != width:
        raise WeightsError(
            f"{flow.name} reads text of width {params.context_width}, but the text encoder of {checkpoint.label} in "
            f"{text.name} gives {width}: one of them is another checkpoint's. Give {checkpoint.label} its own "
            f"transformer file{variable} and text encoder"
            f"{f' ({checkpoint.text.override})' if checkpoint.text.override else ''}."
        )
    embeds = checkpoint.guiding == "embedded"
    if params.guidance_embedding != embeds:
        raise WeightsError(
            f"{flow.name} {'has a' if params.guidance_embedding else 'lacks the'} guidance embedding, which "
            f"{checkpoint.label} does {'' if embeds else 'not '}have: the file is another checkpoint's. Choose "
            f"{checkpoint.label}'s own file{variable}."
        )
