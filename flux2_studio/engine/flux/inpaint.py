"""Inpainting: at every step, tokens outside the mask are reset to the original's latent, noised to that step.

The model then sees the surroundings of the mask while it denoises the inside, so both fit together. Out of scope:
pixels, pixel masks and compositing. Pixels outside the mask stay byte-identical only if the caller puts them back after
decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InpaintMask:
    """known_latent: [1, 128, h, w], latent of the picture to edit. editable: [h, w] bool, True where it may change."""

    known_latent: Tensor
    editable: Tensor


def blend_known_region(x: Tensor, editable: Tensor, known: Tensor, noise: Tensor, t: float) -> Tensor:
    """Return `x` where `editable`, and x_t = (1 - t) * known + t * noise elsewhere.

    x, noise: [B, tokens, C]; known: [1, tokens, C]; editable: [tokens] bool. `noise` must be the noise that the run
    started from, so that known tokens lie on the path from this noise to the known latent.
    """
    return torch.where(editable[None, :, None], x, (1 - t) * known + t * noise)
