"""Latents of scenes, computed once: drawing and encoding a picture costs more than a training step on it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from flux2_studio.engine.flux.latents import to_tokens
from flux2_studio.engine.vae.autoencoder import Autoencoder
from tools.nano.scenes import Drawings, Scene

BATCH = 32


def pixels_of(pictures: Iterable[np.ndarray]) -> Tensor:
    """RGB uint8 pictures [H, W, 3] -> [B, 3, H, W] in -1..1."""
    stacked = torch.from_numpy(np.stack(list(pictures)))
    return stacked.permute(0, 3, 1, 2).float() / 127.5 - 1


class LatentStore:
    """Scene -> latent tokens [n, 128] in bfloat16 on the CPU."""

    def __init__(self, drawings: Drawings, autoencoder: Autoencoder, side: int) -> None:
        self._drawings = drawings
        self._autoencoder = autoencoder
        self._side = side
        self._tokens: dict[Scene, Tensor] = {}

    def __len__(self) -> int:
        return len(self._tokens)

    def fill(self, scenes: Iterable[Scene]) -> None:
        """Compute what is not there yet."""
        missing = [scene for scene in dict.fromkeys(scenes) if scene not in self._tokens]
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            pixels = pixels_of(self._drawings.render(scene, self._side) for scene in part)
            device = self._autoencoder.device
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                latent = self._autoencoder.encode(pixels.to(device))
            for scene, tokens in zip(part, to_tokens(latent).bfloat16().cpu(), strict=True):
                self._tokens[scene] = tokens.clone()

    def stack(self, scenes: Iterable[Scene]) -> Tensor:
        """[B, n, 128] in float32."""
        return torch.stack([self._tokens[scene] for scene in scenes]).float()
