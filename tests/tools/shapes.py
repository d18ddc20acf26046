"""Drawings by number, like a data set of the real layout holds them."""

from __future__ import annotations

import random

import numpy as np
from PIL import Image, ImageFilter

KNOWN = 24  # enough that five guesses are seldom right by chance
STRANGERS = 6  # further drawings, which the classifier never sees


def shape(number: int) -> Image.Image:
    """A mask like no other's: 5 x 5 blocks, symmetric, grown to 50 pixels with a margin."""
    bits = random.Random(number)
    blocks = np.array([[bits.random() < 0.6 for _ in range(3)] for _ in range(5)])
    blocks[2] = True  # so that none is empty
    whole = np.concatenate((blocks, blocks[:, 1::-1]), 1)
    return Image.fromarray(np.pad(np.kron(whole, np.ones((10, 10))), 7).astype(np.uint8) * 255)


def drawing(number: int, style: str) -> Image.Image:
    mask = shape(number)
    if style == "line":
        inner = np.asarray(mask.filter(ImageFilter.MinFilter(7)))
        outline = Image.fromarray(np.asarray(mask) - inner)
        return Image.merge("RGBA", (*Image.new("RGB", mask.size).split(), outline))
    tone = np.array(random.Random(-1 - number).choices(range(40, 220), k=3), dtype=np.float32)
    shade = np.ones(mask.size) if style == "flat" else np.linspace(1.4, 0.4, mask.height)[:, None].repeat(64, 1)
    colour = Image.fromarray((shade[..., None] * tone).clip(0, 255).astype(np.uint8))
    return Image.merge("RGBA", (*colour.split(), mask))
