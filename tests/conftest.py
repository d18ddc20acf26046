"""Fixtures that every test may use."""

from __future__ import annotations

import pytest

from tests.tiny import Toys


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> Toys:
    """The toy checkpoints, written once for the whole run. Their files are shared: copy them before you change them."""
    return Toys(tmp_path_factory.mktemp("toys"))
