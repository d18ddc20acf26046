"""Fixtures that every test may use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.tiny import Toys


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """The toy checkpoints, written once for the whole run. Their files are shared: copy them before you change them."""
    import torch

    from tests.tiny import Toys  # takes seconds to import, and most tests do without

    torch.set_num_threads(1)  # toys are too small for more: threads would only wait for each other
    return Toys(tmp_path_factory.mktemp("toys"))
