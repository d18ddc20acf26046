"""Between pictures (PIL, 8 bits) and pixels (tensors in -1..1)."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def pixels_from_image(image: Image.Image) -> Tensor:
    """An RGB picture as [1, 3, H, W] in -1..1, float32."""
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return (values / 255 * 2 - 1).permute(2, 0, 1)[None]


def images_from_pixels(pixels: Tensor) -> list[Image.Image]:
    """[B, 3, H, W], about -1..1 -> B RGB pictures, clamped and rounded to 8 bits."""
    values = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
