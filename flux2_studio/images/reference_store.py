"""Copies of the reference pictures that runs have used, by the hash that a saved picture names them by.

With them the settings in a picture suffice to make it again, wherever the user's own file is by then.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path

from flux2_studio.errors import SaveError

# Of a picture's first bytes: offset, bytes, ending. Enough for those formats that `images/references.py` reads.
IMAGE_SIGNATURES = (
    (0, b"\x89PNG\r\n\x1a\n", ".png"),
    (0, b"\xff\xd8\xff", ".jpg"),
    (8, b"WEBP", ".webp"),
    (4, b"ftypavi", ".avif"),
    (0, b"GIF8", ".gif"),
    (0, b"BM", ".bmp"),
    (0, b"II", ".tif"),
    (0, b"MM", ".tif"),
)
UNKNOWN_SUFFIX = ".bin"
HASH_CHUNK_BYTES = 1 << 20  # bytes


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
        sha256 = hashlib.sha256(data).hexdigest()
        target = self.folder / sha256[:2] / f"{sha256}{_ending(data)}"
        try:
            if target.is_file() and _sha256(target) == sha256:  # one that was altered is replaced
                return sha256
            target.parent.mkdir(parents=True, exist_ok=True)
            handle, hidden = tempfile.mkstemp(dir=target.parent, prefix=".", suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(data)
                Path(hidden).replace(target)
            except BaseException:
                with suppress(OSError):
                    Path(hidden).unlink()
                raise
        except OSError as error:
            raise SaveError(self._reason(error)) from error
        return sha256

    def find(self, sha256: str) -> Path | None:
        """The kept file with this hash, which comes from anywhere; None where there is none, or it was altered."""
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            return None
        for ending in (*dict.fromkeys(ending for _, _, ending in IMAGE_SIGNATURES), UNKNOWN_SUFFIX):
            path = self.folder / sha256[:2] / f"{sha256}{ending}"
            if path.is_file() and _sha256(path) == sha256:
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


def _ending(data: bytes) -> str:
    return next(
        (ending for offset, start, ending in IMAGE_SIGNATURES if data.startswith(start, offset)), UNKNOWN_SUFFIX
    )


def _sha256(path: Path) -> str:
    """Of what is in the file; "" where it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(HASH_CHUNK_BYTES):
                digest.update(chunk)
    except OSError:
        return ""
    return digest.hexdigest()
