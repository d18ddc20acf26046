"""How much memory there is, in a container and out of one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from flux2_studio.models.memory import available as memory

CPU = torch.device("cpu")
NEW, OLD = (names for _, *names in memory.CGROUP_MEMORY_FILES)


def write(folder: Path, names: list[str], limit: str, used: str, stat: str) -> tuple[Path, str, str, str]:
    folder.mkdir(exist_ok=True)
    (folder / names[0]).write_text(limit + "\n")
    (folder / names[1]).write_text(used + "\n")
    (folder / "memory.stat").write_text(stat)
    return folder, names[0], names[1], names[2]


@pytest.mark.parametrize(("names", "stat"), [(NEW, "anon 300\nfile 200\n"), (OLD, "cache 1\ntotal_cache 200\n")])
def test_a_container_says_what_it_may_have(tmp_path: Path, names: list[str], stat: str) -> None:
    place = write(tmp_path, names, "1000", "500", stat)
    assert memory.read_container_memory([place]) == [(1000, 300)], "files kept for speed can be given up"


@pytest.mark.parametrize(
    ("limit", "used", "stat"),
    [
        ("max", "500", "file 1\n"),
        ("", "500", "file 1\n"),
        ("1000", "rubbish", "file 1\n"),
        ("1000", "1", "one two three\n"),
    ],
)
def test_a_container_without_a_limit_is_none(tmp_path: Path, limit: str, used: str, stat: str) -> None:
    assert memory.read_container_memory([write(tmp_path, list(NEW), limit, used, stat)]) == []
    assert memory.read_container_memory([(tmp_path / "nowhere", *NEW)]) == []


def test_what_there_is() -> None:
    assert 0 < memory.free_memory(CPU) <= memory.total_memory(CPU) <= psutil.virtual_memory().total


def test_weights_mapped_from_files_are_free_already() -> None:
    process = psutil.Process().memory_info()
    own = process.rss - process.shared
    assert memory.reclaimable_bytes(CPU, 1000) == 1000
    assert memory.reclaimable_bytes(CPU, 10 * process.rss) == pytest.approx(own, rel=0.2)
    assert memory.reclaimable_bytes(torch.device("cuda"), 10 * process.rss) == 10 * process.rss


@pytest.mark.parametrize(
    ("error", "is_one"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("shape mismatch"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_which_errors_mean_that_memory_ran_out(error: BaseException, is_one: bool) -> None:
    assert memory.is_out_of_memory(error) is is_one
