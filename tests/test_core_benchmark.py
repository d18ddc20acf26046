"""benchmarks.core times the same thing on both sides, its floors count what is computed, its reports are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import core, decoder_arms, gpu, plot, sizes, text_arms
from benchmarks.ceilings import ATTENTION, COPY, FP8, LINEAR
from benchmarks.measuring import Deadline, time_on
from benchmarks.synthetic import qwen3_config, sharing
from benchmarks.transformer_arms import TEXT as TOKENS
from benchmarks.transformer_arms import (
    Case,
    Inputs,
    another,
    held,
    made,
    ours,
    replaying,
    theirs,
    ways_for,
    work,
)
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.graphs import GraphRunner
from flux2_studio.engine.text.decoder import text_decoder_params
from tests.graphs import Tape
from tests.oracle import relative_error
from tests.toy_benchmarks import AUTOENCODER, FLOW, RATES, TEXT

CPU = torch.device("cpu")


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
    ways = {
        "ours": ours(flow),
        "replayed": ours(replaying(another(flow), GraphRunner(lambda: tape)), longest=TOKENS + 16),
    }
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
        assert 1e3 * text_arms.floor(text_decoder_params(config, 27, 512), rates) == pytest.approx(least, rel=0.02)


# --- time ---


def test_a_limit_leaves_fewer_rounds_but_some() -> None:
    calls: list[str] = []
    figures = time_on(CPU, {"a": lambda: calls.append("a")}, rounds=9, warmups=3, limit=1e-9)
    assert figures["a"]["runs"] == 5 and len(calls) == 3 + 5


def test_deadlines() -> None:
    assert Deadline.within(None).left == float("inf")
    assert 50 < Deadline.within(60).left <= 60
    assert Deadline.within(-1).left < 0


# --- reports, and drawings of them: more of it in tests/slow ---


def test_a_text_encoder_that_is_no_qwen3_is_not_timed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        core.main(["--size", "dev", "--stages", "text"])
    assert "no Qwen3" in capsys.readouterr().err


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
