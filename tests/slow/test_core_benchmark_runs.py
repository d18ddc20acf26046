"""benchmarks.core and benchmarks.gpu really run, on toys: what is timed, reported and drawn."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import core, gpu, plot, sizes
from benchmarks.transformer_arms import (
    OURS,
    THEIRS,
    Case,
    errors,
    held_way,
    made,
    our_ways,
    their_ways,
    time_case,
)
from flux2_studio.engine.runtime.compiling import Compiler
from tests.graphs import Graphs
from tests.toy_benchmarks import AUTOENCODER, FLOW, RATES, TEXT

CPU = torch.device("cpu")
TOY = {"small": sizes.Model(flow=FLOW.params, text=TEXT, autoencoder=AUTOENCODER)}


STAGES = ["--stages", "transformer", "text", "decoder"]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_a_case_is_timed_and_its_errors_are_told() -> None:
    flow = made(FLOW.params, CPU, torch.bfloat16)
    graphs = Graphs()
    ways = our_ways(flow, Compiler(backend=graphs))
    ways |= held_way(flow, "bfloat16") | held_way(flow, "int8") | their_ways(flow, compiled=False)
    case = Case(side=64, references=1)
    figures = time_case(ways, flow.params, case, RATES, device=CPU, dtype=torch.bfloat16, rounds=2, warmups=0)
    assert graphs.made == 3 and graphs.ran
    names = {OURS, f"{OURS}, blocks compiled", f"{OURS}, held in bfloat16", f"{OURS}, held in int8", THEIRS}
    assert set(figures["seconds"]) == {"evaluation", "picture"}
    for what, arms in figures["seconds"].items():
        assert set(arms) == names
        assert all(arm["median"] > 0 and arm["first"] > 0 for arm in arms.values())
        assert arms[THEIRS]["times diffusers"] == 1.0
        steps = 1 if what == "evaluation" else 4
        assert arms[OURS]["times the floor"] == pytest.approx(
            arms[OURS]["median"] / steps / figures["floor of an evaluation"]
        )
    for found in errors(ways, flow, case, pictures=True).values():
        assert set(found) == names
        assert 0 <= found.pop(f"{OURS}, held in bfloat16") < 1e-5  # it computes in float32
        assert all(1e-4 < error < 0.15 for error in found.values())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command itself writes of a toy."""
    folder = tmp_path_factory.mktemp("report")
    how = ["--cases", "16", "32", "32+1", "32+2", "--rounds", "2", "--warmups", "0", "--held", "int8"]
    core.main([*STAGES, *how, "--out", str(folder)], TOY)
    (file,) = folder.iterdir()
    return file


def test_a_report_says_what_was_measured(report: Path) -> None:
    told = json.loads(report.read_text("utf-8"))
    assert report.name == "core-small-cpu.json" and told["blocks"] == [1, 2]
    assert list(told["cases"]) == ["16 x 16", "32 x 32", "32 x 32, 1 reference", "32 x 32, 2 references"]
    assert set(told["relative error"]) == {"evaluation", "picture"}
    assert "left out" not in told
    assert told["text"]["layers read"] == 27 and set(told["text"]["relative error"]) == {OURS, THEIRS}
    assert list(told["decoder"]) == ["16 x 16", "32 x 32"]
    assert set(told["decoder"]["16 x 16"]["relative error"]) == {OURS, THEIRS}
    assert 0 < max(told["decoder"]["16 x 16"]["relative error"].values()) < 0.1


def test_no_case_is_begun_after_the_budget(tmp_path: Path) -> None:
    core.main([*STAGES, "--cases", "32", "64", "--budget", "0", "--out", str(tmp_path), "--label", "none"], TOY)
    told = json.loads((tmp_path / "core-small-none-cpu.json").read_text("utf-8"))
    assert told["left out"].keys() == {"32 x 32", "64 x 64", "text", "decoder, 32 x 32", "decoder, 64 x 64"}
    assert told["cases"] == told["decoder"] == {} and "text" not in told


def test_a_report_is_drawn(report: Path) -> None:
    plot.main([str(report)])
    drawn = report.with_suffix(".svg")
    root = ElementTree.fromstring(drawn.read_text("utf-8"))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"ours", "diffusers", "floor", "32", "One evaluation, no references", "4 steps, 32 x 32"} <= set(words)
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for line in root.iter("{http://www.w3.org/2000/svg}polyline"):
        for point in line.get("points", "").split():
            x, y = map(float, point.split(","))
            assert 0 < x < width and 0 < y < height


def test_panels_hold_what_was_timed(report: Path) -> None:
    told: dict[str, Any] = json.loads(report.read_text("utf-8"))
    by_title = {panel.title: panel for panel in plot.panels(told)}
    along = by_title["4 steps, 32 x 32"].lines
    assert [x for x, _ in along["ours"]] == [0, 1, 2]
    assert along["floor"][0][1] == 4 * told["cases"]["32 x 32"]["floor of an evaluation"]
    assert (
        along["diffusers"][2][1] == told["cases"]["32 x 32, 2 references"]["seconds"]["picture"]["diffusers"]["median"]
    )
    assert [x for x, _ in by_title["One evaluation, no references"].lines["ours"]] == [16, 32]
    decoding = by_title["Decoding"].lines
    assert [x for x, _ in decoding["ours"]] == [16, 32]
    assert decoding["floor"][1][1] == told["decoder"]["32 x 32"]["floor"]


def test_a_job_is_begun_only_with_time_and_one_that_hangs_is_stopped(tmp_path: Path) -> None:
    script = "import sys, time; print('begun', flush=True); time.sleep(float(sys.argv[1])); sys.exit(int(sys.argv[2]))"

    @dataclass(frozen=True, kw_only=True)
    class Script(gpu.Job):
        def command(self, device: str, out: Path, left: float, *, trial: bool) -> list[str]:
            return [sys.executable, "-c", script, *self.arguments]

    jobs = (
        Script(name="quick", arguments=("0", "0"), least=0),
        Script(name="broken", arguments=("0", "3"), least=0),
        Script(name="long", arguments=("0", "0"), least=1000),
        Script(name="hanging", arguments=("600", "0"), least=0),
    )
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), "--budget", "40"], jobs, grace=0)
    told = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["jobs"]
    assert [what["result"].split()[0] for what in told.values()] == ["done", "failed", "left", "stopped"]
    assert (tmp_path / "gpu.log").read_text("utf-8") == "begun\n" * 3
    gpu.main(["--out", str(tmp_path), "--only", "quick"], jobs)
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["jobs"].keys() == {"quick"}
