"""What prompts and references became, kept for the next run: a re-roll of the seed encodes nothing.

Kept by the weights that made it and by content, so it outlives a swap: the weights need not even come back.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.engine.text.encoder import Encoded

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
    """Reads a prompt once. Contexts are kept in main memory, where there is room for them."""

    def __init__(self, limit: int = CONTEXT_BYTES) -> None:
        self._known: Recent[tuple[Hashable, str], tuple[Tensor, int]] = Recent(limit)

    def encode(self, encoder: Hashable, prompts: Sequence[str], read: Callable[[Sequence[str]], Encoded]) -> Encoded:
        """The contexts of `prompts`. encoder: what they depend on. read: called once, with those not remembered."""
        rows = {prompt: self._known.get((encoder, prompt)) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            encoded = read(missing)
            for prompt, context, cut in zip(missing, encoded.context.split(1), encoded.cut, strict=True):
                # a row of its own, not a view that keeps the whole batch alive
                context = context.clone() if context.device.type == "cpu" else context.cpu()
                rows[prompt] = (context, cut)
                self._known.keep((encoder, prompt), (context, cut), context.nbytes)
        found = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return Encoded(torch.cat([context for context, _ in found]), tuple(cut for _, cut in found))


class RememberingReferences:
    """Reads a picture once. Latents are kept in main memory."""

    def __init__(self, limit: int = LATENT_BYTES) -> None:
        self._known: Recent[tuple[Hashable, tuple[int, int], str, bytes], Tensor] = Recent(limit)

    def encode(self, autoencoder: Hashable, image: Image.Image, read: Callable[[Image.Image], Tensor]) -> Tensor:
        """The latent [1, 128, h, w] of `image`. autoencoder: what it depends on. read: makes it, if need be."""
        key = (autoencoder, image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
        latent = self._known.get(key)
        if latent is None:
            latent = read(image).cpu()
            self._known.keep(key, latent, latent.nbytes)
        return latent
