"""The real app in a process of its own, drawing with the toy checkpoint on board, and a real browser to look at it."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Saved
from flux2_studio.outputs.database import Database
from flux2_studio.outputs.history import History
from flux2_studio.outputs.metadata import encode
from flux2_studio.outputs.save import Library
from flux2_studio.record import Record
from flux2_studio.request import Request
from tests.fake_openai import FakeOpenAI, says
from tests.tiny import Toys

ROOT = Path(__file__).resolve().parent.parent.parent
STARTED_IN = 120  # seconds; a busy machine may take long, a broken app ends at once
PATIENCE = 180_000  # milliseconds that expect() waits: a slow machine that does other work takes its time

expect.set_options(timeout=PATIENCE)


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


@pytest.fixture(scope="session")
def language_model() -> Iterator[FakeOpenAI]:
    """A server that enriches prompts, as its `replies` have it."""
    with FakeOpenAI(says("A flat red apple on a yellow background")) as server:
        yield server


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, toys: Toys, language_model: FakeOpenAI) -> Iterator[App]:
    home = tmp_path_factory.mktemp("home")
    log = tmp_path_factory.mktemp("log") / "app.log"
    surroundings = {**environment(home, toys), "FLUX2_OPENROUTER_URL": language_model.url}
    with started(["app.py", "--port"], surroundings, log) as url:
        yield App(url=url, home=home, log=log)


def environment(home: Path, toys: Toys) -> dict[str, str]:
    """That of a studio without a network, with toys for klein 4B and Base 4B."""
    overrides = toys.settings(home, ("klein-4b", "klein-base-4b")).overrides
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


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("The browser tests need Chromium: `make chromium` installs it, or put `chromium` on the PATH.")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield launched
        launched.close()


@pytest.fixture(scope="session")
def warm_context(browser: Browser) -> Iterator[BrowserContext]:
    """One person's browser, which keeps the studio's scripts, compiled: without them a page takes twice as long to
    load. Use `context`, which is that of somebody new."""
    opened = browser.new_context(viewport={"width": 1440, "height": 900})
    opened.set_default_timeout(PATIENCE)
    yield opened
    opened.close()


@pytest.fixture
def context(warm_context: BrowserContext) -> Iterator[BrowserContext]:
    """A browser of which no studio knows, and which remembers nothing of one but its scripts."""
    yield warm_context
    origins = {page.url for page in warm_context.pages if page.url.startswith("http")}
    for page in warm_context.pages:
        page.close()
    warm_context.clear_cookies()
    blank = warm_context.new_page()
    storage = warm_context.new_cdp_session(blank)
    for origin in origins:
        storage.send("Storage.clearDataForOrigin", {"origin": origin, "storageTypes": "all"})
    blank.close()


@pytest.fixture
def open_page(context: BrowserContext, app: App) -> Callable[[], Page]:
    """Opens the studio in a new tab and waits until it can be used."""

    def opened() -> Page:
        page = context.new_page()
        open_studio(page, app.url)
        expect(page.get_by_role("tab", name="Generate")).to_be_visible()
        return page

    return opened


def open_studio(page: Page, url: str) -> None:
    """Go to the studio at `url` and wait until its form can be filled in."""
    page.goto(url)
    expect(page.locator("#generate .run")).to_be_enabled()
    # Its seed is emptied once the page is open: one that was typed before would be gone.
    expect(page.locator("#generate .seed input")).to_have_value("")


@pytest.fixture
def page(open_page: Callable[[], Page]) -> Page:
    return open_page()


@pytest.fixture
def remember(context: BrowserContext, app: App) -> Callable[[str, int], Path]:
    """Puts a picture of a prompt and a seed into the studio's history, as if this browser had made it: to be called
    before its first page is opened. Returns the picture's file."""
    context.request.get(app.url)
    (visitor,) = context.cookies(app.url)
    library = Library(app.home / "outputs")
    history = History(Database(app.home / "studio.sqlite3"), library.folder, app.home / "trash")

    def remembered(prompt: str, seed: int) -> Path:
        request = Request(prompt=prompt, width=128, height=128, seed=seed).resolve(NANO)
        record = Record(request=request, label=NANO.label)
        picture = Image.new("RGB", (128, 128), (seed % 256, 90, 150))
        file = library.save(encode(picture, "png", record).data, request)
        history.add(f"browser:{visitor['value']}", "job", Saved(index=0, image=file, seed=seed, record=record))
        return file

    return remembered
