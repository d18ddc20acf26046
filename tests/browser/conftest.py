"""The real app in a process of its own, drawing with the toy checkpoint on board, and a real browser to look at it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Saved
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from flux2_studio.storage.library import OutputLibrary
from tests.browser.pages.history import FOX, OWL, tiles
from tests.browser.pages.masks import SIZE
from tests.browser.steps import end_runs, open_tab
from tests.browser.studio import PATIENCE, ROOT, App, environment, open_studio, started
from tests.fake_openai import FakeOpenAI, says
from tests.loras import write_lora
from tests.tiny import Toys

# Parts of Chromium's own window, of which a page has no use: each new page starts them, which takes a second of CPU
# time. The rest is what Playwright switches off, for the last list of features is the one that counts.
UNUSED = "WebUIOmniboxPopup,WebUIOmniboxAimPopup,MediaRouter,PaintHolding,Translate,HttpsUpgrades,OptimizationHints"

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def language_model() -> Iterator[FakeOpenAI]:
    """A server that enhances prompts, as its `replies` have it."""
    with FakeOpenAI(says("A flat red apple on a yellow background")) as server:
        yield server


@pytest.fixture(scope="session")
def app(tmp_path_factory: pytest.TempPathFactory, toys: Toys, language_model: FakeOpenAI) -> Iterator[App]:
    home = tmp_path_factory.mktemp("home")
    log = tmp_path_factory.mktemp("log") / "app.log"
    surroundings = {**environment(home, toys), "FLUX2_OPENROUTER_URL": language_model.url}
    with started(["app.py", "--port"], surroundings, log) as url:
        yield App(url=url, home=home, log=log)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail("The browser tests need Chromium: `make chromium` installs it, or put `chromium` on the PATH.")
    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", f"--disable-features={UNUSED}"],
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
def open_page(context: BrowserContext, app: App) -> Iterator[Callable[[], Page]]:
    """Opens the studio in a new tab and waits until it can be used."""

    def opened() -> Page:
        page = context.new_page()
        open_studio(page, app.url)
        expect(page.get_by_role("tab", name="Generate")).to_be_visible()
        return page

    yield opened
    if context.request.get(f"{app.url}queue/state").text():  # the runs of a test that failed would hold up the next
        end_runs(opened())


@pytest.fixture
def page(open_page: Callable[[], Page]) -> Page:
    return open_page()


@pytest.fixture
def remember(context: BrowserContext, app: App) -> Callable[[str, int], Path]:
    """Puts a picture of a prompt and a seed into the studio's history, as if this browser had made it: to be called
    before its first page is opened. Returns the picture's file."""
    context.request.get(app.url)
    (visitor,) = context.cookies(app.url)
    library = OutputLibrary(app.home / "outputs")
    history = History(Database(app.home / "studio.sqlite3"), library.folder, app.home / "trash")

    def remembered(prompt: str, seed: int) -> Path:
        request = Request(prompt=prompt, width=128, height=128, seed=seed).resolve(NANO)
        record = Record(request=request, label=NANO.label)
        picture = Image.new("RGB", (128, 128), (seed % 256, 90, 150))
        file = library.save(encode_picture(picture, "png", record).data, request)
        history.add(f"browser:{visitor['value']}", "job", Saved(index=0, image=file, seed=seed, record=record))
        return file

    return remembered


@pytest.fixture
def filled(remember: Callable[[str, int], Path], open_page: Callable[[], Page]) -> Page:
    """A browser's page whose history holds a fox and, newer, an owl."""
    remember(FOX, 11)
    remember(OWL, 12)
    page = open_page()
    open_tab(page, "History")
    expect(tiles(page)).to_have_count(2)
    return page


@pytest.fixture
def fox(tmp_path: Path) -> Path:
    path = tmp_path / "fox.png"
    Image.open(ROOT / "assets" / "examples" / "fox.png").convert("RGB").resize(SIZE).save(path)
    return path


@pytest.fixture
def folder(app: App) -> Iterator[Path]:
    """The LoRAs' folder with two for nano and one for another checkpoint, emptied afterwards."""
    folder = app.home / "loras"
    write_lora(folder / "ink.safetensors", odd=True)
    write_lora(folder / "styles" / "grain.safetensors", seed=1)
    write_lora(folder / "big.safetensors", 4096)
    yield folder
    for file in folder.rglob("*.safetensors"):
        file.unlink()


@pytest.fixture
def opened_in(browser: Browser, app: App) -> Iterator[Callable[..., Page]]:
    contexts: list[BrowserContext] = []

    def opened(locale: str) -> Page:
        context = browser.new_context(viewport={"width": 1440, "height": 900}, locale=locale)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        open_studio(page, app.url)
        return page

    yield opened
    for context in contexts:
        context.close()


@pytest.fixture
def model(language_model: FakeOpenAI) -> Iterator[FakeOpenAI]:
    """The app's language model, which writes `RICH` unless a test has it do something else."""
    language_model.replies[:] = [says("A flat red apple ", "on a yellow background")]
    language_model.asked.clear()
    yield language_model
