"""What is replayed is what would have been computed, to the bit, whatever became of the model since it was recorded."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.lora.layers import AdaptedLinear, LowRank
from flux2_studio.engine.runtime import graphs as replay
from flux2_studio.engine.runtime.compiling import clone_sharing_weights
from flux2_studio.engine.runtime.graphs import GraphRunner
from flux2_studio.engine.runtime.streaming import stream_blocks
from flux2_studio.engine.text.decoder import TextDecoder, TextDecoderParams, causal_attention_mask
from tests.engine.blocks import CPU, PARAMS, made, velocity
from tests.graphs import Tape

LAYERS = 4


@pytest.fixture
def tape() -> Tape:
    return Tape()


@pytest.fixture
def replays(tape: Tape) -> GraphRunner:
    return GraphRunner(lambda: tape)


@torch.inference_mode()
def asked(
    model: Transformer, t: float, *, seed: int = 0, side: int = 4, batch: int = 1, outputs: int | None = None
) -> Tensor:
    """A velocity for inputs that are made of `seed`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, side * side, 128, generator=generator)
    ctx = torch.randn(batch, 24, PARAMS.context_width, generator=generator)
    ids = torch.randint(50, (24 + side * side, 4), generator=generator)
    return model.velocity(x, ctx, model.modulations(torch.tensor([t])), model.rope(ids), outputs=outputs or side**2)


def test_the_second_run_is_recorded_and_replayed_with_whatever_comes(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    given = [(0.9, 0), (0.7, 1), (0.5, 2), (0.1, 1)]
    expected = [asked(model, t, seed=seed) for t, seed in given]
    replays.attach(model)
    found = [tape.since(lambda t=t, seed=seed: asked(model, t, seed=seed)) for t, seed in given]  # type: ignore[misc]
    assert [told[1:] for told in found] == [(0, 0), (1, 1), (0, 1), (0, 1)]
    # Of all of them now: no later run may have written over what an earlier one gave.
    assert all(told[0].equal(other) for told, other in zip(found, expected, strict=True))


def test_every_shape_is_recorded_once(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    shapes: list[dict[str, Any]] = [{}, {"side": 5}, {"batch": 2}, {"outputs": 9}]
    expected = [asked(model, 0.5, **shape) for shape in shapes]
    replays.attach(model)
    for _ in range(3):
        for shape, other in zip(shapes, expected, strict=True):
            assert asked(model, 0.5, **shape).equal(other)
    assert (tape.recorded, tape.replayed) == (4, 8)


def test_no_more_are_kept_than_there_is_room_for(
    tape: Tape, replays: GraphRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MAX_GRAPHS_PER_MODEL", 2)
    model = made()
    replays.attach(model)
    for side in (3, 3, 4, 4, 3, 5, 5):  # the last takes the place of 4, which was used longest ago
        asked(model, 0.5, side=side)
    assert tape.recorded == 3
    assert tape.since(lambda: asked(model, 0.5, side=3))[1:] == (0, 1)
    assert tape.since(lambda: asked(model, 0.5, side=4))[1:] == (1, 1)


def test_what_is_large_runs_as_it_is_written(tape: Tape, replays: GraphRunner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MAX_GRAPH_TOKENS", 24 + 16)
    model = made()
    replays.attach(model)
    for shape in ({"side": 5}, {"batch": 2}):
        for _ in range(3):
            asked(model, 0.5, **shape)  # type: ignore[arg-type]
    assert tape.recorded == 0
    for _ in range(2):
        asked(model, 0.5)
    assert tape.recorded == 1


def test_what_writes_or_reads_a_reference_cache_runs_as_it_is_written(tape: Tape, replays: GraphRunner) -> None:
    model = made()

    def all_of_it() -> list[Tensor]:
        found = []
        for _ in range(3):
            cache = ReferenceCache(16)
            found += [velocity(model, 4, 1, cache=cache), velocity(model, 4, 0, cache=cache)]
        return found

    expected = all_of_it()
    replays.attach(model)
    assert all(ours.equal(other) for ours, other in zip(all_of_it(), expected, strict=True))
    assert tape.recorded == 0


@pytest.mark.parametrize("guiding, batch", [("none", 1), ("none", 2), ("cfg", 1)])
def test_the_loop(tape: Tape, replays: GraphRunner, guiding: Any, batch: int) -> None:
    model = made()
    context = torch.randn(2, 24, PARAMS.context_width, generator=torch.Generator().manual_seed(2))

    def steps() -> list[Tensor]:
        drawing = denoise(
            model,
            initial_noise(range(batch), 64, 48),
            context[:1],
            steps=4,
            guidance=3.0,
            guidance_mode=guiding,
            negative_context=context[1:],
        )
        return [latents for step in drawing for latents in (step.latents, step.clean)]

    expected = steps()
    replays.attach(model)
    for recorded, replayed in ((1, 3), (0, 4)):
        found, *counted = tape.since(steps)
        assert counted == [recorded, replayed]
        assert all(ours.equal(other) for ours, other in zip(found, expected, strict=True))


def with_lora(model: Transformer, weight: float, seed: int = 0) -> None:
    """A layer in a block and one outside carry a change of rank 2, as `lora.set_loras` puts it there."""
    generator = torch.Generator().manual_seed(seed)
    for name in ("single_blocks.1.linear1", "txt_in"):
        layer = model.get_submodule(name)
        bare = layer.base if isinstance(layer, AdaptedLinear) else layer
        assert isinstance(bare, nn.Linear)
        down = torch.randn(2, bare.in_features, generator=generator)
        up = torch.randn(bare.out_features, 2, generator=generator) * weight
        model.set_submodule(name, AdaptedLinear(bare, f"{seed}, {weight}", branches=[LowRank(down, up)]))


def changed_by_another_lora(model: Transformer) -> None:
    with_lora(model, 0.5, seed=1)


def changed_by_its_weight(model: Transformer) -> None:
    with_lora(model, 0.25)


def changed_by_taking_it_off(model: Transformer) -> None:
    lora.set_loras(model, [])


def changed_by_moving(model: Transformer) -> None:
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data


def changed_in_place(model: Transformer) -> None:
    with torch.no_grad():
        model.get_parameter("single_blocks.0.linear2.weight").mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        changed_by_another_lora,
        changed_by_its_weight,
        changed_by_taking_it_off,
        changed_by_moving,
        changed_in_place,
    ],
)
def test_nothing_stale_is_replayed(tape: Tape, replays: GraphRunner, change: Any) -> None:
    model = made()
    with_lora(model, 0.5)
    replays.attach(model)
    before = [asked(model, 0.5) for _ in range(3)]
    assert tape.replayed == 2
    change(model)
    replays.attach(model)
    after = [asked(model, 0.5) for _ in range(3)]
    replays.forget(model)
    assert all(found.equal(asked(model, 0.5)) for found in after)
    assert not after[0].equal(before[0])


def test_what_did_not_change_is_not_recorded_again(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    for _ in range(3):
        replays.attach(model)
        asked(model, 0.5)
    assert (tape.recorded, tape.replayed) == (1, 2)


def test_streamed_blocks_run_as_they_are_written(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    expected = asked(model, 0.5)
    replays.attach(model)
    for _ in range(2):
        asked(model, 0.5)
    streaming = stream_blocks(model, list(model.single_blocks), CPU)
    replays.attach(model)
    _, recorded, replayed = tape.since(lambda: [asked(model, 0.5) for _ in range(3)])
    assert (recorded, replayed) == (0, 0)
    assert asked(model, 0.5).equal(expected)
    streaming.close()


def test_where_nothing_can_be_recorded_runs_are_as_they_are_written(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    expected = asked(model, 0.5)
    replays.attach(model)
    asked(model, 0.5)
    tape.trouble = "operation not permitted when stream is capturing"
    assert all(asked(model, 0.5).equal(expected) for _ in range(3))
    assert replays.error == tape.trouble
    tape.trouble = None
    replays.attach(model)  # no more is tried
    assert tape.since(lambda: [asked(model, 0.5) for _ in range(3)])[1:] == (0, 0)


def test_a_run_that_finds_no_memory_to_be_recorded_is_not_tried_again(
    replays: GraphRunner, tape: Tape, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made()
    expected = [asked(model, 0.5, side=side) for side in (4, 5)]
    tried = 0

    def no_memory(_run: Any) -> Any:
        nonlocal tried
        tried += 1
        try:
            raise torch.OutOfMemoryError("CUDA out of memory")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(replays, "_make_capture", lambda: no_memory)
    replays.attach(model)
    assert all(asked(model, 0.5).equal(expected[0]) for _ in range(4))
    assert (tried, replays.error) == (1, None)
    assert all(asked(model, 0.5, side=5).equal(expected[1]) for _ in range(4))
    assert tried == 2  # a larger one, but memory may be free by then


def test_paused_what_was_recorded_is_replayed_and_no_more_recorded(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    replays.attach(model)
    for _ in range(2):
        asked(model, 0.5)
    replays.is_paused = True
    found, recorded, replayed = tape.since(lambda: [asked(model, 0.5, side=side) for side in (4, 5, 5, 5)])
    assert (recorded, replayed) == (0, 1)
    replays.is_paused = False
    assert tape.since(lambda: asked(model, 0.5, side=5))[1:] == (1, 1)
    replays.forget(model)
    assert found[0].equal(asked(model, 0.5)) and found[1].equal(asked(model, 0.5, side=5))


def test_another_model_over_the_same_weights_runs_as_it_is_written(tape: Tape, replays: GraphRunner) -> None:
    model = made()
    replays.attach(model)
    other = clone_sharing_weights(model)
    assert isinstance(other, Transformer)
    assert tape.since(lambda: [asked(other, 0.5) for _ in range(3)])[1:] == (0, 0)


def test_a_model_and_its_recordings_go_when_nobody_holds_the_model(replays: GraphRunner) -> None:
    model = made()
    replays.attach(model)
    for _ in range(3):
        asked(model, 0.5)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and not replays._graphs_by_model


# --- the text encoder ---


def tower() -> TextDecoder:
    params = TextDecoderParams(
        vocabulary=50,
        hidden=32,
        mlp=64,
        layers=LAYERS,
        heads=4,
        kv_heads=2,
        head_width=16,
        eps=1e-6,
        rope_theta=1e4,
        attention_bias=False,
        qk_norm=True,
    )
    made = TextDecoder(params)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return made.eval().requires_grad_(False)


@torch.inference_mode()
def read(model: TextDecoder, seed: int, rows: int = 1, taps: tuple[int, ...] = (2, LAYERS)) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(50, (rows, 12), generator=generator)
    mask = (torch.arange(12) < 3 + seed).long().expand(rows, -1)
    context: Tensor = model(ids, causal_attention_mask(mask), taps)
    return context


def test_prompts_are_read_by_one_recording(tape: Tape, replays: GraphRunner) -> None:
    model = tower()
    expected = [read(model, seed) for seed in range(4)]
    replays.attach(model)
    found = [tape.since(lambda seed=seed: read(model, seed)) for seed in range(4)]  # type: ignore[misc]
    assert [told[1:] for told in found] == [(0, 0), (1, 1), (0, 1), (0, 1)]
    assert all(told[0].equal(other) for told, other in zip(found, expected, strict=True))
    for taps, rows in (((1, LAYERS), 1), ((2, LAYERS), 2)):
        alone = [read(tower(), seed, rows, taps) for seed in range(3)]
        assert all(read(model, seed, rows, taps).equal(other) for seed, other in enumerate(alone))
    assert tape.recorded == 3


def test_a_tower_that_moved_is_recorded_anew(tape: Tape, replays: GraphRunner) -> None:
    model = tower()
    replays.attach(model)
    before = [read(model, 1) for _ in range(3)]
    for parameter in model.parameters():
        parameter.data = 1.5 * parameter.data
    replays.attach(model)
    after = [read(model, 1) for _ in range(3)]
    replays.forget(model)
    assert all(found.equal(read(model, 1)) for found in after) and not after[0].equal(before[0])
    assert tape.recorded == 2
