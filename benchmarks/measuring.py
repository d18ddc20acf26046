"""What the benchmarks share: arms that take turns, what their times come to, and what they were measured on."""

from __future__ import annotations

import importlib.util
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
from torch.profiler import ProfilerActivity, profile

from flux2_studio import __version__

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
KeyT = TypeVar("KeyT", bound=Hashable)
FEWEST = 5  # runs of an arm, where a limit leaves it fewer than were asked for


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


def wait(device: torch.device) -> None:
    """Return when the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def time_on(
    device: torch.device,
    works: Mapping[KeyT, Callable[[], Any]],
    *,
    rounds: int,
    warmups: int,
    limit: float | None = None,
) -> dict[KeyT, dict[str, Any]]:
    """The `summary` of each of `works`, which take turns, from its call until `device` has finished with it. At least
    two runs of each come before. With that:

    first: seconds of the very first run, which compiles what is compiled.
    events: on CUDA, the summary of what lies between two events around the work. Where the device waits for the host,
    so do the events; what the host does before the first kernel and after the last is not in them.
    activations, bytes: on CUDA, the most that one run takes beside what was there.

    limit: about how many seconds all rounds may take. Where that leaves fewer than `rounds`, there are fewer.
    """
    arms = {name: _OnDevice(work, device) for name, work in works.items()}
    firsts = {name: arm.time() for name, arm in arms.items()}
    began = time.perf_counter()
    taken = {name: arm.activations() for name, arm in arms.items()}
    once = time.perf_counter() - began
    if limit is not None:
        rounds = min(rounds, max(FEWEST, int(limit / once)))
    turns = {name: Arm(run=arm.run, prepare=arm.prepare) for name, arm in arms.items()}
    seconds = interleave(turns, rounds, max(0, warmups - 2))
    figures: dict[KeyT, dict[str, Any]] = {}
    for name, arm in arms.items():
        figures[name] = {**summary(seconds[name]), "first": firsts[name]}
        if device.type == "cuda":
            figures[name] |= {"events": summary(arm.by_events()[-rounds:]), "activations, bytes": taken[name]}
    return figures


class _OnDevice:
    """`work`, done when `device` has finished with it."""

    def __init__(self, work: Callable[[], Any], device: torch.device) -> None:
        self._work = work
        self._device = device
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def prepare(self) -> None:
        wait(self._device)

    def run(self) -> Any:
        if self._device.type != "cuda":
            out = self._work()
        else:
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            before.record()
            out = self._work()
            after.record()
            self._events.append((before, after))
        wait(self._device)
        return out

    def time(self) -> float:
        return Arm(run=self.run, prepare=self.prepare).time()

    def by_events(self) -> list[float]:
        """Seconds of each run, asked for when no clock runs."""
        return [before.elapsed_time(after) / 1000 for before, after in self._events]

    def activations(self) -> int:
        """Bytes that one run allocates at most, where CUDA counts them."""
        if self._device.type != "cuda":
            self.run()
            return 0
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        self.run()
        return torch.cuda.max_memory_allocated(self._device) - before


def longest_kernels(work: Callable[[], Any], most: int = 12) -> dict[str, float]:
    """Seconds in all, by kernel, of those that `work` keeps a GPU busy with for longest."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    ran = [event for event in seen.key_averages() if event.device_type.name == "CUDA"]
    ran.sort(key=lambda event: event.self_device_time_total, reverse=True)
    return {event.key: event.self_device_time_total / 1e6 for event in ran[:most]}


@dataclass(frozen=True)
class Deadline:
    """When nothing new is to be begun. at: on `time.monotonic`'s clock, None for never."""

    at: float | None = None

    @classmethod
    def within(cls, seconds: float | None) -> Deadline:
        return cls(None if seconds is None else time.monotonic() + seconds)

    @property
    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.at is None else self.at - time.monotonic()


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


def write(report: Mapping[str, Any], name: str, folder: Path = RESULTS) -> Path:
    """`report` as `name` in `folder`; gives the path, from the repository's root where it lies below it."""
    path = folder.resolve() / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
