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

from flux2_studio.engine.text.encoder import EncodedPrompts

MAX_PROMPT_CACHE_BYTES = 256 * 2**20  # 16 prompts of the largest text encoder, or 32 of klein 4B's
MAX_REFERENCE_CACHE_BYTES = 128 * 2**20  # 16 references at the largest size

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class LRUCache(Generic[KeyT, ValueT]):
    """Key -> value up to `max_bytes` bytes in all; the least recently used leave first. Not for several threads."""

    def __init__(self, max_bytes: int) -> None:
        self._limit = max_bytes
        self._held = 0
        self._entries: OrderedDict[KeyT, tuple[ValueT, int]] = OrderedDict()

    def get(self, key: KeyT) -> ValueT | None:
        if key not in self._entries:
            return None
        self._entries.move_to_end(key)
        return self._entries[key][0]

    def put(self, key: KeyT, value: ValueT, size: int) -> None:
        """size: of the value in bytes. One that is larger than the limit is not kept."""
        if key in self._entries:
            self._held -= self._entries.pop(key)[1]
        if size > self._limit:
            return
        self._entries[key] = (value, size)
        self._held += size
        while self._held > self._limit:
            _, (_, left) = self._entries.popitem(last=False)
            self._held -= left


class PromptCache:
    """Reads a prompt once. Contexts are kept in main memory, where there is room for them."""

    def __init__(self, max_bytes: int = MAX_PROMPT_CACHE_BYTES) -> None:
        self._known: LRUCache[tuple[Hashable, str], tuple[Tensor, int]] = LRUCache(max_bytes)

    def get_or_encode(
        self, encoder: Hashable, prompts: Sequence[str], encode_missing: Callable[[Sequence[str]], EncodedPrompts]
    ) -> EncodedPrompts:
        """The contexts of `prompts`. encoder: what they depend on. encode_missing: called once, with those not
        remembered."""
        rows = {prompt: self._known.get((encoder, prompt)) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            encoded = encode_missing(missing)
            for prompt, context, cut in zip(missing, encoded.context.split(1), encoded.truncated_tokens, strict=True):
                # a row of its own, not a view that keeps the whole batch alive
                context = context.clone() if context.device.type == "cpu" else context.cpu()
                rows[prompt] = (context, cut)
                self._known.put((encoder, prompt), (context, cut), context.nbytes)
        found = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return EncodedPrompts(torch.cat([context for context, _ in found]), tuple(cut for _, cut in found))


class ReferenceLatentCache:
    """Reads a picture once. Latents are kept in main memory."""

    def __init__(self, max_bytes: int = MAX_REFERENCE_CACHE_BYTES) -> None:
        self._known: LRUCache[tuple[Hashable, tuple[int, int], str, bytes], Tensor] = LRUCache(max_bytes)

    def get_or_encode(
        self, autoencoder: Hashable, image: Image.Image, encode_missing: Callable[[Image.Image], Tensor]
    ) -> Tensor:
        """The latent [1, 128, h, w] of `image`. autoencoder: what it depends on. encode_missing: makes it, if need
        be."""
        key = (autoencoder, image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
        latent = self._known.get(key)
        if latent is None:
            latent = encode_missing(image).cpu()
            self._known.put(key, latent, latent.nbytes)
        return latent
