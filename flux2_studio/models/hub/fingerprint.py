"""The SHA-256 of a checkpoint's weights, by which a picture says what it was drawn with.

A file in the hub's cache is named by it already. Any other is read once; what was found is remembered in a small JSON
file, by path, inode, size and time of change, so that the next start of the studio need not read gigabytes again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_studio.engine.weights.tensor_files import SafetensorsFiles
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.downloads import ProgressCallback

log = logging.getLogger(__name__)

MAX_QUICK_HASH_BYTES = 64 * 2**20  # bytes that are read without asking: a tenth of a second
WEIGHT_HASH_CHUNK_BYTES = 16 * 2**20  # bytes
HASH_PROGRESS_SECONDS = 0.1  # seconds, at least, between two words on how far it is; giving up is noticed as often
_SHA256 = re.compile(r"[0-9a-f]{64}")

FileStamp = tuple[int, int, int]  # inode, bytes, time of change in nanoseconds


class WeightHashes:
    """Hashes of weight files, remembered in `file`. For any thread."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[FileStamp, str]] = {}  # by path; what could not be written down, too

    def get_quick(self, weights: Path, subfolder: str = "") -> str | None:
        """The hash of `weights`, a file or a folder with files (which may be in `subfolder` of it), as long as no more
        than `MAX_QUICK_HASH_BYTES` bytes have to be read for it; else None. Raises `WeightsError` for what cannot be
        read."""
        files = _files(weights, subfolder)
        found = self._lookup(files)
        missing = [file for file in files if file not in found]
        if sum(stamp[1] for stamp in map(_stamp, missing)) > MAX_QUICK_HASH_BYTES:
            return None
        return self._combine_hashes(files, found, _ignore_progress, weights.is_dir())

    def compute(self, weights: Path, progress: ProgressCallback, subfolder: str = "") -> str:
        """As `get_quick`, however much there is to read. `progress` may raise to give up.

        Raises `WeightsError` for what cannot be read, or changes meanwhile.
        """
        files = _files(weights, subfolder)
        return self._combine_hashes(files, self._lookup(files), progress, weights.is_dir())

    def _combine_hashes(
        self, files: Sequence[Path], found: Mapping[Path, str], progress: ProgressCallback, folder: bool
    ) -> str:
        hashes = {**found, **self._hash([file for file in files if file not in found], progress)}
        if not folder:
            return hashes[files[0]]
        lines = sorted(f"{file.name} {sha256}\n" for file, sha256 in hashes.items())
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()

    def _lookup(self, files: Sequence[Path]) -> dict[Path, str]:
        """Of those of `files` that need not be read, by their names or from memory."""
        found = {file: sha256 for file in files if (sha256 := _hash_from_blob_name(file))}
        if len(found) < len(files):
            with self._lock:
                known = {**self._load_saved(), **self._cache}
            for file in files:
                stamp, sha256 = known.get(str(file.absolute()), (None, ""))
                if file not in found and stamp is not None and stamp == _stamp(file):
                    found[file] = sha256
        return found

    def _hash(self, files: Sequence[Path], progress: ProgressCallback) -> dict[Path, str]:
        stamps = {file: _stamp(file) for file in files}
        whole, read, last = sum(size for _, size, _ in stamps.values()), 0, 0.0
        buffer = memoryview(bytearray(min(WEIGHT_HASH_CHUNK_BYTES, whole)))
        hashes = {}
        for file in files:
            digest = hashlib.sha256()
            try:
                with file.open("rb", buffering=0) as opened:
                    while count := opened.readinto(buffer):
                        if time.monotonic() - last >= HASH_PROGRESS_SECONDS:
                            progress("Reading the checkpoint's fingerprint (once)", read / whole)
                            last = time.monotonic()
                        digest.update(buffer[:count])
                        read += count
            except OSError as error:
                raise _unreadable(file, error) from error
            if _stamp(file) != stamps[file]:
                raise WeightsError(f"{file.name} is being written to: try again when it is whole.")
            hashes[file] = digest.hexdigest()
        if hashes:
            self._remember({str(file.absolute()): (stamps[file], sha256) for file, sha256 in hashes.items()})
        return hashes

    def _remember(self, found: Mapping[str, tuple[FileStamp, str]]) -> None:
        """In memory and in the file, with what others have written there meanwhile."""
        with self._lock:
            self._cache.update(found)
            everything = {**self._load_saved(), **self._cache}
            content = {
                path: {"inode": stamp[0], "size": stamp[1], "mtime_ns": stamp[2], "sha256": sha256}
                for path, (stamp, sha256) in sorted(everything.items())
                if path in found or Path(path).exists()
            }
            fresh = self._file.with_name(f"{self._file.name}.{uuid.uuid4().hex[:8]}.tmp")
            try:
                fresh.parent.mkdir(parents=True, exist_ok=True)
                try:
                    fresh.write_text(json.dumps(content, indent=1), "utf-8")
                    fresh.replace(self._file)
                finally:
                    fresh.unlink(missing_ok=True)
            except OSError as error:
                log.warning(
                    "%s cannot be written (%s): checkpoints are read again at the next start", self._file, error
                )

    def _load_saved(self) -> dict[str, tuple[FileStamp, str]]:
        """What the file says; of a damaged one what is whole, which the next hash writes anew."""
        try:
            content = json.loads(self._file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s): it is made anew", self._file, error)
            return {}
        entries = content if isinstance(content, dict) else {}
        found = {path: entry for path, said in entries.items() if (entry := _entry(said)) is not None}
        if not isinstance(content, dict) or len(found) < len(content):
            log.warning("%s is damaged: what it lacks is read again", self._file)
        return found


def _entry(said: Any) -> tuple[FileStamp, str] | None:
    """One file's, as it was written down; None where it is damaged."""
    match said:
        case {"inode": int(inode), "size": int(size), "mtime_ns": int(changed), "sha256": str(sha256)}:
            return ((inode, size, changed), sha256) if _SHA256.fullmatch(sha256) else None
    return None


def _files(weights: Path, subfolder: str) -> list[Path]:
    """The files that have the weights. Raises `WeightsError`."""
    return SafetensorsFiles(weights, subfolder).files if weights.is_dir() else [weights]


def _hash_from_blob_name(file: Path) -> str | None:
    """The hash by which the hub's cache names what `file` is a link to, None for any other file."""
    target = file.resolve()
    repository = target.parent.parent
    in_cache = file.is_symlink() and target.parent.name == "blobs" and repository.name.startswith("models--")
    return target.name if in_cache and _SHA256.fullmatch(target.name) else None


def _stamp(file: Path) -> FileStamp:
    try:
        found = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return found.st_ino, found.st_size, found.st_mtime_ns


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file} cannot be read ({error.strerror or error}): put it back, or download it again.")


def _ignore_progress(text: str, fraction: float | None) -> None:
    pass
