"""The benchmarks measure what they say: synthetic checkpoints are checkpoints, arms take turns, swaps are swaps."""

from __future__ import annotations

import json
import mmap
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks import page_cache, swap
from benchmarks.measuring import Arm, interleave, machine, summary
from benchmarks.pair import Bench, prepare
from benchmarks.synthetic import Entry, Written, disk_bytes, write
from flux2_studio.checkpoints import KLEIN_4B
from flux2_studio.engine.flux.latents import sequence_position_ids
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.text.encoder import load_text_encoder
from flux2_studio.engine.weights.loading import load_transformer
from tests.toy_benchmarks import PAIR, TEXT

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    torch.set_num_threads(1)
    return prepare(PAIR, tmp_path_factory.mktemp("bench"), CPU, baseline=True)


@pytest.fixture(scope="module")
def written(bench: Bench) -> Written:
    return bench.pair[0]


# --- synthetic checkpoints ---


def inputs(transformer: Transformer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latent tokens, context, times and ids of a picture of 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(1, 16, transformer.params.in_channels, generator=generator)
    context = torch.randn(1, 8, transformer.params.context_width, generator=generator)
    return x, context, torch.tensor([0.6]), sequence_position_ids(8, 4, 4)


@torch.inference_mode()
def test_the_layouts_are_one_model_and_diffusers_agrees(written: Written) -> None:
    assert written.diffusers is not None
    ours = load_transformer(written.flow, device=CPU, dtype=torch.float32)
    same = load_transformer(written.diffusers, device=CPU, dtype=torch.float32).state_dict()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, same[name]), name
    theirs = Flux2Transformer2DModel.from_pretrained(written.diffusers, torch_dtype=torch.float32)
    x, context, t, ids = inputs(ours)
    expected = theirs(x, context, t, ids[8:], ids[:8], return_dict=False)[0]
    torch.testing.assert_close(ours(x, context, t, ours.rope(ids), None), expected, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_every_layer_counts(written: Written) -> None:
    model = load_transformer(written.flow, device=CPU, dtype=torch.float32)
    gates: list[Tensor] = []

    def look(_module: nn.Module, _inputs: object, output: Tensor) -> None:
        gates.extend(output.chunk(output.shape[-1] // model.params.hidden, -1)[2::3])  # shift, scale, gate

    modulations = [
        model.double_stream_modulation_img,
        model.double_stream_modulation_txt,
        model.single_stream_modulation,
    ]
    for modulation in modulations:
        modulation.lin.register_forward_hook(look)
    x, context, t, ids = inputs(model)
    velocity = model(x, context, t, model.rope(ids), None)
    assert len(gates) == 5
    assert all(0.4 < float(gate.std()) < 1 for gate in gates), [float(gate.std()) for gate in gates]
    assert 0.3 < float(velocity.std()) < 3


def test_the_text_encoder_reads_prompts(written: Written) -> None:
    encoder = load_text_encoder(
        written.text, written.text.parent / "tokenizer", KLEIN_4B.recipe, device=CPU, dtype=torch.float32
    )
    one, other = encoder.encode(["a cat", "a dog"]).context
    assert one.shape == (512, 3 * TEXT.width)
    assert float((one - other).abs().mean()) > 0.01 and 0.3 < float(one.std()) < 10


def test_the_disk_takes_what_was_said(bench: Bench) -> None:
    for written, size in zip(bench.pair, (PAIR.first, PAIR.second), strict=True):
        files = (written.flow, written.text_file, written.diffusers_file)
        data = sum(path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little") for path in files)
        assert data == disk_bytes(size, baseline=True)
        assert data - written.flow_bytes == disk_bytes(size, baseline=False)


def test_tensors_are_written_in_pieces(tmp_path: Path) -> None:
    values = torch.randn(7, 3)
    pieces = [values[:2].to(torch.bfloat16), values[2:].to(torch.bfloat16)]
    write(
        tmp_path / "new" / "file.safetensors",
        [
            Entry("a", torch.bfloat16, (7, 3), lambda: pieces),
            Entry("b", torch.int64, (), lambda: [torch.tensor(5)]),
            Entry("c", torch.float32, (7, 3), lambda: [values.T.contiguous().T]),
        ],
    )
    read = load_file(tmp_path / "new" / "file.safetensors")
    assert torch.equal(read["a"], values.to(torch.bfloat16)) and read["b"] == 5 and torch.equal(read["c"], values)


# --- measuring ---


def test_arms_take_turns_and_warm_ups_do_not_count() -> None:
    order: list[str] = []

    def arm(name: str) -> Arm:
        return Arm(prepare=lambda: order.append(f"before {name}"), run=lambda: order.append(name))

    seconds = interleave({"a": arm("a"), "b": arm("b")}, rounds=3, warmups=1)
    assert order[1::2] == ["a", "b", "b", "a", "a", "b", "b", "a"]
    assert order[::2] == [f"before {name}" for name in order[1::2]]
    assert [len(took) for took in seconds.values()] == [3, 3]


def test_a_summary() -> None:
    figures = summary([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (figures["runs"], figures["median"]) == (5, 3.0)
    assert figures["p10"] == pytest.approx(1.4) and figures["p90"] == pytest.approx(4.6)
    assert figures["A/A"] == pytest.approx(1.0)  # 1, 3, 5 and 2, 4
    assert summary([2.0])["p90"] == 2.0


def test_the_machine_of_a_result() -> None:
    told = machine("cpu", ("torch", "no-such-package"))
    assert told["torch"] and told["no-such-package"] is None and told["device"] == "cpu"
    json.dumps(told)


@pytest.mark.skipif(not page_cache.available(), reason="only Linux can be asked")
def test_pages_in_memory(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(mmap.PAGESIZE * 3 + 1))
    assert page_cache.read(file) == mmap.PAGESIZE * 3 + 1
    assert page_cache.cached(file) == 1.0
    with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert not any(mapped[:: mmap.PAGESIZE])
        page_cache.drop(file)
        assert page_cache.cached(file) == 1.0, "what is mapped cannot be dropped, and is not said to be"


# --- swaps and runs ---


def test_what_is_no_swap_is_not_timed_as_one(bench: Bench) -> None:
    first, second = bench.pair
    models = bench.manager()
    bench.bring(models, first)
    with pytest.raises(SystemExit, match="already"):
        bench.bring(models, first)
    with pytest.raises(SystemExit, match="not on the device"):
        bench.bring(models, second, moves=False)


def test_without_the_baseline(bench: Bench) -> None:
    first, second = (replace(written, diffusers=None) for written in bench.pair)
    with swap.from_files(replace(bench, pair=(first, second)), swap.Cooler()) as arms:
        assert {level for _, level in arms} == {swap.COPY, swap.READ_COLD, swap.READ_WARM, swap.COLD, swap.WARM}
