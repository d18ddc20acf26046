"""Editing within a mask: at every step, what is outside is the reference's own latent, noised as the step wants it.

Does not know: pixels, masks of pixels, compositing. What surrounds the mask is then what the model sees while it draws
inside, so that both fit together; to the byte, pixels are kept only by whoever puts them back after decoding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class InpaintMask:
    """known_latent: [1, 128, h, w], the latent of the picture that is edited. editable: [h, w] bool, where it may
    change."""

    known_latent: Tensor
    editable: Tensor


def blend_known_region(x: Tensor, editable: Tensor, known: Tensor, noise: Tensor, t: float) -> Tensor:
    """`x` where it may change, elsewhere x_t = (1 - t) * clean + t * noise.

    x, noise: [B, tokens, C]; known: [1, tokens, C]; editable: [tokens] bool. noise is the run's own, from which x came:
    so the kept tokens are where the model would have brought them, had it drawn the picture that is kept.
    """
    return torch.where(editable[None, :, None], x, (1 - t) * known + t * noise)
