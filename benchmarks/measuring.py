"""What the benchmarks share: arms that take turns, what their times come to, and what they were measured on."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

from flux2_studio import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KeyT = TypeVar("KeyT", bound=Hashable)


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing to time. What `run` returns is let go only after the clock has stopped; `prepare` is not timed."""

    run: Callable[[], Any]
    prepare: Callable[[], Any] = lambda: None

    def time(self) -> float:
        """Seconds of one run."""
        self.prepare()
        began = time.perf_counter()
        kept = self.run()
        seconds = time.perf_counter() - began
        del kept
        return seconds


def interleave(arms: Mapping[KeyT, Arm], rounds: int, warmups: int) -> dict[KeyT, list[float]]:
    """Seconds of each arm in each of `rounds`, which go through them forwards and backwards in turn (A B, B A), so that
    neither a drift of the machine nor who came before favours anyone. Warm-ups are not kept."""
    seconds: dict[KeyT, list[float]] = {name: [] for name in arms}
    for number in range(warmups + rounds):
        for name in list(arms) if number % 2 == 0 else list(arms)[::-1]:
            took = arms[name].time()
            if number >= warmups:
                seconds[name].append(took)
    return seconds


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile in seconds. "A/A": the median of every other run to that of the rest, which says
    how far from 1 a ratio must be to mean anything."""
    tenths = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 9
    rest = seconds[1::2] or seconds
    return {
        "runs": len(seconds),
        "median": statistics.median(seconds),
        "p10": tenths[0],
        "p90": tenths[-1],
        "A/A": statistics.median(seconds[::2]) / statistics.median(rest),
    }


def machine(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """What a result was measured with and on. packages: whose versions matter; null where one is not installed."""
    chosen = torch.device(device)
    gpu: dict[str, Any] = {}
    if chosen.type == "cuda":
        gpu = {"gpu": torch.cuda.get_device_name(chosen), "cuda": torch.version.cuda}
    return {
        "date": date.today().isoformat(),
        "flux2-studio": __version__,
        "python": platform.python_version(),
        **{name: _version(name) for name in packages},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "torch threads": torch.get_num_threads(),
        "device": device,
        **gpu,
    }


def write(report: Mapping[str, Any], name: str) -> Path:
    """`report` as benchmarks/results/`name`; gives the path from the repository's root."""
    path = RESULTS / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path.relative_to(ROOT)


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
