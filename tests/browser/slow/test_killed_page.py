"""A studio that is killed: what it was at goes on in the next one, and nobody need click for it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, expect

from tests.browser.steps import (
    EXAMPLES,
    choose_checkpoint,
    expect_explored,
    explore,
    explored_pictures,
    open_tab,
    press,
    result,
    row,
    run,
    run_on,
    set_number,
    settings,
    stop,
    upload,
    write,
)
from tests.browser.studio import ROOT, STARTED_IN, answers, environment, free_port, open_studio
from tests.tiny import Toys


class Restartable:
    """A studio under `home` that can be killed without a warning, and started again at the same address."""

    def __init__(self, home: Path, toys: Toys) -> None:
        self.home = home
        self.log = home / "app.log"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}/"
        self._environment = environment(home, toys)
        self._running: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        if self._running is not None:
            return
        command = [sys.executable, "app.py", "--port", str(self._port)]
        with self.log.open("ab") as log:
            running = subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)
        self._running = running
        deadline = time.monotonic() + STARTED_IN
        while not answers(self.url):
            assert running.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.2)

    def kill(self) -> None:
        if self._running is not None:
            self._running.send_signal(signal.SIGKILL)
            self._running.wait(30)
            self._running = None


@pytest.fixture(scope="module")
def restartable(tmp_path_factory: pytest.TempPathFactory, toys: Toys) -> Iterator[Restartable]:
    made = Restartable(tmp_path_factory.mktemp("home"), toys)
    yield made
    made.kill()


@pytest.fixture
def studio(restartable: Restartable) -> Restartable:
    """One that runs, at nothing."""
    restartable.start()
    return restartable


def test_runs_go_on_where_they_were(context: BrowserContext, studio: Restartable) -> None:
    page = context.new_page()
    open_studio(page, studio.url)
    run_on(page)
    choose_checkpoint(page, "Nano (a toy, on board)")
    open_tab(page, "Edit")
    upload(page, "edit", EXAMPLES / "fox.png")
    expect(page.locator("#edit")).to_contain_text("As image 1: 128 x 128 pixels")
    write(page, "edit", "make the background yellow")
    run(page, "edit")
    expect(page.locator("#queue li")).to_have_count(2)
    studio.kill()
    shutil.rmtree(studio.home / "uploads")  # as it may be, a day later
    studio.start()
    # The page comes back by itself, and the run that waited is done.
    expect(row(page, "a 3D owl")).to_contain_text("The studio ended before it was done: run it again.")
    expect(page.locator("#settings")).to_contain_text("make the background yellow")
    expect(result(page)).to_be_visible()
    assert settings(page)["References"] == "fox.png"
    press(page, "a 3D owl", "Run again")
    expect(page.locator("#progress")).to_contain_text("Step")
    expect(page.locator("#queue li.running")).to_contain_text("a 3D owl")
    expect(page.locator("#queue li")).to_have_count(1)
    stop(page)
    expect(page.locator("#queue")).to_be_hidden()
    assert "Traceback" not in studio.log.read_text()


def test_an_exploration_goes_on_by_itself(context: BrowserContext, studio: Restartable) -> None:
    def saved() -> int:
        return len(list((studio.home / "outputs").glob("20*/*.png")))

    already = saved()
    page = context.new_page()
    open_studio(page, studio.url)
    choose_checkpoint(page, "Nano Base (a toy, on board)")
    steps = page.locator("#generate .steps input[type=number]")
    expect(steps).to_have_value("20")  # the form is laid out for it
    set_number(steps, 60)  # the rest is not done before it is killed
    write(page, "generate", "a lemon")
    open_tab(page, "Explore")
    set_number(page.locator("#explore-seeds input[type=number]"), 4)
    explore(page)
    expect(explored_pictures(page)).not_to_have_count(0)
    page.close()
    studio.kill()
    (notebook,) = (studio.home / "explorations").glob("*.json")
    before = json.loads(notebook.read_text())
    assert before["going"] and 0 < len(before["done"]) < 4
    studio.start()
    page = context.new_page()
    open_studio(page, studio.url)
    open_tab(page, "Explore")
    expect_explored(page, 4)
    expect(page.locator("#explore-more")).to_be_hidden()
    expect(page.locator("#queue li")).to_have_count(0)  # nothing of it is left over, to be run again
    after = json.loads(notebook.read_text())
    assert before["done"].items() <= after["done"].items() and not after["going"]
    assert saved() == already + 4, "none was made twice"
    assert "Traceback" not in studio.log.read_text()
