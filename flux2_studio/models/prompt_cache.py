"""Caches encoded prompts and references between runs, so that a new seed encodes nothing.

Keys consist of the encoder's weights and the content, so entries stay valid when checkpoints are switched, and a hit
does not need the weights in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.engine.text.encoder import EncodedPrompts
from flux2_studio.images.lru_cache import LRUCache

MAX_PROMPT_CACHE_BYTES = 256 * 2**20  # 16 prompts of the largest text encoder, or 32 of klein 4B's
MAX_REFERENCE_CACHE_BYTES = 128 * 2**20  # 16 references at the largest size


class PromptCache:
    """Caches prompt contexts in main memory."""

    def __init__(self, max_bytes: int = MAX_PROMPT_CACHE_BYTES) -> None:
        self._known: LRUCache[tuple[Hashable, str], tuple[Tensor, int]] = LRUCache(max_bytes)

    def get_or_encode(
        self, encoder: Hashable, prompts: Sequence[str], encode_missing: Callable[[Sequence[str]], EncodedPrompts]
    ) -> EncodedPrompts:
        """Returns the contexts of `prompts`. encoder: cache key of the encoder. encode_missing: called at most once,
        with the prompts that are not cached."""
        rows = {prompt: self._known.get((encoder, prompt)) for prompt in prompts}
        missing = [prompt for prompt, row in rows.items() if row is None]
        if missing:
            encoded = encode_missing(missing)
            for prompt, context, truncated in zip(
                missing, encoded.context.split(1), encoded.truncated_tokens, strict=True
            ):
                # a copy, because a view would keep the whole batch alive
                context = context.clone() if context.device.type == "cpu" else context.cpu()
                rows[prompt] = (context, truncated)
                self._known.put((encoder, prompt), (context, truncated), context.nbytes)
        ordered_rows = [row for prompt in prompts if (row := rows[prompt]) is not None]
        return EncodedPrompts(
            torch.cat([context for context, _ in ordered_rows]), tuple(truncated for _, truncated in ordered_rows)
        )


class ReferenceLatentCache:
    """Caches reference latents in main memory."""

    def __init__(self, max_bytes: int = MAX_REFERENCE_CACHE_BYTES) -> None:
        self._known: LRUCache[tuple[Hashable, tuple[int, int], str, bytes], Tensor] = LRUCache(max_bytes)

    def get_or_encode(
        self, autoencoder: Hashable, image: Image.Image, encode_missing: Callable[[Image.Image], Tensor]
    ) -> Tensor:
        """Returns the latent [1, 128, h, w] of `image`. autoencoder: cache key of the autoencoder. encode_missing:
        encodes `image` if it is not cached."""
        key = (autoencoder, image.size, image.mode, hashlib.sha256(image.tobytes()).digest())
        latent = self._known.get(key)
        if latent is None:
            latent = encode_missing(image).cpu()
            self._known.put(key, latent, latent.nbytes)
        return latent
