"""Reference pictures: from any file a user may offer to the RGB picture that the engine sees. No torch.

A file is untrusted. Its size in bytes, its format and its size in pixels are checked before anything is decoded, and
whatever goes wrong in a decoder becomes a `ReferenceImageError` that names the file by its name, never by its path.

Pitfalls that are dealt with here:
- a phone's photo lies on its side until its EXIF orientation is applied;
- Pillow clips 16-bit grey to white instead of scaling it, and matches a 16-bit transparent colour against 8-bit pixels;
- a transparent picture's hidden colours are arbitrary: flattened on white, not dropped;
- the colours of an embedded ICC profile (wide gamut, CMYK) have to be brought to sRGB before the profile is lost;
- a picture scaled to the cap can end with a side under 64 pixels when it is long and narrow.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from flux2_studio.errors import ReferenceImageError
from flux2_studio.files.hashing import hash_bytes
from flux2_studio.request import MIN_SIDE, padded_size

MAX_REFERENCE_BYTES = 200 * 10**6
MAX_REFERENCE_PIXELS = 89 * 10**6  # just under the size from which Pillow itself warns of a decompression bomb
MAX_ASPECT = 8
READABLE_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "TIFF")  # never a format that runs code (EPS, PDF)
SRGB = ("sRGB IEC61966", "sRGB built-in")  # how the usual sRGB profiles, and the one made here, describe themselves
READABLE = "PNG, JPEG, WebP, AVIF, GIF, BMP or TIFF"


@dataclass(frozen=True, kw_only=True)
class LoadedReference:
    """One reference: `image` is RGB at its full size, upright; `notes` say what was done to it, for the user; `data` is
    the file."""

    image: Image.Image
    notes: tuple[str, ...]
    data: bytes = field(repr=False)
    sha256: str  # of the file's bytes, which names the reference in a saved picture's metadata


def load_reference(path: Path, background: str = "white") -> LoadedReference:
    """Read the picture at `path`, transparent parts on `background`.

    Raises `ReferenceImageError` for a file that cannot serve as a reference. See `PictureCache` for pictures that are
    needed again.
    """
    data = read_reference(path)
    return decode_reference(data, hash_bytes(data), display_name(path), background)


def decode_reference(data: bytes, sha256: str, name: str, background: str = "white") -> LoadedReference:
    """The picture in `data`, a file called `name` whose hash is `sha256`. Raises `ReferenceImageError`."""
    notes: list[str] = []
    with open_image(data, name) as file:
        # (A phone's MPO holds a photo and its depth map or the like: nothing worth a note.)
        if file.format != "MPO" and getattr(file, "is_animated", False):
            notes.append(f"{name} holds several pictures or frames: the first one is used.")
        file.load()
        _check_size(file.size, name)  # a decoder may find another size than the header told
        image = _flatten(_to_srgb(_to_8_bit(_upright(file, name, notes)), name, notes), background)
    image.info.clear()  # an orientation or a colour profile left here would no longer be true
    return LoadedReference(image=image, notes=tuple(notes), data=data, sha256=sha256)


def reference_size(path: Path) -> tuple[int, int]:
    """The (width, height) of the picture at `path` as it is stored, upright or not: by its header, without decoding.
    (Of WebP and AVIF Pillow reads the whole file.)

    Raises `ReferenceImageError` for what the header shows to be of no use.
    """
    name = display_name(path)
    with _file(path, name) as stream, open_image(stream, name) as picture:
        return picture.size


def fit(image: Image.Image, cap_pixels: int) -> Image.Image:
    """`image` scaled down to an area of at most `cap_pixels`, to the sides that `fit_size` gives; else as it is.

    Exactly as Black Forest Labs' code and diffusers scale (LANCZOS, sides cut to whole pixels). What they do next, cut
    the centre out to multiples of 16, would move an edit by up to 7 pixels against its reference: see
    `pad_to_multiple`.
    """
    size = fit_size(image.size, cap_pixels)
    return image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)


def pad_to_multiple(image: Image.Image) -> Image.Image:
    """`image` (RGB) as the engine takes it: its last column and row repeated up to multiples of 16.

    Nothing moves, and what is drawn beyond the picture is cut off again. At multiples of 16 nothing happens, and the
    reference is encoded to the same latent as by the official code.
    """
    return pad_edges(image, 0, 0, *padded_size(*image.size))


def pad_edges(image: Image.Image, left: int, top: int, width: int, height: int) -> Image.Image:
    """`image` (RGB) at (left, top) of a picture of width x height pixels, its edge pixels repeated outwards."""
    if (left, top, width, height) == (0, 0, *image.size):
        return image
    right, bottom = width - left - image.width, height - top - image.height
    pixels = np.pad(np.asarray(image), ((top, bottom), (left, right), (0, 0)), mode="edge")
    return Image.fromarray(pixels)


def fit_note(number: int, before: tuple[int, int], after: tuple[int, int]) -> str | None:
    """What `fit` did to reference `number` (1-based, as the prompt calls it), in a sentence; None if nothing."""
    if before == after:
        return None
    return f"Image {number} was scaled from {before[0]} x {before[1]} to {after[0]} x {after[1]}."


def fit_size(size: tuple[int, int], cap_pixels: int) -> tuple[int, int]:
    """The (width, height) to which `fit` scales a picture of `size`: at least 64 each.

    One case that the official code refuses or leaves undefined: where the cap would bring the short side under 64
    pixels, that side becomes 64 and the area exceeds the cap (by 8:1 at most 512 x 64).
    """
    width, height = size
    if min(size) < MIN_SIDE:
        raise ReferenceImageError(_too_small("The picture", size))
    if width * height <= cap_pixels:
        return size
    scale = math.sqrt(cap_pixels / (width * height))
    if int(min(size) * scale) < MIN_SIDE:
        # In whole numbers: 64 / side * side may fall just under 64.
        return tuple(side * MIN_SIDE // min(size) for side in size)  # type: ignore[return-value]
    return int(width * scale), int(height * scale)


@contextmanager
def open_image(data: bytes | BinaryIO, name: str, *, any_size: bool = False) -> Iterator[ImageFile.ImageFile]:
    """The picture in `data`, its header read; whatever goes wrong with it, in the `with` too, is a
    `ReferenceImageError` that calls it `name`.

    any_size: it need not serve as a reference; how many pixels it has is then for the caller to check.
    """
    try:
        with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=READABLE_FORMATS) as file:
            if not any_size:
                _check_size(file.size, name)
            yield file
    except ReferenceImageError:
        raise
    except UnidentifiedImageError as error:
        raise ReferenceImageError(f"{name} is not a picture that can be read here: save it as {READABLE}.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ReferenceImageError(_too_large(name)) from error
    except Exception as error:
        # Decoders raise nearly every exception there is when a file is damaged or made to hurt.
        raise ReferenceImageError(
            f"{name} is damaged or incomplete: open it in an image program and save it again, or choose another."
        ) from error


def read_reference(path: Path) -> bytes:
    """The bytes of the file at `path`. Raises `ReferenceImageError` where it cannot be a picture or cannot be read."""
    name = display_name(path)
    with _file(path, name) as stream:
        try:
            return stream.read(MAX_REFERENCE_BYTES + 1)
        except OSError as error:
            raise ReferenceImageError(f"{name} cannot be read: choose it again, or another.") from error


@contextmanager
def _file(path: Path, name: str) -> Iterator[BinaryIO]:
    """The file at `path`, open for reading, if it is one that can be a picture."""
    try:
        if path.is_dir():
            raise ReferenceImageError(f"{name} is a folder: choose a picture in it.")
        if not path.is_file():  # missing, or a device or pipe, which could be read for ever
            raise ReferenceImageError(f"There is no picture {name} (any more): choose it again.")
        stream = path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ReferenceImageError(f"{name} cannot be opened: check that you may read it, or choose another.") from error
    with stream:
        size = os.fstat(stream.fileno()).st_size
        if not size:
            raise ReferenceImageError(f"{name} is empty: choose another picture.")
        if size > MAX_REFERENCE_BYTES:
            raise ReferenceImageError(
                f"{name} is larger than {MAX_REFERENCE_BYTES // 10**6} MB: make it smaller, or save it as JPEG or PNG."
            )
        yield stream


def _check_size(size: tuple[int, int], name: str) -> None:
    width, height = size
    if width * height > MAX_REFERENCE_PIXELS:
        raise ReferenceImageError(_too_large(name))
    if min(size) < MIN_SIDE:
        raise ReferenceImageError(_too_small(name, size))
    if max(size) > MAX_ASPECT * min(size):
        raise ReferenceImageError(
            f"{name} is too long and narrow ({width} x {height}): crop it to {MAX_ASPECT}:1 or less."
        )


def _too_small(name: str, size: tuple[int, int]) -> str:
    return f"{name} is too small ({size[0]} x {size[1]}): each side needs at least {MIN_SIDE} pixels."


def _too_large(name: str) -> str:
    return f"{name} has more than {MAX_REFERENCE_PIXELS // 10**6} megapixels: scale it down first."


def display_name(path: Path) -> str:
    """The file's name, fit for a message: no folders, nothing unprintable, not too long."""
    name = "".join(c if c.isprintable() else "?" for c in path.name) or "The reference"
    return name if len(name) <= 60 else f"{name[:40]}...{name[-17:]}"


def _upright(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - as untrusted as the rest of the file, and the picture is good without it
        notes.append(f"The orientation stored in {name} is damaged: the picture is used as it lies.")
        return image.copy()


def _to_8_bit(image: Image.Image) -> Image.Image:
    """`image` in a mode with 8 bits per channel: L, LA, RGB, RGBA or CMYK, mostly."""
    transparent = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        white = _white(image)
        grey = image if image.mode in ("I", "F") else image.convert("I")
        grey = grey.point(lambda value: value * (255 / white) + 0.5).convert("L")
        if isinstance(transparent, int):
            grey.info["transparency"] = round(transparent * 255 / white)
        return grey
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "RGB" and isinstance(transparent, tuple) and max(transparent) > 255:
        # A 16-bit PNG: Pillow keeps the high bytes of the pixels, but all of the transparent colour.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
    if image.mode in ("P", "PA", "RGBa", "La"):
        return image.convert("RGBA" if image.has_transparency_data else "RGB")
    return image


def _white(image: Image.Image) -> float:
    """The value that stands for white in a picture of more than 8 bits."""
    if image.mode.startswith("I;16"):
        return 65535
    # 32-bit files do not say how far they use their range: the smallest customary one that holds the brightest pixel.
    brightest = float(image.getextrema()[1])  # type: ignore[arg-type]
    if not math.isfinite(brightest):
        raise ValueError("a pixel is not a number")
    ranges = (1.0, 255, 65535) if image.mode == "F" else (255, 65535)
    return next((white for white in ranges if brightest <= white), brightest)


def _to_srgb(image: Image.Image, name: str, notes: list[str]) -> Image.Image:
    """`image` with its embedded colour profile applied; as it is where it has none, or one that is sRGB already."""
    embedded = image.info.get("icc_profile")
    if not embedded:
        return image
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(embedded))
        if ImageCms.getProfileDescription(profile).strip().startswith(SRGB):
            return image  # a round trip through the same colours would only add rounding
        alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
        mode = {"GRAY": "L", "RGB ": "RGB", "CMYK": "CMYK"}[profile.profile.xcolor_space]
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L") != (image.mode in ("L", "LA")):
            raise ValueError("the profile is made for other channels than the picture has")
        converted = ImageCms.profileToProfile(
            image.convert(mode), profile, ImageCms.createProfile("sRGB"), outputMode="RGB"
        )
        assert converted is not None  # it is None only for a conversion in place
    except (ImageCms.PyCMSError, OSError, ValueError, KeyError, TypeError):
        notes.append(f"The colour profile in {name} cannot be used: its colours may look slightly different.")
        return image
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _flatten(image: Image.Image, background: str) -> Image.Image:
    """`image` as RGB, what is transparent on `background`."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    above = image.convert("RGBA")
    below = Image.new("RGBA", above.size, background)
    return Image.alpha_composite(below, above).convert("RGB")
