"""How much memory there is, and how an error says that there is none left."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

# Where Linux says what a container may have, what it has, and how much of that is files kept for speed: the newer
# interface, then the older one.
CGROUP_MEMORY_FILES = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_host_memory()


def reclaimable_bytes(device: torch.device, held: int) -> int:
    """How many of the `held` bytes of weights would become free if they left `device`.

    On a processor they may be mapped from their files, and count as free already: only memory of no file comes back.
    """
    process = psutil.Process().memory_info()
    if device.type != "cpu" or not hasattr(process, "shared"):  # which only Linux tells
        return held
    return min(held, process.rss - process.shared)


def total_memory(device: torch.device) -> int:
    """Bytes that `device` has, in use or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([psutil.virtual_memory().total, *(limit for limit, _ in read_container_memory())])


def free_host_memory() -> int:
    """Bytes of main memory that can still be had, files that the system keeps in it for speed included."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in read_container_memory())])


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device's memory is used up; only CUDA has an exception of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def read_container_memory(places: Iterable[tuple[Path, str, str, str]] = CGROUP_MEMORY_FILES) -> list[tuple[int, int]]:
    """(limit, used) in bytes of the container that this process is in; [] where there is none or no limit.

    places: folders and names of the files that say so, and what files kept for speed are called in memory.stat.
    """
    found = []
    for folder, limit, used, files in places:
        try:
            most, now = ((folder / name).read_text().strip() for name in (limit, used))
            said = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not Linux, not in a container, or something else altogether
            continue
        if most.isdecimal() and now.isdecimal():  # "max" is none
            found.append((int(most), max(0, int(now) - int(said.get(files, 0)))))
    return found
