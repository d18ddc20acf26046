"""Limits torch's threads to the CPU quota of the container.

torch starts as many threads as the machine has cores. A container may be limited to a share of them (a free Space has
2 of many). The system enforces the quota by suspending all threads for most of the time, and a matmul then waits for
the slowest thread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch

# Files with the CPU quota and the period of a container, both in microseconds: one file with cgroup v2, two with v1.
CGROUP_CPU_FILES = (
    (Path("/sys/fs/cgroup/cpu.max"),),
    (Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us")),
)


def read_cpu_quota(places: Iterable[tuple[Path, ...]] = CGROUP_CPU_FILES) -> float | None:
    """Returns the CPU quota of the container in cores, None if there is no limit."""
    for files in places:
        try:
            quota, period = " ".join(file.read_text() for file in files).split()
        except (OSError, ValueError):  # not Linux, not in a container, or another format
            continue
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" or -1 means no limit
            return int(quota) / int(period)
    return None


def limit_torch_threads(allowed: float | None) -> None:
    """Limits torch's threads to `allowed` cores, rounded up; None changes nothing."""
    if allowed is not None and allowed < torch.get_num_threads():
        torch.set_num_threads(max(1, math.ceil(allowed)))
