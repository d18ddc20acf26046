"""Initial noise, token layout and position ids.

    latent [B, 128, h, w], h = H/16, w = W/16      tokens [B, h*w, 128], row by row      ids [tokens, 4] = (t, h, w, l)

Text tokens are at (0, 0, 0, l), image tokens at (0, h, w, 0), tokens of reference i at (10 + 10 i, h, w, 0).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LATENT_CHANNELS = 128
REFERENCE_OFFSET = 10


def initial_noise(
    seeds: Sequence[int], width: int, height: int, channels: int = LATENT_CHANNELS, patch: int = 16
) -> Tensor:
    """Return starting noise [len(seeds), channels, height/patch, width/patch] in float32, one picture per seed.

    The noise is sampled on the CPU in bfloat16, as the published models' own code does. A seed therefore gives the same
    noise on every device, at every precision and in every batch.
    """
    shape = (channels, height // patch, width // patch)
    return torch.stack(
        [
            torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.bfloat16).float()
            for seed in seeds
        ]
    )


def to_tokens(latent: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h*w, C]."""
    return latent.flatten(2).transpose(1, 2)


def from_tokens(tokens: Tensor, h: int, w: int) -> Tensor:
    """[B, h*w, C] -> [B, C, h, w]."""
    return tokens.transpose(1, 2).unflatten(2, (h, w))


def text_position_ids(length: int) -> Tensor:
    """Position ids [length, 4] of text tokens."""
    ids = torch.zeros(length, 4, dtype=torch.long)
    ids[:, 3] = torch.arange(length)
    return ids


def image_position_ids(h: int, w: int, t: int = 0) -> Tensor:
    """Position ids [h*w, 4] of image tokens, row by row."""
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(h), torch.arange(w), torch.tensor([0]))


def sequence_position_ids(text_tokens: int, h: int, w: int, references: Sequence[Tensor] = ()) -> Tensor:
    """Position ids of the full sequence: text, the image's h*w tokens, then each reference latent [1, C, rh, rw]."""
    return torch.cat(
        [
            text_position_ids(text_tokens),
            image_position_ids(h, w),
            *(
                image_position_ids(latent.shape[-2], latent.shape[-1], t=REFERENCE_OFFSET * (i + 1))
                for i, latent in enumerate(references)
            ),
        ]
    )
