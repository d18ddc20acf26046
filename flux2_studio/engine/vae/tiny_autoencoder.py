"""TAEF2's decoder: a picture from a latent in a few milliseconds, good enough to look at (madebyollin/taef2, MIT).

    normalised unpacked latent [B, 32, h, w] in  ->  RGB [B, 3, 8h, 8w] in 0..1 out

Unlike the autoencoder it takes the latent while it is still normalised. Parameter names are the indices of the
published Sequential; the hub's safetensors leaves the clamp out of its count (`loading.py` translates).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 64
POOLED = 256  # channels inside the three blocks that see the picture as a whole through a GroupNorm
LATENT = 32


class Clamp(nn.Module):
    """Squash outliers softly to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Block(nn.Module):
    """relu(three convolutions of x + x); `pooled` adds a normalised side branch before them."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, POOLED, 1, bias=False),
                nn.GroupNorm(4, POOLED),
                nn.ReLU(),
                nn.Conv2d(POOLED, WIDTH, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


def _up() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)]


class TinyDecoder(nn.Sequential):
    """See the module's header. Build it with `weights.load_tiny_decoder`."""

    def __init__(self) -> None:
        super().__init__(
            Clamp(),
            nn.Conv2d(LATENT, WIDTH, 3, padding=1),
            nn.ReLU(),
            *(Block(pooled=True) for _ in range(3)),
            *_up(),
            *(Block() for _ in range(3)),
            *_up(),
            *(Block() for _ in range(3)),
            *_up(),
            Block(),
            nn.Conv2d(WIDTH, 3, 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
