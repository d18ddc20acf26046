"""benchmarks.swap really runs, on toys: its levels are what they are called, and its report is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import swap
from benchmarks.measuring import Arm
from benchmarks.pair import Bench, prepare
from tests.toy_benchmarks import PAIR

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return prepare(PAIR, tmp_path_factory.mktemp("bench"), CPU, baseline=True)


def test_levels_are_what_they_are_called(bench: Bench) -> None:
    """As on a GPU: what leaves it waits in main memory, or is gone."""
    name = bench.pair[0].checkpoint.name

    def twice(arm: Arm) -> tuple[Any, Any]:
        arm.prepare()
        first = arm.run()
        arm.prepare()
        return first, arm.run()

    with swap.from_main_memory(bench, {"host_budget": swap.AMPLE}) as arms:
        first, second = twice(arms[name, swap.HOST])
        assert first is second, "it came back"
    with swap.from_files(bench, swap.Cooler()) as arms:
        first, second = twice(arms[name, swap.WARM])
        assert first is not second and first.img_in.weight.is_meta, "it was dropped, and read again"
    with swap.resident(bench) as arms:
        first, second = twice(arms[name, swap.RESIDENT])
        assert first is second


def test_all_parts_are_loaded(bench: Bench) -> None:
    with swap.all_parts(bench, swap.Cooler()) as arms:
        for written in bench.pair:
            name = written.checkpoint.name
            assert arms[name, swap.COPY_ALL].time() > 0 and arms[name, swap.ALL_WARM].time() > 0


def test_the_whole_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = swap.measure(PAIR, tmp_path, CPU, baseline=True)
    assert json.loads(json.dumps(report)) == report
    swaps, runs = report["swaps"], report["runs"]
    assert swaps["left out"].keys() == {swap.HOST, "all parts"}, "and says why"
    levels = {swap.COPY, swap.READ_COLD, swap.READ_WARM, swap.COLD, swap.WARM, swap.RESIDENT}
    for figures in swaps["seconds"].values():
        assert figures.keys() == levels | {swap.THEIRS_COLD, swap.THEIRS_WARM}
        assert figures[swap.WARM]["times"].keys() == {swap.COPY, swap.READ_WARM}
        assert figures[swap.THEIRS_COLD]["times"][swap.COLD] == pytest.approx(
            figures[swap.THEIRS_COLD]["median"] / figures[swap.COLD]["median"]
        )
    assert runs["seconds"].keys() == {swap.SAME, swap.FRESH}
    for kind in ("bfloat16", "int8"):
        little, plenty = runs["memory"][f"{kind}, {swap.LITTLE}"], runs["memory"][f"{kind}, {swap.ALL_MEMORY}"]
        assert little["blocks streamed"]["flow"][0] > 0 and not plenty["blocks streamed"]
        assert little["planned peak"] <= little["budget"] < plenty["planned peak"]
        assert little["measured peak"] is None, "nothing here counts it"
    swap.show(report)
    told = capsys.readouterr().out
    assert all(level in told for level in levels) and "blocks of flow streamed" in told
