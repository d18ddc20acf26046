"""A container's share of the processors, as Linux writes it, and torch's threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flux2_studio.models.memory.cpu_quota import limit_torch_threads, read_cpu_quota


@pytest.mark.parametrize(
    "files, expected",
    [
        (["200000 100000\n"], 2.0),
        (["150000 100000\n"], 1.5),
        (["max 100000\n"], None),
        (["400000\n", "100000\n"], 4.0),
        (["-1\n", "100000\n"], None),
        (["200000 0\n"], None),
        (["rubbish"], None),
        ([], None),
    ],
)
def test_quota(files: list[str], expected: float | None, tmp_path: Path) -> None:
    paths = tuple(tmp_path / str(number) for number in range(len(files)))
    for path, text in zip(paths, files, strict=True):
        path.write_text(text)
    assert read_cpu_quota([(tmp_path / "nothing",), paths]) == expected


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("allowed, expected", [(2.0, 2), (1.5, 2), (0.25, 1), (8.0, 4), (None, 4)])
def test_no_more_threads_than_that(allowed: float | None, expected: int, threads: None) -> None:
    limit_torch_threads(allowed)
    assert torch.get_num_threads() == expected
