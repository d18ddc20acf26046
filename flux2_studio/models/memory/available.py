"""Measures free and total memory, and recognises out-of-memory errors."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

# (folder, limit file, usage file, name of the page cache in memory.stat) of a container: cgroup v2, then v1.
CGROUP_MEMORY_FILES = (
    (Path("/sys/fs/cgroup"), "memory.max", "memory.current", "file"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.usage_in_bytes", "total_cache"),
)


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can still be allocated on `device`."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return free_host_memory()


def reclaimable_bytes(device: torch.device, held: int) -> int:
    """Returns how many of `held` bytes of weights become free if they leave `device`.

    On a CPU, weights may be memory-mapped files, which already count as free: only other memory becomes free.
    """
    process = psutil.Process().memory_info()
    if device.type != "cpu" or not hasattr(process, "shared"):  # psutil has `shared` only on Linux
        return held
    return min(held, process.rss - process.shared)


def total_memory(device: torch.device) -> int:
    """Returns the total bytes of memory of `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return min([psutil.virtual_memory().total, *(limit for limit, _ in read_container_memory())])


def free_host_memory() -> int:
    """Returns the available bytes of main memory, including the page cache."""
    return min([psutil.virtual_memory().available, *(max(0, limit - used) for limit, used in read_container_memory())])


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether `error` means out of memory. Only CUDA has its own exception type for that."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)


def read_container_memory(places: Iterable[tuple[Path, str, str, str]] = CGROUP_MEMORY_FILES) -> list[tuple[int, int]]:
    """Returns (limit, used) in bytes of this process's container, without the page cache; [] without a limit.

    places: as `CGROUP_MEMORY_FILES`.
    """
    containers = []
    for folder, limit_file, usage_file, cache_field in places:
        try:
            limit, used = ((folder / name).read_text().strip() for name in (limit_file, usage_file))
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # not Linux, not in a container, or another format
            continue
        if limit.isdecimal() and used.isdecimal():  # "max" means no limit
            containers.append((int(limit), max(0, int(used) - int(stat.get(cache_field, 0)))))
    return containers
