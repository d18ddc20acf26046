"""Residency: the only code that moves weights. Keeps the parts of the last checkpoint in memory and swaps on demand.

A part stays as long as the checkpoint in use has it: a swap drops what the next checkpoint does not need, then loads
what it lacks, so parts that two checkpoints share (the autoencoder, a text encoder) are not moved at all. Before
anything is dropped, all that will be loaded has been found and its headers checked.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.engine.text import open_text_encoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.engine.weights import Storage, load_tiny_decoder, open_autoencoder, open_transformer
from flux2_studio.errors import DeviceError, WeightsError
from flux2_studio.models import memory
from flux2_studio.models.hub import Hub, Progress
from flux2_studio.models.remembered import RememberingReferences, RememberingText
from flux2_studio.request import MULTIPLE
from flux2_studio.settings import Settings

LARGE = 2 * 10**9  # bytes of bfloat16 weights (a billion parameters) from which a CPU had better stay at bfloat16
Key = tuple[Part, torch.dtype]
MemoryT = TypeVar("MemoryT")


@dataclass(frozen=True, kw_only=True)
class LoadedCheckpoint:
    """A checkpoint in memory, ready to run. `previewer` is None where previews are off."""

    checkpoint: Checkpoint
    text: RememberingText
    transformer: Transformer
    autoencoder: Autoencoder
    references: RememberingReferences
    previewer: Previewer | None
    notes: tuple[str, ...]  # what the user should know, such as a preview that is not the one that was set


class ModelManager:
    """Loads checkpoints. One run at a time: not made for concurrent calls."""

    def __init__(self, settings: Settings, hub: Hub) -> None:
        self._settings = settings
        self._hub = hub
        self._parts: dict[Key, Any] = {}
        self._memories: dict[Key, Any] = {}  # of a part's results, see models/remembered.py
        self._not_to_be_had: dict[Part, str] = {}  # tiny autoencoders, and why: not asked for again at every run
        self.device = choose_device(settings.device)

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can be loaded without a download."""
        return all(self._hub.on_disk(part) for part in checkpoint.parts)

    def load(self, checkpoint: Checkpoint, progress: Progress) -> LoadedCheckpoint:
        """`checkpoint`, from memory, disk or the hub. `progress` may raise to give up.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint, before anything of the
        last checkpoint is given up.
        """
        if any(self._key(part, checkpoint) not in self._parts for part in checkpoint.parts):
            self._load_parts(checkpoint, progress)
        autoencoder_key = self._key(checkpoint.autoencoder, checkpoint)
        autoencoder: Autoencoder = self._parts[autoencoder_key]
        previewer, notes = self._previewer(checkpoint, autoencoder, progress)
        return LoadedCheckpoint(
            checkpoint=checkpoint,
            text=self._remembering(self._key(checkpoint.text, checkpoint), RememberingText),
            transformer=self._parts[self._key(checkpoint.flow, checkpoint)],
            autoencoder=autoencoder,
            references=self._remembering(autoencoder_key, RememberingReferences),
            previewer=previewer,
            notes=notes,
        )

    def batch_size(self, loaded: LoadedCheckpoint, count: int, tokens: int, kept: int) -> int:
        """How many of `count` pictures to draw at once; see `memory.batch_size`."""
        transformer = loaded.transformer
        return memory.batch_size(count, tokens, kept, transformer.params, transformer.dtype, transformer.device)

    def release_scratch(self) -> None:
        """Give memory that no weight occupies back to the device."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        elif self.device.type == "mps":
            torch.mps.empty_cache()

    def _load_parts(self, checkpoint: Checkpoint, progress: Progress) -> None:
        """Have all parts of `checkpoint` in memory, and no others."""
        files = {part: self._hub.locate(part, progress) for part in checkpoint.parts}
        progress(f"Checking the files of {checkpoint.label}", None)
        at = files[checkpoint.text]
        text = open_text_encoder(at.weights, at.tokenizer or at.weights, checkpoint.recipe)
        transformer = open_transformer(files[checkpoint.flow].weights)
        autoencoder = open_autoencoder(files[checkpoint.autoencoder].weights)
        check_fit(
            checkpoint,
            {part.kind: files[part].weights.name for part in checkpoint.parts},
            transformer.params,
            autoencoder.params,
            text.width,
        )
        self._release_all_but(checkpoint)
        for part, what, opened in (
            (checkpoint.text, "text encoder", text),
            (checkpoint.flow, "transformer", transformer),
            (checkpoint.autoencoder, "autoencoder", autoencoder),
        ):
            key = self._key(part, checkpoint)
            if key not in self._parts:
                progress(f"Loading {checkpoint.label}: {what}", None)
                self._parts[key] = opened.load(
                    device=self.device, dtype=key[1], storage=choose_storage(self._settings.quantize, self.device, part)
                )

    def _remembering(self, key: Key, make: Callable[[Any], MemoryT]) -> MemoryT:
        """The memory of the part under `key`, made at first and kept as long as the part is loaded."""
        if key not in self._memories:
            self._memories[key] = make(self._parts[key])
        found: MemoryT = self._memories[key]
        return found

    def _previewer(
        self, checkpoint: Checkpoint, autoencoder: Autoencoder, progress: Progress
    ) -> tuple[Previewer | None, tuple[str, ...]]:
        part = checkpoint.tiny_autoencoder
        if self._settings.preview == "off":
            return None, ()
        if part == checkpoint.autoencoder:
            return AutoencoderPreview(autoencoder), ()
        if self._settings.preview == "linear":
            return LinearPreview(), ()
        key = self._key(part, checkpoint)
        if key not in self._parts and part not in self._not_to_be_had:
            try:
                at = self._hub.locate(part, progress)
                self._parts[key] = load_tiny_decoder(at.weights, device=self.device, dtype=key[1])
            except WeightsError as error:
                self._not_to_be_had[part] = str(error)
        if key not in self._parts:
            return LinearPreview(), (f"Previews show rough colours only: {self._not_to_be_had[part]}",)
        return TinyPreview(self._parts[key]), ()

    def _release_all_but(self, checkpoint: Checkpoint) -> None:
        wanted = {self._key(part, checkpoint) for part in (*checkpoint.parts, checkpoint.tiny_autoencoder)}
        unwanted = self._parts.keys() - wanted
        for key in unwanted:
            del self._parts[key]
            self._memories.pop(key, None)
        if unwanted:
            self.release_scratch()

    def _key(self, part: Part, checkpoint: Checkpoint) -> Key:
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

    auto: bfloat16, or float16 on a CUDA device without it; float32 for small checkpoints on a CPU, which are as quick
    and exact so. float16 is kept to the transformer, which guards its range: text encoders and autoencoders were
    trained in bfloat16 and would overflow. The tiny autoencoder is published in float16.
    """
    if part.kind == "tiny autoencoder":
        return torch.float32 if device.type == "cpu" else torch.float16
    if name == "auto":
        if device.type == "cpu" and checkpoint.flow.size < LARGE:
            name = "float32"
        elif device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
            name = "float16"
        else:
            name = "bfloat16"
    if name == "float16" and part.kind != "flow":
        name = "bfloat16"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def choose_storage(quantize: str, device: torch.device, part: Part) -> Storage:
    """How the weights of `part` are held in memory.

    As the user set it, for the two parts that are large. Otherwise as the file has them, so that an 8-bit or 4-bit
    file takes no more memory than disk; but restored where that costs little (a toy on a CPU, which is quicker so) and
    where 8-bit floats cannot be held (Apple).
    """
    if part.kind in ("flow", "text") and quantize != "off" and part.size >= LARGE:
        return "fp8" if quantize == "fp8" else "int8"
    return "plain" if device.type == "mps" or part.size < LARGE else "stored"


def check_fit(
    checkpoint: Checkpoint,
    names: dict[str, str],
    transformer: TransformerParams,
    autoencoder: AutoencoderParams,
    text_width: int,
) -> None:
    """Raise `WeightsError` if the parts do not belong together. names: the file or folder of each kind of part."""
    flow, label = names["flow"], checkpoint.label
    own = f"{label}'s own file{_named(checkpoint.flow)}"
    if transformer.context_width != text_width:
        raise WeightsError(
            f"{flow} reads text of width {transformer.context_width}, but the text encoder of {label} in "
            f"{names['text']} gives {text_width}: one of them is another checkpoint's. Give {label} its own "
            f"transformer{_named(checkpoint.flow)} and text encoder{_named(checkpoint.text)}."
        )
    embeds = checkpoint.guiding == "embedded"
    if transformer.guidance_embedding != embeds:
        raise WeightsError(
            f"{flow} {'has a' if transformer.guidance_embedding else 'lacks the'} guidance embedding, which {label} "
            f"{'has' if embeds else 'does not have'}: the file is another checkpoint's. Choose {own}."
        )
    if autoencoder.patch != MULTIPLE or 4 * autoencoder.latent_channels != transformer.in_channels:
        raise WeightsError(
            f"{names['autoencoder']} makes latents of {4 * autoencoder.latent_channels} channels, one for "
            f"{autoencoder.patch} x {autoencoder.patch} pixels, but {flow} reads {transformer.in_channels} channels, "
            f"one for {MULTIPLE} x {MULTIPLE}. Choose {label}'s own autoencoder{_named(checkpoint.autoencoder)}."
        )


def _named(part: Part) -> str:
    return f" ({part.override})" if part.override else ""
