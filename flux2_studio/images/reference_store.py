"""Copies of the reference pictures that runs have used, by the hash that a saved picture names them by.

With them the settings in a picture suffice to make it again, wherever the user's own file is by then.
"""

from __future__ import annotations

import errno
import re
from contextlib import suppress
from pathlib import Path

from flux2_studio.errors import SaveError
from flux2_studio.files.atomic import atomic_write
from flux2_studio.files.hashing import hash_bytes, hash_file
from flux2_studio.files.picture_types import PICTURE_SUFFIXES, detect_picture_type

UNKNOWN_SUFFIX = ".bin"


class ReferenceStore:
    """The references below `folder`: `ab/<sha256>.png`, under the first two digits of their hash.

    A file is there whole or not at all, and never changes. Several threads and processes may keep at once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, data: bytes) -> str:
        """Keep the file with these bytes, and return its SHA-256 in hexadecimal.

        Raises `SaveError` where it cannot be written; nothing is left behind then.
        """
        sha256, found = hash_bytes(data), detect_picture_type(data)
        target = self.folder / sha256[:2] / f"{sha256}{found.suffix if found else UNKNOWN_SUFFIX}"
        try:
            if target.is_file() and hash_file(target) == sha256:  # an altered copy is replaced
                return sha256
            target.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(target) as file:
                file.write(data)
        except OSError as error:
            raise SaveError(self._reason(error)) from error
        return sha256

    def find(self, sha256: str) -> Path | None:
        """Return the kept file with this hash, or None if there is none or it was altered. `sha256` is untrusted."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            return None
        for suffix in (*PICTURE_SUFFIXES, UNKNOWN_SUFFIX):
            path = self.folder / sha256[:2] / f"{sha256}{suffix}"
            with suppress(OSError):
                if path.is_file() and hash_file(path) == sha256:
                    return path
        return None

    def _reason(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"There is no space left to keep a copy of the reference in {self.folder}: free some, or set "
                f"FLUX2_HOME to a folder on another drive."
            )
        return (
            f"A copy of the reference could not be kept in {self.folder} ({error.strerror or error}): allow writing "
            f"there, or set FLUX2_HOME to a folder of your own."
        )
