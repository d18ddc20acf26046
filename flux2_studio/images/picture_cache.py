"""Decoded reference pictures, so that each file is decoded once: at upload, not again for the run or the comparison.

A picture is recognised by its content. A file that was hashed before is recognised without reading it: by its inode,
size and time of modification, which a hard link shares (the queue keeps references as hard links).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from flux2_studio.files.hashing import hash_bytes
from flux2_studio.images.lru_cache import LRUCache
from flux2_studio.images.references import (
    LoadedReference,
    decode_reference,
    display_name,
    fit,
    read_reference,
)

MAX_DECODED_BYTES = 256 * 2**20  # seven photos of 12 megapixels
MAX_KNOWN_FILES = 4096  # files whose hash is remembered

FileIdentity = tuple[int, int, int, int]  # device, inode, size in bytes, time of modification in nanoseconds


@dataclass(frozen=True, kw_only=True)
class FittedReference:
    """A reference scaled to a cap. full_size: (width, height) before. notes: what decoding changed. data: the file."""

    image: Image.Image
    full_size: tuple[int, int]
    notes: tuple[str, ...]
    sha256: str
    data: bytes = field(repr=False)


class PictureCache:
    """Loads reference pictures and keeps the decoded ones, up to `max_bytes` of full-size and as much of scaled ones.

    Thread-safe. Decodes one file at a time: a photo can take hundreds of megabytes until it is scaled down. Pictures
    that are in the cache do not wait for that.
    """

    def __init__(self, max_bytes: int = MAX_DECODED_BYTES) -> None:
        self._decoding = threading.Lock()
        self._lock = threading.Lock()  # of the caches below
        self._hashes: LRUCache[FileIdentity, str] = LRUCache(MAX_KNOWN_FILES)
        # The file's name is part of the key because notes and errors mention it.
        self._loaded: LRUCache[tuple[str, str, str], LoadedReference] = LRUCache(max_bytes)
        self._fitted: LRUCache[tuple[str, str, int], FittedReference] = LRUCache(max_bytes)

    def load(self, path: Path, background: str = "white") -> LoadedReference:
        """The picture at `path`, see `load_reference`. The image is shared: do not change it."""
        if (found := self._find_loaded(path, background)) is not None:
            return found
        with self._decoding:
            return self._load(path, background)

    def fitted(self, path: Path, cap_pixels: int) -> FittedReference:
        """The picture at `path` on white, scaled to at most `cap_pixels`, see `fit`. The image is shared.

        Raises `ReferenceImageError`.
        """
        if (found := self._find_fitted(path, cap_pixels)) is not None:
            return found
        with self._decoding:
            if (found := self._find_fitted(path, cap_pixels)) is not None:  # another thread has just made it
                return found
            whole = self._load(path, "white")
            image = fit(whole.image, cap_pixels)
            fitted = FittedReference(
                image=image, full_size=whole.image.size, notes=whole.notes, sha256=whole.sha256, data=whole.data
            )
            key = whole.sha256, display_name(path), cap_pixels
            with self._lock:
                self._fitted.put(key, fitted, len(whole.data) + _decoded_bytes(image))
            return fitted

    def _find_loaded(self, path: Path, background: str) -> LoadedReference | None:
        stamp = _stamp(path)
        with self._lock:
            sha256 = self._hashes.get(stamp) if stamp else None
            return self._loaded.get((sha256, display_name(path), background)) if sha256 else None

    def _find_fitted(self, path: Path, cap_pixels: int) -> FittedReference | None:
        stamp = _stamp(path)
        with self._lock:
            sha256 = self._hashes.get(stamp) if stamp else None
            return self._fitted.get((sha256, display_name(path), cap_pixels)) if sha256 else None

    def _load(self, path: Path, background: str) -> LoadedReference:
        """As `load`, for the thread that holds `_decoding`."""
        if (found := self._find_loaded(path, background)) is not None:
            return found
        stamp = _stamp(path)
        data = read_reference(path)
        key = hash_bytes(data), display_name(path), background
        with self._lock:
            if stamp is not None and stamp == _stamp(path):  # else the file changed while it was read
                self._hashes.put(stamp, key[0], 1)
            found = self._loaded.get(key)
        if found is not None:
            return found
        loaded = decode_reference(data, *key)
        with self._lock:
            self._loaded.put(key, loaded, len(data) + _decoded_bytes(loaded.image))
        return loaded


def _stamp(path: Path) -> FileIdentity | None:
    """What tells whether the file at `path` is one that was read before; None where there is no file."""
    try:
        found = path.stat()
    except (OSError, ValueError):  # ValueError: a NUL in the path
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _decoded_bytes(image: Image.Image) -> int:
    return 3 * image.width * image.height
