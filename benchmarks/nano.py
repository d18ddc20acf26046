"""Times the checkpoint on board through `Studio.generate`, as a user would wait for it: from request to saved file.

    make bench [ARGS="--runs 20 --page"]

Prints a table and writes benchmarks/results/nano.json with the versions and the machine that it was measured on. The
very first run, which loads the weights, is told apart; each case then warms up once before it is timed. Previews are
on, because the page has them on.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.measuring import ROOT, machine, write
from flux2_studio.events import Preview, Result
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio

PACKAGES = ("torch", "transformers", "gradio", "pillow")
PAGE_PATIENCE = 120.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Run:
    """Seconds from the request to the first preview and to the saved picture."""

    first_preview: float
    total: float
    image: Path


def time_run(studio: Studio, request: Request) -> Run:
    began = time.perf_counter()
    first_preview = None
    for event in studio.generate(request):
        if isinstance(event, Preview) and first_preview is None:
            first_preview = time.perf_counter() - began
        if isinstance(event, Result):
            assert first_preview is not None
            return Run(first_preview=first_preview, total=time.perf_counter() - began, image=event.images[0])
    raise AssertionError("a run must end with a Result")


def time_case(studio: Studio, request: Request, runs: int) -> dict[str, Any]:
    time_run(studio, request)
    warm = [time_run(studio, request) for _ in range(runs)]
    totals = sorted(run.total for run in warm)
    return {
        "runs": runs,
        "median": statistics.median(totals),
        "fastest": totals[0],
        "slowest": totals[-1],
        "first preview": statistics.median(run.first_preview for run in warm),
    }


def time_page(home: Path) -> float:
    """Seconds from starting app.py until its page answers."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    began = time.perf_counter()
    app = subprocess.Popen(
        [sys.executable, "app.py", "--port", str(port)],
        cwd=ROOT,
        env={**os.environ, "FLUX2_HOME": str(home)},
        stdout=subprocess.DEVNULL,
    )
    try:
        while time.perf_counter() - began < PAGE_PATIENCE:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
                    return time.perf_counter() - began
            except (urllib.error.URLError, TimeoutError):
                if app.poll() is not None:
                    raise SystemExit(f"app.py ended with code {app.returncode}") from None
                time.sleep(0.1)
        raise SystemExit(f"app.py did not answer within {PAGE_PATIENCE:.0f} s")
    finally:
        app.terminate()
        app.wait()


def main() -> None:
    options = argparse.ArgumentParser(prog="make bench", description="Time the checkpoint on board.")
    options.add_argument("--runs", type=int, default=10, help="warm runs of each case (default: 10)")
    options.add_argument("--page", action="store_true", help="also time the start of the page")
    options.add_argument("--device", default="cpu", help="default: cpu, which every machine has")
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        studio = Studio(Settings(home=home, default_checkpoint="nano", device=chosen.device))
        fox = Request(prompt="a fox on a pink background", seed=1)
        first = time_run(studio, fox)
        both = (first.image, first.image)
        cases = {
            "128 x 128": fox,
            "256 x 256": replace(fox, width=256, height=256),
            "512 x 512": replace(fox, width=512, height=512),
            "edit, 128 x 128": replace(fox, prompt="make the background blue", references=both[:1]),
            "two references, 128 x 128": replace(
                fox, prompt="the object of image 1 on the background of image 2", references=both
            ),
        }
        timed = {name: time_case(studio, request, chosen.runs) for name, request in cases.items()}
        page = time_page(home) if chosen.page else None

    columns = ("median", "fastest", "slowest", "first preview")
    print(f"{'nano, 4 steps, seconds':30}" + "".join(f"{column:>15}" for column in columns))
    for name, case in timed.items():
        print(f"{name:30}" + "".join(f"{case[column]:15.2f}" for column in columns))
    print(f"{'first run, loading included':30}{first.total:15.2f}")
    if page is not None:
        print(f"{'page answers after':30}{page:15.2f}")
    report = {
        "machine": machine(chosen.device, PACKAGES),
        "seconds": timed,
        "first run, loading included": first.total,
        "page answers after": page,
    }
    print(f"written to {write(report, 'nano.json')}")


if __name__ == "__main__":
    main()
