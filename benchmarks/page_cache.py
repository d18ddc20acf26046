"""What the system keeps of a file in main memory, on Linux: looked at, thrown away, or made whole.

`drop` writes the file out and asks the kernel to forget its pages (posix_fadvise, DONTNEED). The kernel may decline,
does so for pages that anybody has mapped, and on tmpfs there is nothing but memory: hence `cached`, which says what
came of it. What lies below, the disk's own cache or a virtual machine's host's, is out of reach: a cold file is colder
than a warm one, not as cold as after a start of the machine.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from pathlib import Path

import numpy as np

BUFFER = 2**24  # bytes


def available() -> bool:
    """Whether this system can be asked. Others have no such calls, or other ones."""
    return sys.platform == "linux"


def drop(path: Path) -> None:
    """Have the system forget what it keeps of the file."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cached(path: Path) -> float:
    """The share of the file's pages that are in main memory, 0 to 1."""
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE) as mapped:
        pages = np.zeros(-(-len(mapped) // mmap.PAGESIZE), np.uint8)
        start = ctypes.c_char.from_buffer(mapped)
        try:
            address = ctypes.c_void_p(ctypes.addressof(start))
            if libc.mincore(address, ctypes.c_size_t(len(mapped)), ctypes.c_void_p(pages.ctypes.data)) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(path))
        finally:
            del start  # or the mapping could not be closed
        return float((pages & 1).mean())


def read(path: Path) -> int:
    """Read the file front to back into one buffer, as fast as one thread can; its length in bytes."""
    buffer = bytearray(BUFFER)
    length = 0
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            length += count
    return length
