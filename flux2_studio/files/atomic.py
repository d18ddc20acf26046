"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

PRIVATE = 0o600  # for the owner alone
SHARED = 0o666  # as the user's umask says


@contextmanager
def atomic_write(path: Path, mode: int = PRIVATE) -> Iterator[BinaryIO]:
    """Open `path` for writing. It appears, or replaces the file of that name, when the block ends without an error.

    Until then, and after a crash, other threads and processes see what was there before. The last of several writers
    wins. mode: permissions of the new file, `PRIVATE` or `SHARED`. Raises `OSError`; a failed write leaves nothing.
    """
    hidden = path.with_name(f".{uuid.uuid4().hex}.part")
    descriptor = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), mode)
    try:
        with os.fdopen(descriptor, "wb") as file:  # Windows renames only closed files; closing fails on a full disk
            yield file
        hidden.replace(path)
    except BaseException:
        with suppress(OSError):
            hidden.unlink()
        raise
