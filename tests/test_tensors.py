"""Between 8-bit pictures and pixels in -1..1."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from flux2_studio.images.tensors import images_from_pixels, pixels_from_image


def test_every_level_survives_the_round_trip() -> None:
    image = Image.frombytes("RGB", (16, 16), bytes(level for level in range(256) for _ in range(3)))
    pixels = pixels_from_image(image)
    assert pixels.shape == (1, 3, 16, 16)
    assert pixels.dtype is torch.float32
    assert (pixels.min().item(), pixels.max().item()) == (-1.0, 1.0)
    assert images_from_pixels(pixels)[0].tobytes() == image.tobytes()


def test_rows_columns_and_colours_keep_their_places() -> None:
    image = Image.new("RGB", (3, 2))
    image.putpixel((2, 0), (255, 0, 0))
    image.putpixel((0, 1), (0, 0, 255))
    pixels = pixels_from_image(image)
    assert pixels.shape == (1, 3, 2, 3)
    assert pixels[0, :, 0, 2].tolist() == [1, -1, -1]
    assert pixels[0, :, 1, 0].tolist() == [-1, -1, 1]
    (back,) = images_from_pixels(pixels)
    assert back.mode == "RGB"
    assert back.tobytes() == image.tobytes()


@pytest.mark.parametrize(
    ("value", "level"), [(-1.7, 0), (1.3, 255), (0.0, 128), (99.6 / 127.5 - 1, 100), (99.4 / 127.5 - 1, 99)]
)
def test_values_are_clamped_and_rounded_to_the_nearest_level(value: float, level: int) -> None:
    for dtype in (torch.float32, torch.float64):
        (image,) = images_from_pixels(torch.full((1, 3, 1, 1), value, dtype=dtype))
        assert image.getpixel((0, 0)) == (level,) * 3


def test_a_batch_gives_a_picture_each() -> None:
    pixels = torch.stack([torch.full((3, 2, 4), -1.0), torch.full((3, 2, 4), 1.0)]).bfloat16()
    dark, bright = images_from_pixels(pixels)
    assert dark.size == bright.size == (4, 2)
    assert (dark.getpixel((0, 0)), bright.getpixel((3, 1))) == ((0, 0, 0), (255, 255, 255))
