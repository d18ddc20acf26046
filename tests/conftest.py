"""Markers, limits and fixtures for all tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

from tests.reporting import RESULTS, Report

if TYPE_CHECKING:
    from tests.tiny import Toys

TESTS = Path(__file__).resolve().parent

# A test gets the marker of every folder on its path that is named here: tests/browser/slow gives `browser` and `slow`.
MARKERS = {
    "slow": "belongs to `make test-all` alone",
    "browser": "drives the page in Chromium; repeated at most twice when it fails, and every repeat is listed",
    "process": "starts Python anew",
    "gpu": "needs a GPU that CUDA runs on",
}
# Seconds that one test may take, its fixtures included. Far above what any needs, for machines that do other work: a
# test that strikes the limit hangs, and the stacks of all threads say where.
LIMITS = {"slow": 1200, "browser": 600, "process": 600}
LIMIT = 300
BROWSER_REPEATS = 2

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the processes that a test starts: a worker has about one core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

# Property tests name no number of examples themselves. `quick` tries the same few each time, `full` looks for new ones.
hypothesis.settings.register_profile("quick", max_examples=20, deadline=None, derandomize=True, database=None)
hypothesis.settings.register_profile("full", max_examples=200, deadline=None)
hypothesis.settings.load_profile("quick")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, default=RESULTS, metavar="FOLDER", help="where times and repeats are kept")


def pytest_configure(config: pytest.Config) -> None:
    for name, meaning in MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    if not hasattr(config, "workerinput"):  # a worker of pytest-xdist reports to the process that started it
        config.pluginmanager.register(Report(config))


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by these markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        names = [name for name in item.path.relative_to(TESTS).parts if name in MARKERS]
        for name in names:
            item.add_marker(name)
        item.add_marker(pytest.mark.timeout(max([LIMIT, *(LIMITS.get(name, 0) for name in names)])))
        if "browser" in names:
            item.add_marker(pytest.mark.flaky(reruns=BROWSER_REPEATS))
    # The longest files first, so that no worker is left with one of them at the end.
    items.sort(key=lambda item: not (item.get_closest_marker("browser") or item.get_closest_marker("process")))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keeps the tests of a file in one worker, which then makes what they share once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by the number of tests, the longest files would come last
    return ByFile(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Keeps what the imports left out of later garbage collections: looking through it takes most of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """The toy checkpoints, written once for each worker. Their files are shared: copy them before you change them."""
    import torch

    from tests.tiny import Toys  # takes seconds to import, and most tests do without

    torch.set_num_threads(1)  # toys are too small for more: threads would only wait for each other
    return Toys(tmp_path_factory.mktemp("toys"))


@pytest.fixture(scope="session", autouse=True)
def gradio_files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Gradio copies files into a folder of this run: its own is shared by all users of a machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        yield
