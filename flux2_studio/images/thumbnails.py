"""Small copies of pictures for lists: made once, when they are first asked for, and kept by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from PIL import Image

from flux2_studio.errors import SaveError
from flux2_studio.files.atomic import atomic_write

THUMBNAIL_PIXELS = 320  # pixels along the longer side
THUMBNAIL_QUALITY = 80


class ThumbnailCache:
    """WebP files below `folder`: `ab/<name>.webp`, under the first two letters of their name, which must be safe as
    one. A file is there whole or not at all; any number of threads and processes may ask at once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_or_create(self, name: str, picture: Callable[[], Image.Image]) -> Path:
        """The thumbnail called `name`, of what `picture` gives where it has to be made.

        Raises `SaveError` where it cannot be written, and whatever `picture` raises.
        """
        target = self._path(name)
        if target.is_file():
            return target
        small = picture().convert("RGB")
        small.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS), Image.Resampling.LANCZOS)
        small.info.clear()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                small.save(file, "WEBP", quality=THUMBNAIL_QUALITY)
        except OSError as error:
            raise SaveError(
                f"No thumbnail can be kept in {self.folder} ({error.strerror or error}): free some space, or allow "
                f"writing there."
            ) from error
        return target

    def delete(self, name: str) -> None:
        """Remove the thumbnail called `name`, if there is one."""
        with suppress(OSError):  # what stays is found by nobody without its picture
            self._path(name).unlink()

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.webp"


def read_saved(path: Path) -> Image.Image:
    """One of our own pictures. Raises `OSError`, `ValueError` or `Image.DecompressionBombError` for a file that has
    become something else."""
    with Image.open(path, formats=("PNG", "JPEG", "WEBP")) as file:
        file.draft("RGB", (THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))  # a JPEG is decoded no larger than needed
        file.load()
        return file.copy()
