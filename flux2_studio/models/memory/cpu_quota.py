"""How many processors a computation may keep busy.

torch takes as many threads as the machine has cores. A container may have a share of those only (a free Space has 2 of
many), which the system enforces by stopping all threads for most of the time: a product then waits for the slowest.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

# Where Linux says which part of its time a container may compute: microseconds of computing in a period of so many, by
# the newer interface in one file, by the older one in two.
CGROUP_CPU_FILES = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def read_cpu_quota(places: Iterable[tuple[Path, ...]] = CGROUP_CPU_FILES) -> float | None:
    """The processors that the container may keep busy, on average; None where there is no limit."""
    for files in places:
        try:
            computing, period = " ".join(file.read_text() for file in files).split()
        except (OSError, ValueError):  # not Linux, not in a container, or something else altogether
            continue
        if computing.isdecimal() and period.isdecimal() and int(period):  # "max" or -1 is none
            return int(computing) / int(period)
    return None


def limit_torch_threads(allowed: float | None) -> None:
    """Have torch compute with no more threads than the container's share has processors."""
    if allowed is not None and allowed < torch.get_num_threads():
        torch.set_num_threads(max(1, math.ceil(allowed)))
