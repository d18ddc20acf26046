"""Saved pictures on disk: one folder per day, a readable name for each file, and no half-written or overwritten
files."""

from __future__ import annotations

import errno
import re
import secrets
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryFile

from flux2_studio.errors import SaveError
from flux2_studio.request import ImageFormat, Request

FORMAT_SUFFIXES: Mapping[ImageFormat, str] = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}


class OutputLibrary:
    """The pictures under `folder`, named `YYYY-MM-DD/HHMMSS-checkpoint-seed-token.png` (or .jpg, .webp) in local time
    by `now`.

    `token` makes the name unguessable, because the page serves a picture to anyone who knows its path. Several threads
    and processes may save at once.
    """

    def __init__(
        self,
        folder: Path,
        now: Callable[[], datetime] = datetime.now,
        token: Callable[[], str] = lambda: secrets.token_hex(5),
    ) -> None:
        self.folder = folder
        self._now = now
        self._token = token

    def check_writable(self) -> None:
        """Raises `SaveError` if nothing can be saved. Called before a run, so that no long run is lost."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with TemporaryFile(dir=self.folder) as file:
                file.write(b"may I?")
        except OSError as error:
            raise SaveError(self._reason(error)) from error

    def save(self, data: bytes, request: Request) -> Path:
        """Write `data`, the finished file of the picture of `request` (resolved, with the picture's own seed).

        Returns the file's path. Raises `SaveError` if it cannot be written; nothing is left behind then.
        """
        moment = self._now()
        checkpoint = re.sub(r"[^\w.-]+", "-", request.checkpoint or "")
        stem = f"{moment:%H%M%S}-{checkpoint}-{request.seed}"
        try:
            day = self.folder / f"{moment:%Y-%m-%d}"
            day.mkdir(parents=True, exist_ok=True)
            while True:  # until a name is free; in practice the first one is
                target = day / f"{stem}-{self._token()}{FORMAT_SUFFIXES[request.format]}"
                with suppress(FileExistsError):
                    _write_new(target, data)
                    return target
        except OSError as error:
            raise SaveError(self._reason(error)) from error

    def _reason(self, error: OSError) -> str:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return (
                f"There is no space left to save the picture in {self.folder}: free some, or set FLUX2_HOME to a "
                f"folder on another drive."
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return (
                f"The picture may not be saved in {self.folder}: allow writing there, or set FLUX2_HOME to a folder "
                f"of your own."
            )
        return (
            f"The picture could not be saved in {self.folder} ({error.strerror or error}): set FLUX2_HOME to a folder "
            f"that can be written."
        )


def _write_new(target: Path, data: bytes) -> None:
    """Write `target` atomically. Raises `FileExistsError` if the name is taken.

    Creating the hidden file beside it reserves the name: only then is checking for `target` free of races, so the final
    rename cannot overwrite a picture.
    """
    hidden = target.with_name(f".{target.name}.part")
    file = hidden.open("xb")
    try:
        with file:  # Windows renames only closed files; closing fails on a full disk
            if target.exists():
                raise FileExistsError(target)
            file.write(data)
        hidden.replace(target)
    except BaseException:
        with suppress(OSError):
            hidden.unlink()
        raise
