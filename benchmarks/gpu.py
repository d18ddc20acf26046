"""Everything that wants a GPU, in one call: its tests, then the times of every model beside diffusers.

    make bench-gpu [ARGS="--only klein-4b dev --budget 300"]

Each job is a process of its own, so that the next has all of the memory, and writes its report as it goes: whatever
ends the call, what was measured until then lies in the folder. --budget are seconds; no job begins that could not get
far in what is left of them, no case begins after them, and what was left out is told. The jobs stand in the order of
their worth; compiling, which is slow to begin, comes last.

    tests               tests/gpu
    klein-4b            transformer, text encoder and decoder: three sizes, up to four references, 16 and 8 bits
    klein-9b            transformer and text encoder, 1024 x 1024
    dev                 one evaluation, where memory allows
    klein-4b-compiled   the transformer beside compiled diffusers

Writes gpu.json (what ran), gpu.log (all that was printed) and `benchmarks.core`'s reports. NOTES.md says how a machine
without a network is brought what it needs. --trial takes small models, to see whether all of it runs.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from benchmarks.core import PACKAGES
from benchmarks.measuring import RESULTS, ROOT, Deadline, machine, write

BUDGET = 540.0  # seconds
GRACE = 20.0  # seconds after the budget, in which a case that was begun may end
CARD = "name,driver_version,memory.total,clocks.max.sm,power.limit"
TRIAL = ("--size", "small", "--blocks", "1", "--cases", "32", "32+1", "--rounds", "1", "--warmups", "0")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One process. arguments: of `benchmarks.core`, or none for the tests. least: seconds with which to begin it."""

    name: str
    arguments: tuple[str, ...] = ()
    least: float

    def command(self, device: str, out: Path, left: float, *, trial: bool) -> list[str]:
        if not self.arguments:
            return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu"]
        common = ("--device", device, "--out", str(out), "--budget", f"{left:.0f}")
        small = (*TRIAL, "--label", self.name) if trial else ()
        return [sys.executable, "-m", "benchmarks.core", *self.arguments, *common, *small]


def _core(name: str, least: float, arguments: str) -> Job:
    return Job(name=name, least=least, arguments=tuple(arguments.split()))


JOBS = (
    Job(name="tests", least=30),
    _core(
        "klein-4b",
        60,
        "--size klein-4b --stages transformer text decoder --cases 1024 512 1024+1 1024+2 1024+4 2048"
        " --compile-ours --held fp8 int8 --limit 15",
    ),
    _core(
        "klein-9b",
        45,
        "--size klein-9b --stages transformer text --cases 1024 --compile-ours --held fp8 int8 --limit 15",
    ),
    _core("dev", 45, "--size dev --cases 1024 --only-evaluations --compile-ours --held fp8 --limit 15"),
    _core(
        "klein-4b-compiled",
        90,
        "--size klein-4b --cases 1024 512 --compile-ours --compiled --compile-budget 120 --limit 15 --label compiled",
    ),
)


def main(arguments: Sequence[str] | None = None, jobs: Sequence[Job] = JOBS, grace: float = GRACE) -> None:
    chosen = _parser(jobs).parse_args(arguments)
    deadline = Deadline.within(chosen.budget)
    out = chosen.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    told: dict[str, Any] = {"machine": machine("cpu", PACKAGES), "card": card(), "jobs": {}}
    for key, value in {**told["machine"], "card": told["card"]}.items():
        print(f"{key:16}{value}")
    with (out / "gpu.log").open("w", encoding="utf-8") as log:
        for job in jobs:
            if chosen.only and job.name not in chosen.only:
                continue
            print(f"\n=== {job.name}: {deadline.left:.0f} s are left ===", flush=True)
            if deadline.left < job.least:
                told["jobs"][job.name] = {"result": f"left out: it wants {job.least:.0f} s"}
            else:
                command = job.command(chosen.device, out, deadline.left, trial=chosen.trial)
                began = time.monotonic()
                result = run(command, deadline.left + grace, log)
                told["jobs"][job.name] = {
                    "command": " ".join(command[1:]),
                    "seconds": round(time.monotonic() - began, 1),
                    "result": result,
                }
            write(told, "gpu.json", out)
    print()
    for name, what in told["jobs"].items():
        print(f"{name:20}{what.get('seconds', 0):8.1f} s  {what['result']}")
    if any(what["result"].startswith("failed") for what in told["jobs"].values()):
        raise SystemExit(1)


def run(command: Sequence[str], limit: float, log: TextIO) -> str:
    """How `command` ended, which gets `limit` seconds. What it prints is printed, and goes to `log`, line by line."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    assert process.stdout is not None
    # Beside the waiting: processes that a stopped one leaves behind could hold the pipe open.
    reader = threading.Thread(target=_pass_on, args=(process.stdout, log), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    finally:
        process.kill()
        reader.join(timeout=5)
    return "done" if status == 0 else f"failed with status {status}"


def _pass_on(lines: Iterable[str], log: TextIO) -> None:
    for line in lines:
        print(line, end="", flush=True)
        log.write(line)
        log.flush()


def card() -> str | None:
    """What the driver says of the GPUs; None where there is no driver."""
    if shutil.which("nvidia-smi") is None:
        return None
    asked = ["nvidia-smi", f"--query-gpu={CARD}", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()


def _parser(jobs: Sequence[Job]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description="All tests and benchmarks that want a GPU.")
    add = parser.add_argument
    names = [job.name for job in jobs]
    add("--only", choices=names, nargs="+", help="these jobs (default: all)")
    add("--budget", type=float, default=BUDGET, metavar="SECONDS", help=f"for all jobs (default: {BUDGET:.0f})")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where files go (default: benchmarks/results)")
    add("--device", default="cuda")
    add("--trial", action="store_true", help="with small models, to see whether it runs")
    return parser


if __name__ == "__main__":
    main()
