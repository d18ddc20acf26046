"""benchmarks.core times the same thing on both sides, its floors count what is computed, its reports are drawn."""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import core, decoder_arms, gpu, plot, sizes, text_arms
from benchmarks.ceilings import ATTENTION, COPY, FP8, LINEAR
from benchmarks.measuring import Deadline, time_on
from benchmarks.synthetic import FlowSize, TextSize, qwen3_config, sharing
from benchmarks.transformer_arms import (
    OURS,
    THEIRS,
    Case,
    Inputs,
    another,
    errors,
    held,
    held_way,
    made,
    our_ways,
    ours,
    replaying,
    their_ways,
    theirs,
    time_case,
    ways_for,
    work,
)
from benchmarks.transformer_arms import TEXT as TOKENS
from flux2_studio.engine.compiling import Compiler
from flux2_studio.engine.params import AutoencoderParams
from flux2_studio.engine.replay import Replays
from flux2_studio.engine.tower import tower_params
from flux2_studio.engine.transformer import Transformer
from tests.graphs import Graphs, Tape
from tests.oracle import relative_error

CPU = torch.device("cpu")
TEXT = TextSize(width=32, mlp=64, heads=2, key_heads=1, head_width=16, layers=28, vocabulary=3072)
FLOW = FlowSize(double_blocks=1, single_blocks=2, heads=2, head_width=32, text=TEXT)
AUTOENCODER = AutoencoderParams(
    encoder_channels=(32, 32, 32, 64),
    decoder_channels=(32, 32, 32, 64),
    encoder_blocks=1,
    decoder_blocks=2,
    latent_channels=32,
)
RATES = {LINEAR: 1e11, ATTENTION: 1e10, FP8: 2e11}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def flow() -> Transformer:
    return made(replace(FLOW.params, guidance_embedding=True), CPU, torch.bfloat16)


# --- the transformer ---


@pytest.mark.parametrize("references", [0, 1, 3])
def test_cases_are_read_back(references: int) -> None:
    case = Case(side=512, references=references)
    assert Case.named(case.name) == case == Case.parse(f"512+{references}")
    assert Case.parse("64") == Case(side=64)


@pytest.mark.parametrize("what", ["velocity", "picture"])
def test_both_sides_compute_the_same_from_the_same_weights(what: str) -> None:
    # In float32: diffusers rounds the times of a picture to the precision that it computes in.
    flow = made(replace(FLOW.params, guidance_embedding=True), CPU, torch.float32)
    case = Case(side=64, references=1)
    given = Inputs(flow.params, case, CPU, torch.float32)
    mine, others = (getattr(way, what)(given, case) for way in (ours(flow), theirs(sharing(flow))))
    assert mine.shape == others.shape
    assert relative_error(mine, others) < 1e-4


def test_a_replayed_way_computes_the_same_and_is_timed_where_it_is_one() -> None:
    flow, tape = made(FLOW.params, CPU, torch.float32), Tape()
    ways = {"ours": ours(flow), "replayed": ours(replaying(another(flow), Replays(lambda: tape)), longest=TOKENS + 16)}
    small, large = Case(side=64), Case(side=80)
    given = Inputs(flow.params, small, CPU, torch.float32)
    for _ in range(3):
        assert ways["replayed"].velocity(given, small).equal(ways["ours"].velocity(given, small))
    assert (tape.recorded, tape.replayed) == (1, 2)
    assert ways_for(ways, small).keys() == ways.keys() and ways_for(ways, large).keys() == {"ours"}


def test_weights_are_shared() -> None:
    flow = made(FLOW.params, CPU, torch.bfloat16)
    own = {tensor.data_ptr() for tensor in flow.parameters()}
    others = list(sharing(flow).parameters())
    shared = [tensor for tensor in others if tensor.untyped_storage().data_ptr() in own]
    assert len(shared) == len(others) - 1  # the last layer's halves are swapped
    blocks = {tensor.data_ptr() for tensor in held(flow, "bfloat16", torch.float32).state_dict().values()}
    assert len(own & blocks) == 1 * 8 + 2 * 2


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


@pytest.mark.parametrize("references", [0, 1])
def test_the_floor_counts_what_an_evaluation_computes(flow: Transformer, references: int) -> None:
    case = Case(side=64, references=references)
    given = Inputs(flow.params, case, CPU, flow.dtype)
    # Of the kernels for attention, the plain one is counted.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        ours(flow).velocity(given, case)
    least = work(flow.params, case)
    # Beside the blocks and the ways in and out, an evaluation embeds its time.
    assert 1 <= counter.get_total_flops() / (least.blocks + least.ends + least.attention) < 1.05
    assert least.floor(RATES) - least.floor(RATES, FP8) == pytest.approx(least.blocks / RATES[LINEAR] / 2)


# --- the text encoder ---


@pytest.mark.parametrize("tied", [True, False])
def test_the_text_encoders_are_one(tied: bool) -> None:
    size = replace(TEXT, layers=36, tied=tied)
    at = text_arms.depth(size)
    assert at == text_arms.Depth(taps=(9, 18, 27), layers=36)
    tower, model = text_arms.made(size, at, CPU, torch.float32)
    prompt = text_arms.Prompt(size.vocabulary, CPU)
    mine, others = text_arms.ours(tower, at.taps)(prompt), text_arms.theirs(model, at.taps)(prompt)
    assert mine.shape == others.shape == (1, 512, 3 * size.width)
    assert relative_error(mine, others) < 1e-4
    shared = {tensor.data_ptr() for tensor in model.parameters()}
    assert all(tensor.data_ptr() in shared for tensor in tower.parameters())
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied


def test_a_slow_machine_reads_fewer_layers() -> None:
    size = replace(TEXT, layers=36)
    assert text_arms.depth(size, 3) == text_arms.Depth(taps=(1, 2, 3), layers=4)
    assert text_arms.depth(size, 1) == text_arms.Depth(taps=(1, 1, 1), layers=2)
    assert text_arms.depth(size, 99) == text_arms.depth(size)


def test_the_floor_of_the_text_encoder() -> None:
    at = text_arms.depth(TEXT, 2)
    tower, _ = text_arms.made(TEXT, at, CPU, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        text_arms.ours(tower, at.taps)(text_arms.Prompt(TEXT.vocabulary, CPU))
    linear, attention, size = text_arms.work(tower.params)
    # What is counted knows no mask; each token looks at half of the others.
    assert counter.get_total_flops() == linear + 2 * attention
    assert size == sum(2 * tensor.numel() for tensor in tower.layers.parameters() if tensor.ndim == 2)
    rates = {**RATES, COPY: 1e9}
    assert text_arms.floor(tower.params, rates) == max(linear / 1e11 + attention / 1e10, size / 1e9)


# --- the decoder ---


def test_the_decoders_are_one() -> None:
    model = decoder_arms.made(AUTOENCODER, CPU, torch.float32)
    other = decoder_arms.sharing(model)
    latent = decoder_arms.latent_of(AUTOENCODER, 32, CPU)
    mine, others = model.decode(latent), decoder_arms.theirs(other)(latent)
    assert mine.shape == others.shape == (1, 3, 32, 32)
    assert relative_error(mine, others) < 1e-4
    shared = {tensor.data_ptr() for tensor in other.parameters()}
    assert all(tensor.data_ptr() in shared for tensor in model.parameters())


@pytest.mark.parametrize("channels", [(32, 32, 32, 64), (32, 64, 64, 64)])
def test_the_floor_of_the_decoder(channels: tuple[int, ...]) -> None:
    params = replace(AUTOENCODER, encoder_channels=channels, decoder_channels=channels)
    model = decoder_arms.made(params, CPU, torch.float32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.decode(decoder_arms.latent_of(params, 32, CPU))
    assert counter.get_total_flops() == decoder_arms.work(params, 32)


def test_published_floors() -> None:
    """Of a GPU that multiplies 790 and copies 4.3 million million: milliseconds that were worked out elsewhere."""
    rates = {LINEAR: 790e12, ATTENTION: 790e12, COPY: 4.3e12}
    four = sizes.MODELS["klein-4b"]
    assert 1e3 * work(four.flow, Case(side=1024)).floor(rates) == pytest.approx(44.1, rel=0.02)
    assert 1e3 * work(sizes.DEV, Case(side=1024)).floor(rates) == pytest.approx(358, rel=0.02)
    for side, least in ((512, 3.2), (1024, 13.3), (2048, 61)):
        assert 1e3 * decoder_arms.floor(four.autoencoder, side, rates) == pytest.approx(least, rel=0.02)
    for name, least in (("klein-4b", 3.6), ("klein-9b", 6.8)):
        text = sizes.MODELS[name].text
        assert text is not None
        config = qwen3_config(text).to_dict()
        assert 1e3 * text_arms.floor(tower_params(config, 27, 512), rates) == pytest.approx(least, rel=0.02)


# --- time ---


def test_a_limit_leaves_fewer_rounds_but_some() -> None:
    calls: list[str] = []
    figures = time_on(CPU, {"a": lambda: calls.append("a")}, rounds=9, warmups=3, limit=1e-9)
    assert figures["a"]["runs"] == 5 and len(calls) == 3 + 5


def test_deadlines() -> None:
    assert Deadline.within(None).left == float("inf")
    assert 50 < Deadline.within(60).left <= 60
    assert Deadline.within(-1).left < 0


# --- reports, and drawings of them ---


TOY = {"small": sizes.Model(flow=FLOW.params, text=TEXT, autoencoder=AUTOENCODER)}
STAGES = ["--stages", "transformer", "text", "decoder"]


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


def test_a_text_encoder_that_is_no_qwen3_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        core.main(["--size", "dev", "--stages", "text"])
    assert "no Qwen3" in capsys.readouterr().err


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


def test_nothing_is_drawn_of_nothing() -> None:
    assert plot.panels({"cases": {}}) == []


@pytest.mark.parametrize(("low", "high"), [(0.03, 0.5), (2e-3, 40.0), (0.8, 1.1)])
def test_ticks_lie_inside(low: float, high: float) -> None:
    for power in (True, False):
        ticks = plot._ticks(low, high, power=power)
        assert ticks and all(low <= tick <= high for tick in ticks) and len(ticks) < 16


# --- all that wants a GPU ---


def test_every_job_is_one_that_its_program_knows() -> None:
    for job in gpu.JOBS:
        command = job.command("cuda", Path("out"), 300, trial=False)
        if job.arguments:
            assert command[1:3] == ["-m", "benchmarks.core"]
            chosen = core._parser().parse_args(command[3:])
            assert (chosen.device, chosen.budget, chosen.out) == ("cuda", 300, Path("out"))
            assert chosen.limit and chosen.cases
        small = job.command("cpu", Path("out"), 300, trial=True)
        assert not job.arguments or core._parser().parse_args(small[3:]).size == "small"


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
        gpu.main(["--out", str(tmp_path), "--budget", "8"], jobs, grace=0)
    told = json.loads((tmp_path / "gpu.json").read_text("utf-8"))["jobs"]
    assert [what["result"].split()[0] for what in told.values()] == ["done", "failed", "left", "stopped"]
    assert (tmp_path / "gpu.log").read_text("utf-8") == "begun\n" * 3
    gpu.main(["--out", str(tmp_path), "--only", "quick"], jobs)
    assert json.loads((tmp_path / "gpu.json").read_text("utf-8"))["jobs"].keys() == {"quick"}
