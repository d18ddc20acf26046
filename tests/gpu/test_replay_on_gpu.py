"""CUDA graphs of a transformer and a text encoder give what these compute without, to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.synthetic import fill
from benchmarks.text_arms import Prompt, ours
from benchmarks.transformer_arms import held, made
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.runtime.compiling import CompileKey, Compiler, clone_sharing_weights
from flux2_studio.engine.runtime.graphs import CudaGraphCapture, GraphRunner
from flux2_studio.engine.text.decoder import TextDecoder, TextDecoderParams
from tests.gpu.test_compiled_on_gpu import WIDE, picture
from tests.graphs import Tape

# klein 4B's encoder, three layers deep.
NARROW = TextDecoderParams(
    vocabulary=5000,
    hidden=2560,
    mlp=9728,
    layers=3,
    heads=32,
    kv_heads=8,
    head_width=128,
    eps=1e-6,
    rope_theta=1e6,
    attention_bias=False,
    qk_norm=True,
)


class Counting(Tape):
    """CUDA's recorder, counted."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._recorder = CudaGraphCapture(device)

    def __call__(self, run: Any) -> Any:
        replay, output = self._recorder(run)
        self.recorded += 1

        def counted() -> None:
            self.replayed += 1
            replay()

        return counted, output


@pytest.fixture
def tape(gpu: torch.device) -> Counting:
    return Counting(gpu)


@pytest.fixture(scope="module")
def model(gpu: torch.device) -> Transformer:
    return made(WIDE, gpu, torch.bfloat16)


@pytest.mark.parametrize("kind", [None, "fp8", "int8"])
@pytest.mark.parametrize("side, batch, references", [(256, 1, 0), (256, 1, 1), (256, 3, 0)])
def test_pictures(kind: Any, side: int, batch: int, references: int, model: Transformer, tape: Counting) -> None:
    plain = model if kind is None else held(model, kind, torch.bfloat16)
    expected = picture(plain, side, batch, references)
    recorded = clone_sharing_weights(plain)
    assert isinstance(recorded, Transformer)
    replays = GraphRunner(lambda: tape)
    replays.attach(recorded)
    for _ in range(3):
        assert picture(recorded, side, batch, references).equal(expected)
    assert replays.error is None and (tape.recorded, tape.replayed) == (1, 5)


def test_compiled_blocks(model: Transformer, tape: Counting) -> None:
    compiler = Compiler()
    compiled = clone_sharing_weights(model)
    assert isinstance(compiled, Transformer)
    compiler.compile(compiler.make_job(compiled, CompileKey()))
    assert compiler.attach(compiled, CompileKey())
    expected = picture(compiled, 256, 1, 0)
    replays = GraphRunner(lambda: tape)
    replays.attach(compiled)
    for _ in range(3):
        assert picture(compiled, 256, 1, 0).equal(expected)
    assert replays.error is None and tape.replayed == 5


def test_weights_that_moved_are_read_where_they_are(model: Transformer, tape: Counting) -> None:
    moved = clone_sharing_weights(model)
    assert isinstance(moved, Transformer)
    replays = GraphRunner(lambda: tape)
    replays.attach(moved)
    for _ in range(2):
        picture(moved, 256, 1, 0)
    for parameter in moved.parameters():
        parameter.data = 1.25 * parameter.data
    replays.attach(moved)
    found = [picture(moved, 256, 1, 0) for _ in range(3)]
    replays.forget(moved)
    expected = picture(moved, 256, 1, 0)
    assert all(one.equal(expected) for one in found)
    assert replays.error is None and tape.recorded == 2


def test_several_recordings_share_their_memory(model: Transformer, tape: Counting) -> None:
    recorded = clone_sharing_weights(model)
    assert isinstance(recorded, Transformer)
    sizes = [(256, 1, 0), (320, 1, 0), (256, 2, 0)]
    expected = [picture(model, *size) for size in sizes]
    replays = GraphRunner(lambda: tape)
    replays.attach(recorded)
    for _ in range(3):  # one after the other, in turn
        found = [picture(recorded, *size) for size in sizes]
        assert all(one.equal(other) for one, other in zip(found, expected, strict=True))
    assert replays.error is None and tape.recorded == len(sizes)


def test_prompts(gpu: torch.device, tape: Counting) -> None:
    with torch.device("meta"):
        tower = TextDecoder(NARROW)
    fill(tower, seed=1, device=gpu, dtype=torch.bfloat16)
    tower.eval().requires_grad_(False)
    read = ours(tower, (1, 3))
    prompts = [Prompt(NARROW.vocabulary, gpu), Prompt(NARROW.vocabulary, gpu)]
    prompts[1].ids, prompts[1].mask = prompts[1].ids.flip(1), torch.ones_like(prompts[1].mask)
    expected = [read(prompt) for prompt in prompts]
    replays = GraphRunner(lambda: tape)
    replays.attach(tower)
    for _ in range(3):
        assert all(read(prompt).equal(other) for prompt, other in zip(prompts, expected, strict=True))
    assert replays.error is None and (tape.recorded, tape.replayed) == (1, 5)


def test_a_recording_that_fails_leaves_nothing_behind(gpu: torch.device, model: Transformer, tape: Counting) -> None:
    expected = picture(model, 256, 1, 0)
    stream = torch.cuda.current_stream(gpu)

    def waits() -> torch.Tensor:
        x = torch.ones(8, device=gpu)
        return x * x.sum().item()

    waits()
    with pytest.raises(RuntimeError):
        tape(waits)
    assert torch.cuda.current_stream(gpu) == stream
    torch.cuda.empty_cache()
    assert picture(model, 256, 1, 0).equal(expected)
    x = torch.ones(8, device=gpu)
    replay, output = tape(lambda: 2 * x)  # and the next one works
    x.fill_(3)
    replay()
    assert output.tolist() == [6.0] * 8
