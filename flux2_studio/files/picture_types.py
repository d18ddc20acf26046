"""The type of a picture file by its first bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PictureType:
    """The name's suffix, the MIME type, and what the file begins with: bytes at an offset, all of which must match."""

    suffix: str
    mime: str
    signature: tuple[tuple[int, bytes], ...]


# The formats that `images/references.py` reads.
PICTURE_TYPES = (
    PictureType(".png", "image/png", ((0, b"\x89PNG\r\n\x1a\n"),)),
    PictureType(".jpg", "image/jpeg", ((0, b"\xff\xd8\xff"),)),
    PictureType(".webp", "image/webp", ((0, b"RIFF"), (8, b"WEBP"))),
    PictureType(".avif", "image/avif", ((4, b"ftypavif"),)),
    PictureType(".avif", "image/avif", ((4, b"ftypavis"),)),
    PictureType(".gif", "image/gif", ((0, b"GIF8"),)),
    PictureType(".bmp", "image/bmp", ((0, b"BM"),)),
    PictureType(".tif", "image/tiff", ((0, b"II*\0"),)),
    PictureType(".tif", "image/tiff", ((0, b"MM\0*"),)),
)
PICTURE_SUFFIXES = tuple(dict.fromkeys(it.suffix for it in PICTURE_TYPES))


def detect_picture_type(data: bytes) -> PictureType | None:
    """The type of a picture that begins with `data`; None where it is none of `PICTURE_TYPES`."""
    return next(
        (it for it in PICTURE_TYPES if all(data.startswith(begin, offset) for offset, begin in it.signature)), None
    )
