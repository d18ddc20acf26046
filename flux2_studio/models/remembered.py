"""What prompts and references became, kept for the next run: a re-roll of the seed encodes nothing.

Each memory belongs to the part that made its tensors and leaves with it, so nothing here outlives the weights it was
computed with. Tensors stay where they were made.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.text import Encoded, TextEncoder
from flux2_studio.pictures import pixels_from_image

CONTEXT_BYTES = 256 * 2**20  # 16 prompts of the largest text encoder, or 32 of klein 4B's
LATENT_BYTES = 128 * 2**20  # 16 references at the largest size

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Recent(Generic[KeyT, ValueT]):
    """Key -> value up to `limit` bytes in all; the least recently used leave first. Not for several threads."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._kept: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        if key not in self._kept:
            return None
        self._kept.move_to_end(key)
        return self._kept[key][0]

    def keep(self, key: KeyT, value: ValueT, size: int) -> None:
        """size: of the value in bytes. One that is larger than the limit is not kept."""
        if key in self._kept:
            self._held -= self._kept.pop(key)[1]
        if size > self._limit:
            return
        self._kept[key] = (value, size)
        self._held += size
        while self._held > self._limit:
            _, (_, left) = self._kept.popitem(last=False)
            self._held -= left


class RememberingText:
    """A text encoder that reads a prompt once."""

    def __init__(self, encoder: TextEncoder, limit: int = CONTEXT_BYTES) -> None:
        self._encoder = encoder
        self._known: Recent[str, tuple[Tensor, int]] = Recent(limit)

    def encode(self, prompts: Sequence[str]) -> Encoded:
        """As `TextEncoder.encode`; only prompts that are not remembered are computed, as one batch."""
        rows = {prompt: self._known.get(prompt) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            encoded = self._encoder.encode(missing)
            for prompt, context, cut in zip(missing, encoded.context.split(1), encoded.cut, strict=True):
                context = context.clone()  # a row of its own, not a view that keeps the whole batch alive
                rows[prompt] = (context, cut)
                self._known.keep(prompt, (context, cut), context.nbytes)
        found = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return Encoded(torch.cat([context for context, _ in found]), tuple(cut for _, cut in found))


class RememberingReferences:
    """An autoencoder's encoder that reads a picture once."""

    def __init__(self, autoencoder: Autoencoder, limit: int = LATENT_BYTES) -> None:
        self._autoencoder = autoencoder
        self._known: Recent[tuple[tuple[int, int], str, bytes], Tensor] = Recent(limit)

    def encode(self, image: Image.Image) -> Tensor:
        """The latent [1, 128, h, w] of `image`, whose sides are multiples of 16."""
        key = (image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
        latent = self._known.get(key)
        if latent is None:
            latent = self._autoencoder.encode(pixels_from_image(image))
            self._known.keep(key, latent, latent.nbytes)
        return latent
