"""A studio in a process of its own: how it is started, and how a page of it is opened."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from tests.tiny import Toys

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED_IN = 120  # seconds; a busy machine may take long, a broken app ends at once
PATIENCE = 90_000  # milliseconds that expect() waits: a slow machine that does other work takes its time


@dataclass(frozen=True, kw_only=True)
class App:
    url: str
    home: Path
    log: Path

    def pictures(self) -> list[Path]:
        """The saved pictures, oldest first."""
        return sorted((self.home / "outputs").rglob("*.png"), key=lambda path: path.stat().st_mtime_ns)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, toys: Toys) -> dict[str, str]:
    """That of a studio without a network, with toys for klein 4B and Base 4B."""
    overrides = toys.settings(home, ("klein-4b", "klein-base-4b")).path_overrides
    # OMP_NUM_THREADS: what is set for the tests' own process is not meant for a studio that a person waits for.
    given = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    return {
        **{name: value for name, value in given.items() if not name.startswith(("FLUX2_", "GRADIO_"))},
        **{name: str(path) for name, path in overrides.items()},
        "FLUX2_HOME": str(home),
        "FLUX2_DEVICE": "cpu",
        "HF_HUB_OFFLINE": "1",
    }


@contextmanager
def started(arguments: list[str], environment: dict[str, str], log: Path) -> Iterator[str]:
    """The address of a studio that `python *arguments PORT` starts; what it writes goes to `log`."""
    port = free_port()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *arguments, str(port)], cwd=ROOT, env=environment, stdout=output, stderr=output
        )
    url = f"http://127.0.0.1:{port}/"
    try:
        deadline = time.monotonic() + STARTED_IN
        while not answers(url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the studio does not answer:\n{log.read_text()}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(STARTED_IN)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            pytest.fail(f"the studio does not end:\n{log.read_text()}")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def open_studio(page: Page, url: str) -> None:
    """Go to the studio at `url` and wait until its form can be filled in."""
    page.goto(url)
    page.wait_for_function(
        "() => document.querySelector('#generate .run:not([disabled])')", polling=100, timeout=PATIENCE
    )
    expect(page.locator("#generate .run")).to_be_enabled()
    # Its seed is emptied once the page is open: one that was typed before would be gone.
    expect(page.locator("#generate .seed input")).to_have_value("")
