"""Fixtures that every test may use."""

from __future__ import annotations

import gc
import os
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.tiny import Toys

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is imported, and for the processes that a test starts: a worker has about one core.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one worker, which then makes what they share once."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return str(nodeid.partition("::")[0])

    config.option.loadscopereorder = False  # by the number of tests, the longest files would come last
    return ByFile(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the imports left stays to the end: looking through it takes most of a second, each time that a test frees
    memory."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """The toy checkpoints, written once for the whole run. Their files are shared: copy them before you change them."""
    import torch

    from tests.tiny import Toys  # takes seconds to import, and most tests do without

    torch.set_num_threads(1)  # toys are too small for more: threads would only wait for each other
    return Toys(tmp_path_factory.mktemp("toys"))
