"""A checkpoint's files, opened: headers checked, sizes known, nothing read yet.

Headers are opened once and again only where a file has changed, so that a plan for every request costs no reading.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.params import AutoencoderParams, TextRecipe, TransformerParams
from flux2_studio.engine.text import CheckedText, open_text_encoder
from flux2_studio.engine.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.engine.weights import Checked, Storage, open_autoencoder, open_tiny_decoder, open_transformer
from flux2_studio.errors import WeightsError
from flux2_studio.models.choices import choose_dtype, choose_storage
from flux2_studio.models.files import PartFiles
from flux2_studio.models.hub import Hub, Progress
from flux2_studio.models.plan import Needs, Weights, weights_of
from flux2_studio.request import MULTIPLE
from flux2_studio.settings import Settings

Stamp = tuple[tuple[str, int, int], ...]  # path, size and time of change of each file


@dataclass(frozen=True)
class Key:
    """What one part in memory is: whoever asks for the same gets the same."""

    part: Part
    dtype: torch.dtype
    storage: Storage
    stamp: Stamp
    recipe: TextRecipe | None = None  # of a text encoder


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose files fit together. `text` is None where another machine encodes, `tiny` where the autoencoder
    draws previews itself or none are drawn by a decoder."""

    checkpoint: Checkpoint
    flow: Checked[Transformer]
    autoencoder: Checked[Autoencoder]
    text: CheckedText | None
    tiny: Checked[TinyDecoder] | None
    keys: dict[str, Key]  # by kind of part: text, flow, autoencoder, tiny
    needs: Needs
    notes: tuple[str, ...]

    def load(self, kind: str, device: torch.device) -> Any:
        """Read the part of that kind onto `device`. Raises what `weights.Checked.load` does."""
        parts: dict[str, Any] = {
            "text": self.text, "flow": self.flow, "autoencoder": self.autoencoder, "tiny": self.tiny
        }  # fmt: skip
        key = self.keys[kind]
        return parts[kind].load(device=device, dtype=key.dtype, storage=key.storage)


class Opener:
    """Opens checkpoints for a device. May be asked from several threads."""

    def __init__(self, settings: Settings, hub: Hub, device: torch.device) -> None:
        self._settings = settings
        self._hub = hub
        self._device = device
        self._lock = threading.Lock()
        self._open: dict[tuple[Part, Stamp, TextRecipe | None], Any] = {}
        self._needed: dict[tuple[str, tuple[Key, ...]], Needs] = {}
        self._not_to_be_had: dict[Part, str] = {}  # tiny autoencoders, and why: not asked for again at every run

    def parts(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """The parts of `checkpoint` that must be on this machine."""
        remote = self._settings.reads_remotely(checkpoint)
        return tuple(part for part in checkpoint.parts if not (remote and part.kind == "text"))

    def open(self, checkpoint: Checkpoint, progress: Progress, *, fetch: bool = True) -> Opened:
        """`checkpoint`'s files, downloaded if need be and checked. `progress` may raise to give up.

        fetch: whether a decoder for previews that is not here is worth a download, too.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint.
        """
        # What may be refused comes first: the gate is met before the gigabytes.
        parts_by_gate = sorted(self.parts(checkpoint), key=lambda part: not part.gated)
        files: dict[str, PartFiles] = {part.kind: self._hub.locate(part, progress) for part in parts_by_gate}
        stamps = {kind: _stamp(found) for kind, found in files.items()}
        with self._lock:
            fresh = [part for part in self.parts(checkpoint) if (part, stamps[part.kind]) not in self._known()]
        if fresh:
            progress(f"Checking the files of {checkpoint.label}", None)
        flow = self._header(checkpoint.flow, stamps["flow"], lambda: open_transformer(files["flow"].weights))
        autoencoder = self._header(
            checkpoint.autoencoder, stamps["autoencoder"], lambda: open_autoencoder(files["autoencoder"].weights)
        )
        text: CheckedText | None = None
        if at := files.get("text"):
            folder = at
            text = self._header(
                checkpoint.text,
                stamps["text"],
                lambda: open_text_encoder(folder.weights, folder.tokenizer or folder.weights, checkpoint.recipe),
                checkpoint.recipe,
            )
        check_fit(
            checkpoint,
            {kind: found.weights.name for kind, found in files.items()},
            flow.params,
            autoencoder.params,
            text.width if text else flow.params.context_width,
        )
        tiny, notes = self._tiny(checkpoint, stamps, progress, fetch)
        parts = {"flow": checkpoint.flow, "autoencoder": checkpoint.autoencoder}
        if text is not None:
            parts["text"] = checkpoint.text
        if tiny is not None:
            parts["tiny"] = checkpoint.tiny_autoencoder
        keys = {
            kind: Key(
                part,
                choose_dtype(self._settings.dtype, self._device, checkpoint, part),
                choose_storage(self._settings.quantize, self._device, part),
                stamps[kind],
                checkpoint.recipe if kind == "text" else None,
            )
            for kind, part in parts.items()
        }
        known = checkpoint.name, tuple(keys.values())
        with self._lock:
            if known not in self._needed:
                self._needed[known] = self._needs(checkpoint, flow, autoencoder, text, tiny, keys)
            needs = self._needed[known]
        return Opened(
            checkpoint=checkpoint,
            flow=flow,
            autoencoder=autoencoder,
            text=text,
            tiny=tiny,
            keys=keys,
            needs=needs,
            notes=notes,
        )

    def _known(self) -> set[tuple[Part, Stamp]]:
        return {(part, stamp) for part, stamp, _ in self._open}

    def _header(self, part: Part, stamp: Stamp, read: Callable[[], Any], recipe: TextRecipe | None = None) -> Any:
        key = (part, stamp, recipe)
        with self._lock:
            if key not in self._open:
                opened = read()
                for stale in [other for other in self._open if other[0] == part and other[1] != stamp]:
                    del self._open[stale]
                self._open[key] = opened
            return self._open[key]

    def _tiny(
        self, checkpoint: Checkpoint, stamps: dict[str, Stamp], progress: Progress, fetch: bool
    ) -> tuple[Checked[TinyDecoder] | None, tuple[str, ...]]:
        part = checkpoint.tiny_autoencoder
        if self._settings.preview != "tiny" or part == checkpoint.autoencoder:
            return None, ()
        if not fetch and not self._hub.on_disk(part):
            return None, ()
        if part not in self._not_to_be_had:
            try:
                at = self._hub.locate(part, progress)
                stamps["tiny"] = _stamp(at)
                return self._header(part, stamps["tiny"], lambda: open_tiny_decoder(at.weights)), ()
            except WeightsError as error:
                self._not_to_be_had[part] = str(error)
        return None, (f"Previews show rough colours only: {self._not_to_be_had[part]}",)

    def _needs(
        self,
        checkpoint: Checkpoint,
        flow: Checked[Transformer],
        autoencoder: Checked[Autoencoder],
        text: CheckedText | None,
        tiny: Checked[TinyDecoder] | None,
        keys: dict[str, Key],
    ) -> Needs:
        def held(opened: Checked[Any] | CheckedText, kind: str) -> Weights:
            sizes = opened.sizes(dtype=keys[kind].dtype, storage=keys[kind].storage)
            return weights_of(sizes, opened.blocks)

        text_activations = _nothing
        if text is not None:
            dtype, quantized = keys["text"].dtype, _small(text, keys["text"])
            text_activations = lru_cache(
                lambda prompts: text.activations(dtype=dtype, prompts=prompts, quantized=quantized)
            )
        return Needs(
            label=checkpoint.label,
            flow=held(flow, "flow"),
            transformer=flow.params,
            flow_dtype=keys["flow"].dtype,
            flow_quantized=_small(flow, keys["flow"]),
            autoencoder=held(autoencoder, "autoencoder"),
            autoencoder_params=autoencoder.params,
            autoencoder_dtype=keys["autoencoder"].dtype,
            text=held(text, "text") if text is not None else None,
            text_activations=text_activations,
            text_length=checkpoint.recipe.length,
            tiny=held(tiny, "tiny") if tiny is not None else None,
            tiny_dtype=keys["tiny"].dtype if tiny is not None else torch.float32,
            previews=self._settings.preview != "off" and (tiny is not None or draws_itself(checkpoint)),
            reference_cache=checkpoint.reference_cache,
        )


def draws_itself(checkpoint: Checkpoint) -> bool:
    """Whether the autoencoder of `checkpoint` is small enough to draw its previews."""
    return checkpoint.tiny_autoencoder == checkpoint.autoencoder


def _small(opened: Checked[Any] | CheckedText, key: Key) -> bool:
    """Whether weights are held in fewer bits than they are computed in."""
    as_held = sum(opened.sizes(dtype=key.dtype, storage=key.storage).values())
    return as_held < sum(opened.sizes(dtype=key.dtype).values())


def _nothing(prompts: int) -> int:
    return 0


def _stamp(files: PartFiles) -> Stamp:
    found = []
    for path in (files.weights, files.tokenizer):
        if path is None:
            continue
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            at = file.stat()
            found.append((str(file), at.st_size, at.st_mtime_ns))
    return tuple(found)


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
