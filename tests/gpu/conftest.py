"""Tests that want a GPU: they run by themselves where CUDA does, and are skipped elsewhere."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that CUDA runs on")
    return torch.device("cuda", torch.cuda.current_device())
