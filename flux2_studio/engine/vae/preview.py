"""Previews: what the picture would look like if denoising ended now.

Each previewer maps a clean latent [B, 128, h, w] (normalised) to pixels [B, 3, H, W] in -1..1 and does not change the
latent. H and W need not be the picture's own: `LinearPreview` makes one pixel per 8x8.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from flux2_studio.engine.vae.autoencoder import Autoencoder, unpack_latent
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder

# RGB weights of the 32 unpacked latent channels: the factors that ComfyUI and InvokeAI use for FLUX.2.
LINEAR_FACTORS = (
    (0.0058, 0.0113, 0.0073), (0.0495, 0.0443, 0.0836), (-0.0099, 0.0096, 0.0644), (0.2144, 0.3009, 0.3652),
    (0.0166, -0.0039, -0.0054), (0.0157, 0.0103, -0.0160), (-0.0398, 0.0902, -0.0235), (-0.0052, 0.0095, 0.0109),
    (-0.3527, -0.2712, -0.1666), (-0.0301, -0.0356, -0.0180), (-0.0107, 0.0078, 0.0013), (0.0746, 0.0090, -0.0941),
    (0.0156, 0.0169, 0.0070), (-0.0034, -0.0040, -0.0114), (0.0032, 0.0181, 0.0080), (-0.0939, -0.0008, 0.0186),
    (0.0018, 0.0043, 0.0104), (0.0284, 0.0056, -0.0127), (-0.0024, -0.0022, -0.0030), (0.1207, -0.0026, 0.0065),
    (0.0128, 0.0101, 0.0142), (0.0137, -0.0072, -0.0007), (0.0095, 0.0092, -0.0059), (0.0000, -0.0077, -0.0049),
    (-0.0465, -0.0204, -0.0312), (0.0095, 0.0012, -0.0066), (0.0290, -0.0034, 0.0025), (0.0220, 0.0169, -0.0048),
    (-0.0332, -0.0457, -0.0468), (-0.0085, 0.0389, 0.0609), (-0.0076, 0.0003, -0.0043), (-0.0111, -0.0460, -0.0614),
)  # fmt: skip
LINEAR_BIAS = (-0.0329, -0.0718, -0.0851)


class Previewer(Protocol):
    def __call__(self, clean: Tensor) -> Tensor: ...


class LinearPreview:
    """A weighted sum of the 32 channels: rough colours at no cost. Fits FLUX.2's own autoencoder only."""

    def __init__(self) -> None:
        self._factors = torch.tensor(LINEAR_FACTORS)
        self._bias = torch.tensor(LINEAR_BIAS)

    @torch.inference_mode()
    def __call__(self, clean: Tensor) -> Tensor:
        latent = unpack_latent(clean.float())
        rgb = torch.einsum("bchw,cr->brhw", latent, self._factors.to(latent.device))
        # (rgb + bias + 1) / 2 in 0..1 is rgb + bias in -1..1
        return rgb + self._bias.to(latent.device)[:, None, None]


class TinyPreview:
    """TAEF2's decoder: close to the finished picture, at full size."""

    def __init__(self, decoder: TinyDecoder) -> None:
        self._decoder = decoder

    @torch.inference_mode()
    def __call__(self, clean: Tensor) -> Tensor:
        return self._decoder(unpack_latent(clean).to(self._decoder.device, self._decoder.dtype)).float() * 2 - 1


class AutoencoderPreview:
    """The checkpoint's own decoder, for autoencoders that are tiny themselves."""

    def __init__(self, autoencoder: Autoencoder) -> None:
        self._autoencoder = autoencoder

    def __call__(self, clean: Tensor) -> Tensor:
        return self._autoencoder.decode(clean).float()
