"""TAEF2's decoder: a preview picture from a latent in a few milliseconds (madebyollin/taef2, MIT).

    normalised unpacked latent [B, 32, h, w] in  ->  RGB [B, 3, 8h, 8w] in 0..1 out

Unlike `Autoencoder`, it takes the normalised latent. Parameter names are the indices of the published Sequential. The
hub's safetensors file does not count the clamp, so its indices are one lower (`loading.py` translates).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DECODER_CHANNELS = 64
POOL_CHANNELS = 256  # inside the three blocks with a GroupNorm over the full picture
UNPACKED_LATENT_CHANNELS = 32


class Clamp(nn.Module):
    """Squash outliers smoothly to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class TinyBlock(nn.Module):
    """relu(conv(x) + x) with three convolutions. `pooled` first adds a side branch with a GroupNorm."""

    def __init__(self, *, pooled: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(DECODER_CHANNELS, DECODER_CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(DECODER_CHANNELS, DECODER_CHANNELS, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(DECODER_CHANNELS, DECODER_CHANNELS, 3, padding=1),
        )
        if pooled:
            self.pool = nn.Sequential(
                nn.Conv2d(DECODER_CHANNELS, POOL_CHANNELS, 1, bias=False),
                nn.GroupNorm(4, POOL_CHANNELS),
                nn.ReLU(),
                nn.Conv2d(POOL_CHANNELS, DECODER_CHANNELS, 1, bias=False),
            )

    def forward(self, x: Tensor) -> Tensor:
        if hasattr(self, "pool"):
            x = x + self.pool(x)
        return F.relu(self.conv(x) + x)


def _upsample_layers() -> list[nn.Module]:
    return [nn.Upsample(scale_factor=2), nn.Conv2d(DECODER_CHANNELS, DECODER_CHANNELS, 3, padding=1, bias=False)]


class TinyDecoder(nn.Sequential):
    """See the module's header. Build it with `weights.loading.load_tiny_decoder`."""

    def __init__(self) -> None:
        super().__init__(
            Clamp(),
            nn.Conv2d(UNPACKED_LATENT_CHANNELS, DECODER_CHANNELS, 3, padding=1),
            nn.ReLU(),
            *(TinyBlock(pooled=True) for _ in range(3)),
            *_upsample_layers(),
            *(TinyBlock() for _ in range(3)),
            *_upsample_layers(),
            *(TinyBlock() for _ in range(3)),
            *_upsample_layers(),
            TinyBlock(),
            nn.Conv2d(DECODER_CHANNELS, 3, 3, padding=1),
        )

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device
