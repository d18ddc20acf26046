"""Edit regions: the white part of a mask, and the margin that outpainting adds. Pillow and numpy, no torch.

The engine works in squares of 16 x 16 pixels, and the autoencoder is not exact. So the drawn picture is pasted onto the
original inside the region only, with a feather from the region's edge inwards. Pixels outside the region never change.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.references import display_name, pad_edges
from flux2_studio.request import SIZE_MULTIPLE, Request, padded_size

BoolArray = NDArray[np.bool_]
Float64Array = NDArray[np.float64]
T = TypeVar("T", bound=np.generic)

MASK_THRESHOLD = 128  # grey from which a mask is white
MASK_FEATHER_DIVISOR, OUTPAINT_FEATHER_DIVISOR = (
    32,
    16,
)  # feather width = shorter side / divisor; the first for a mask, the second for outpainting
MIN_FEATHER_PIXELS, MAX_FEATHER_PIXELS = 4, 32  # limits of the feather width
MIN_COLOUR_SAMPLES = 256  # pixels that colour matching needs at least
MAX_CONTRAST_FACTOR = 3.0  # colour matching multiplies or divides a channel's contrast by at most this

# Ottosson's Oklab (bottosson.github.io/posts/oklab): from linear sRGB to cones, from their cube roots to lightness and
# two colour axes. Steps of equal size look about equal in it, so means and deviations of its channels mean something.
TO_CONES = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
TO_LAB = np.array(
    [
        [0.2104542553, 0.7936177850, -0.0040720468],
        [1.9779984951, -2.4285922050, 0.4505937099],
        [0.0259040371, 0.7827717662, -0.8086757660],
    ]
)


@dataclass(frozen=True, kw_only=True)
class Mask:
    """edit_mask: L, 255 where a picture of its size may change, else 0. data: the file, and sha256 that of its
    bytes."""

    edit_mask: Image.Image
    data: bytes = field(repr=False)
    sha256: str


@dataclass(frozen=True, kw_only=True)
class EditRegion:
    """The part of a result that may change.

    original: RGB, the first reference, extended by `outpaint` with its edge pixels repeated. edit_mask: L, of the same
    size, 255 where pixels may change, else 0. mask: the user's mask; None if there is only outpainting.
    """

    original: Image.Image
    edit_mask: Image.Image
    feather_pixels: int  # pixels over which the new fades in
    mask: Mask | None = None

    @property
    def token_mask(self) -> BoolArray:
        """[h, w] for the latent of the picture as it is drawn: true where any pixel of the square may change."""
        pixels = np.asarray(self.edit_mask) > 0
        (across, down), (rows, columns) = padded_size(*self.edit_mask.size), pixels.shape
        pixels = np.pad(pixels, ((0, down - rows), (0, across - columns)), mode="edge")
        squares = pixels.reshape(down // SIZE_MULTIPLE, SIZE_MULTIPLE, across // SIZE_MULTIPLE, SIZE_MULTIPLE)
        return np.asarray(squares.any(axis=(1, 3)))


def load_mask(path: Path, size: tuple[int, int], pictures: PictureCache) -> Mask:
    """The mask at `path` for a picture of `size`: white may change, black and what is transparent stays.

    It is scaled to `size` if it has the same shape. Raises `ReferenceImageError` for anything that cannot serve.
    """
    loaded = pictures.load(path, background="black")
    name, (across, down), (width, height) = display_name(path), loaded.image.size, size
    # Of one shape, but for a pixel to which either picture was rounded.
    if abs(down * width / across - height) > max(1, width / across) and abs(across * height / down - width) > max(
        1, height / down
    ):
        raise ReferenceImageError(
            f"The mask {name} has another shape than the picture ({across} x {down}, and the picture {width} x "
            f"{height}): make it as large as the picture, or of the same aspect ratio."
        )
    grey = loaded.image.convert("L")
    if grey.size != size:
        grey = grey.resize(size, Image.Resampling.BILINEAR)
    change = grey.point(lambda value: 255 if value >= MASK_THRESHOLD else 0)
    if change.getbbox() is None:
        raise ReferenceImageError(
            f"The mask {name} has no white, so nothing could change: paint white what may, or leave the mask out."
        )
    return Mask(edit_mask=change, data=loaded.data, sha256=loaded.sha256)


def make_edit_region(request: Request, picture: Image.Image, pictures: PictureCache) -> EditRegion | None:
    """What of the result `request` lets change; None for all of it. picture: the first reference, scaled to its cap.

    Raises `ReferenceImageError` for a mask that cannot serve.
    """
    mask = load_mask(request.mask, picture.size, pictures) if request.mask else None
    margins = request.outpaint
    if not margins:
        return (
            EditRegion(
                original=picture,
                edit_mask=mask.edit_mask,
                feather_pixels=feather_width(picture.size, MASK_FEATHER_DIVISOR),
                mask=mask,
            )
            if mask
            else None
        )
    width, height = margins.grown(picture.size)
    change = Image.new("L", (width, height), 255)
    change.paste(mask.edit_mask if mask else Image.new("L", picture.size, 0), (margins.left, margins.top))
    return EditRegion(
        original=pad_edges(picture, margins.left, margins.top, width, height),
        edit_mask=change,
        feather_pixels=feather_width(picture.size, OUTPAINT_FEATHER_DIVISOR),
        mask=mask,
    )


def composite_within(drawn: Image.Image, region: EditRegion) -> Image.Image:
    """Paste `drawn` (RGB, of the region's size) onto the original inside `region`; pixels outside stay identical."""
    box = region.edit_mask.getbbox()
    assert box is not None, "a region has some pixel that may change"
    inside = np.asarray(region.edit_mask) > 0
    near = _widened(box, 1, region.edit_mask.size)  # a ring of what stays, by which the edge is known
    left, top, right, bottom = near
    share = feather_weights(inside[top:bottom, left:right], region.feather_pixels)[..., None]
    old, new = (np.asarray(image.crop(near)).astype(np.float32) for image in (region.original, drawn))
    mixed = np.where(share > 0, np.rint(old + share * (new - old)), old).astype(np.uint8)
    result = region.original.copy()
    result.paste(Image.fromarray(mixed), near)
    return result


def feather_width(size: tuple[int, int], part: int) -> int:
    """The feather's width in pixels: one `part`-th of the shorter side of `size`."""
    return max(MIN_FEATHER_PIXELS, min(MAX_FEATHER_PIXELS, min(size) // part))


def feather_weights(inside: BoolArray, width: int) -> NDArray[np.float32]:
    """Return the opacity [H, W] of the drawn picture: 0 outside, rising to 1 over `width` pixels from the edge inwards.

    Where the region is narrower than that, the opacity rises over half of its local depth. The border of the picture
    does not count as an edge of the region.
    """
    depth = np.zeros(inside.shape, dtype=np.uint8)
    left = inside
    for _ in range(2 * width):
        if not left.any():
            break
        depth += left
        left = ~_dilate(~left)
    around = depth
    for _ in range(2 * width):
        around = _dilate(around) * inside  # within what hangs together
    reach = np.clip(around.astype(np.float32) / 2, 1, width)
    return np.minimum(depth / reach, 1).astype(np.float32)


def match_colours(image: Image.Image, target: Image.Image, edit_mask: Image.Image | None = None) -> Image.Image | None:
    """Return `image` with the mean and standard deviation of `target` in each channel of Oklab. Both are RGB.

    edit_mask: pixels to ignore (above 0), because the pictures may differ there; both must then have its size. Returns
    None if fewer than `MIN_COLOUR_SAMPLES` pixels remain.
    """
    now, wanted = _oklab(image), _oklab(target)
    stays = None if edit_mask is None else np.asarray(edit_mask) == 0
    if stays is not None and int(stays.sum()) < MIN_COLOUR_SAMPLES:
        return None
    here, there = (pixels.reshape(-1, 3) if stays is None else pixels[stays] for pixels in (now, wanted))
    deviation = np.maximum(here.std(axis=0), 1e-4)
    stretch = np.clip(there.std(axis=0) / deviation, 1 / MAX_CONTRAST_FACTOR, MAX_CONTRAST_FACTOR)
    return _picture((now - here.mean(axis=0)) * stretch + there.mean(axis=0))


def _oklab(image: Image.Image) -> Float64Array:
    values = np.arange(256) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    lab: Float64Array = np.cbrt(linear[np.asarray(image)] @ TO_CONES.T) @ TO_LAB.T
    return lab


def _picture(lab: Float64Array) -> Image.Image:
    linear = ((lab @ np.linalg.inv(TO_LAB).T) ** 3 @ np.linalg.inv(TO_CONES).T).clip(0, 1)
    values = np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    return Image.fromarray(np.rint(values * 255).astype(np.uint8))


def _dilate(values: NDArray[T]) -> NDArray[T]:
    """[H, W], each the largest of the 3 x 3 around it."""
    tall = values.copy()
    np.maximum(tall[1:], values[:-1], out=tall[1:])
    np.maximum(tall[:-1], values[1:], out=tall[:-1])
    wide = tall.copy()
    np.maximum(wide[:, 1:], tall[:, :-1], out=wide[:, 1:])
    np.maximum(wide[:, :-1], tall[:, 1:], out=wide[:, :-1])
    return wide


def _widened(box: tuple[int, int, int, int], by: int, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = box
    return max(0, left - by), max(0, top - by), min(size[0], right + by), min(size[1], bottom + by)
