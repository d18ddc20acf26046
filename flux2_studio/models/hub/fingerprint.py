"""Computes the SHA-256 of a checkpoint's weights, which identifies the model in a picture's metadata.

A blob in the hub cache has its hash as its name. Any other file is read once. The hash is cached in a small JSON file
by path, inode, size and modification time, so a restarted studio does not read gigabytes again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_studio.engine.weights.tensor_files import SafetensorsFiles
from flux2_studio.errors import WeightsError
from flux2_studio.files.atomic import atomic_write
from flux2_studio.models.hub.downloads import ProgressCallback, ignore_progress

log = logging.getLogger(__name__)

MAX_QUICK_HASH_BYTES = 64 * 2**20  # `get_quick` reads at most this much: about 0.1 s
WEIGHT_HASH_CHUNK_BYTES = 16 * 2**20
HASH_PROGRESS_SECONDS = 0.1  # minimum time between two progress calls, and so between two chances to cancel
_SHA256 = re.compile(r"[0-9a-f]{64}")

FileStamp = tuple[int, int, int]  # inode, size in bytes, modification time in nanoseconds


class WeightHashes:
    """Hashes of weight files, cached in the JSON file `file`. Thread-safe."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lock = threading.Lock()
        self._cache: dict[str, tuple[FileStamp, str]] = {}  # by path; also holds hashes that could not be saved

    def get_quick(self, weights: Path, subfolder: str = "") -> str | None:
        """Returns the hash of `weights`, or None if more than `MAX_QUICK_HASH_BYTES` bytes would have to be read.

        `weights` is a file, or a folder whose files may be in its `subfolder`. Raises `WeightsError` for unreadable
        files.
        """
        files = _list_weight_files(weights, subfolder)
        found = self._lookup(files)
        missing = [file for file in files if file not in found]
        if sum(stamp[1] for stamp in map(_stamp, missing)) > MAX_QUICK_HASH_BYTES:
            return None
        return self._combine_hashes(files, found, ignore_progress, weights.is_dir())

    def compute(self, weights: Path, progress: ProgressCallback, subfolder: str = "") -> str:
        """Returns the hash like `get_quick`, but without the size limit. `progress` may raise to cancel.

        Raises `WeightsError` for files that cannot be read or change during reading.
        """
        files = _list_weight_files(weights, subfolder)
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
        """Returns the hashes of those `files` that need not be read: from blob names or from the cache."""
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
        total, read, last = sum(size for _, size, _ in stamps.values()), 0, 0.0
        buffer = memoryview(bytearray(min(WEIGHT_HASH_CHUNK_BYTES, total)))
        hashes = {}
        for file in files:
            digest = hashlib.sha256()
            try:
                with file.open("rb", buffering=0) as opened:
                    while count := opened.readinto(buffer):
                        if time.monotonic() - last >= HASH_PROGRESS_SECONDS:
                            progress("Reading the checkpoint's fingerprint (once)", read / total)
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

    def _remember(self, new_hashes: Mapping[str, tuple[FileStamp, str]]) -> None:
        """Adds hashes to the cache in memory and to the JSON file, keeping what other processes have written there."""
        with self._lock:
            self._cache.update(new_hashes)
            all_hashes = {**self._load_saved(), **self._cache}
            content = {
                path: {"inode": stamp[0], "size": stamp[1], "mtime_ns": stamp[2], "sha256": sha256}
                for path, (stamp, sha256) in sorted(all_hashes.items())
                if path in new_hashes or Path(path).exists()
            }
            try:
                self._file.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self._file) as out:
                    out.write(json.dumps(content, indent=1).encode())
            except OSError as error:
                log.warning(
                    "%s cannot be written (%s): checkpoints are read again at the next start", self._file, error
                )

    def _load_saved(self) -> dict[str, tuple[FileStamp, str]]:
        """Reads the JSON file. Of a damaged file, returns the valid entries; the next hash rewrites it."""
        try:
            content = json.loads(self._file.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            log.warning("%s cannot be read (%s): it is made anew", self._file, error)
            return {}
        entries = content if isinstance(content, dict) else {}
        found = {path: entry for path, raw_entry in entries.items() if (entry := _parse_entry(raw_entry)) is not None}
        if not isinstance(content, dict) or len(found) < len(content):
            log.warning("%s is damaged: what it lacks is read again", self._file)
        return found


def _parse_entry(raw_entry: Any) -> tuple[FileStamp, str] | None:
    """Parses one entry of the JSON file, None if it is damaged."""
    match raw_entry:
        case {"inode": int(inode), "size": int(size), "mtime_ns": int(changed), "sha256": str(sha256)}:
            return ((inode, size, changed), sha256) if _SHA256.fullmatch(sha256) else None
    return None


def _list_weight_files(weights: Path, subfolder: str) -> list[Path]:
    """Returns the files that contain the weights. Raises `WeightsError`."""
    return SafetensorsFiles(weights, subfolder).files if weights.is_dir() else [weights]


def _hash_from_blob_name(file: Path) -> str | None:
    """Returns the SHA-256 from the blob name if `file` is a link into the hub cache, otherwise None."""
    target = file.resolve()
    repository = target.parent.parent
    in_cache = file.is_symlink() and target.parent.name == "blobs" and repository.name.startswith("models--")
    return target.name if in_cache and _SHA256.fullmatch(target.name) else None


def _stamp(file: Path) -> FileStamp:
    try:
        stat = file.stat()
    except OSError as error:
        raise _unreadable(file, error) from error
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def _unreadable(file: Path, error: OSError) -> WeightsError:
    return WeightsError(f"{file} cannot be read ({error.strerror or error}): put it back, or download it again.")
