"""The schedule, the noise and the Euler loop, apart from the pipelines that `test_parity.py` compares with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from flux2_studio.engine.flux.latents import from_tokens, initial_noise, sequence_position_ids, to_tokens
from flux2_studio.engine.flux.sampling import DenoisingStep, denoise, timestep_schedule
from flux2_studio.engine.flux.transformer import ReferenceCache, Transformer
from flux2_studio.engine.vae.preview import LinearPreview, TinyPreview
from flux2_studio.engine.weights.loading import load_tiny_decoder, load_transformer
from tests import oracle, tiny
from tests.tiny import Toys

CPU = torch.device("cpu")
WIDTH, HEIGHT = 96, 64


@pytest.fixture(scope="module")
def klein(toys: Toys) -> Transformer:
    return load_transformer(toys.klein.file, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def nine(toys: Toys) -> Transformer:
    return load_transformer(toys.nine.file, device=CPU, dtype=torch.float32)


def context(size: tiny.FlowSize, seed: int = 5) -> Tensor:
    return torch.randn(1, 24, size.context_width, generator=torch.Generator().manual_seed(seed))


def references() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(1, 128, h, w, generator=generator) for h, w in ((5, 3), (2, 7))]


def run(model: Transformer, size: tiny.FlowSize, start: Tensor, **changes: Any) -> list[DenoisingStep]:
    arguments: dict[str, Any] = {"steps": 4, "guidance": 1.0, "guidance_mode": "none", **changes}
    return list(denoise(model, start, context(size), **arguments))


@pytest.mark.parametrize("steps", [1, 2, 4, 10, 50])
@pytest.mark.parametrize("tokens", [1, 64, 1024, 4096, 4300, 4301, 16384])
def test_the_schedule_is_the_schedulers(tokens: int, steps: int) -> None:
    times = timestep_schedule(tokens, steps)
    torch.testing.assert_close(torch.tensor(times), oracle.sigmas(tokens, steps), rtol=0, atol=1e-6)
    assert (times[0], times[-1]) == (1.0, 0.0)
    assert all(later < earlier for earlier, later in itertools.pairwise(times))


def test_noise_depends_on_the_seed_and_nothing_else() -> None:
    batch = initial_noise([7, 8, 9], WIDTH, HEIGHT)
    assert batch.shape == (3, 128, HEIGHT // 16, WIDTH // 16)
    assert batch.dtype is torch.float32
    for row, seed in enumerate((7, 8, 9)):
        assert torch.equal(batch[row], initial_noise([seed], WIDTH, HEIGHT)[0])
    assert not torch.equal(batch[0], batch[1])
    torch.manual_seed(1)
    assert torch.equal(initial_noise([7], WIDTH, HEIGHT)[0], batch[0])


def test_noise_is_drawn_in_bfloat16_as_published() -> None:
    expected = torch.randn((1, 128, 4, 6), generator=torch.Generator().manual_seed(42), dtype=torch.bfloat16)
    assert torch.equal(initial_noise([42], WIDTH, HEIGHT), expected.float())


def test_tokens_run_row_by_row() -> None:
    latent = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5)
    tokens = to_tokens(latent)
    assert torch.equal(tokens[:, 7], latent[:, :, 1, 2])
    assert torch.equal(from_tokens(tokens, 4, 5), latent)


def test_ids_place_text_image_and_references() -> None:
    ids = sequence_position_ids(3, 2, 2, [torch.empty(1, 128, 1, 2), torch.empty(1, 128, 2, 1)]).tolist()
    assert ids == [
        *([0, 0, 0, i] for i in range(3)),
        *([0, h, w, 0] for h in range(2) for w in range(2)),
        *([10, 0, w, 0] for w in range(2)),
        *([20, h, 0, 0] for h in range(2)),
    ]


def test_every_step_follows_from_its_velocity(klein: Transformer) -> None:
    """clean = x_t - t v and x_next = x_t + (t_next - t) v, so either gives the velocity, and they must agree."""
    start = initial_noise([1], WIDTH, HEIGHT)
    steps = run(klein, tiny.KLEIN, start)
    assert [step.index for step in steps] == [0, 1, 2, 3]
    assert {step.steps for step in steps} == {4}
    x = start
    for step, (t, t_next) in zip(steps, itertools.pairwise(timestep_schedule(24, 4)), strict=True):
        velocity = (x - step.clean) / t
        torch.testing.assert_close(x + (t_next - t) * velocity, step.latents, rtol=1e-4, atol=1e-5)
        x = step.latents
    torch.testing.assert_close(steps[-1].clean, steps[-1].latents, rtol=1e-4, atol=1e-5)


def test_a_step_is_made_only_when_it_is_asked_for(klein: Transformer) -> None:
    calls = []
    hook = klein.final_layer.register_forward_hook(lambda *_: calls.append(1))
    steps = denoise(
        klein, initial_noise([1], WIDTH, HEIGHT), context(tiny.KLEIN), steps=4, guidance=1.0, guidance_mode="none"
    )
    assert len(calls) == 0
    next(steps)
    assert len(calls) == 1
    steps.close()
    hook.remove()


@pytest.mark.parametrize("mode", ["alone", "references", "cfg", "cache"])
def test_a_batch_equals_its_pictures_alone(klein: Transformer, nine: Transformer, mode: str) -> None:
    model, size = (nine, tiny.NINE) if mode == "cache" else (klein, tiny.KLEIN)
    changes: dict[str, Any] = {
        "alone": {},
        "references": {"references": references()},
        "cfg": {"guidance_mode": "cfg", "guidance": 4.0, "negative_context": context(size, seed=9)},
        "cache": {"references": references(), "reference_cache": True},
    }[mode]
    seeds = [3, 4, 5]
    batch = run(model, size, initial_noise(seeds, WIDTH, HEIGHT), **changes)[-1].latents
    for row, seed in enumerate(seeds):
        alone = run(model, size, initial_noise([seed], WIDTH, HEIGHT), **changes)[-1].latents
        assert oracle.relative_error(batch[row], alone[0]) <= 1e-4


def test_guidance_steers_away_from_the_negative_context(klein: Transformer) -> None:
    """One step of cfg is the published combination of the two velocities, whatever stands in the negative context."""
    start, negative = initial_noise([1], WIDTH, HEIGHT), context(tiny.KLEIN, seed=9)
    with_positive = run(klein, tiny.KLEIN, start, steps=1)[0].clean
    with_negative = next(denoise(klein, start, negative, steps=1, guidance=1.0, guidance_mode="none")).clean
    guided = run(klein, tiny.KLEIN, start, steps=1, guidance_mode="cfg", guidance=3.5, negative_context=negative)[
        0
    ].clean
    expected = with_negative + 3.5 * (with_positive - with_negative)
    assert oracle.relative_error(guided, expected) <= 1e-5
    assert oracle.relative_error(guided, with_positive) > 0.01


def test_cfg_without_a_negative_context_is_refused(klein: Transformer) -> None:
    with pytest.raises(ValueError, match="negative"):
        run(klein, tiny.KLEIN, initial_noise([1], WIDTH, HEIGHT), guidance_mode="cfg", guidance=4.0)


def test_embedded_guidance_reaches_the_model(toys: Toys) -> None:
    model = load_transformer(toys.dev.file, device=CPU, dtype=torch.float32)
    start = initial_noise([1], WIDTH, HEIGHT)
    low, high = (
        run(model, tiny.DEV, start, steps=1, guidance_mode="embedded", guidance=guidance)[0].clean
        for guidance in (1.5, 6.0)
    )
    assert oracle.relative_error(high, low) > 1e-3


def test_cached_references_equal_computing_them_at_every_step(nine: Transformer) -> None:
    """The cache saves work and nothing else: each step made with a cache that is filled afresh gives the same."""
    start, refs = initial_noise([1], WIDTH, HEIGHT), references()
    cached = run(nine, tiny.NINE, start, references=refs, reference_cache=True)
    ctx = context(tiny.NINE)
    rope = nine.rope(sequence_position_ids(ctx.shape[1], *start.shape[-2:], refs))
    tokens = [to_tokens(ref) for ref in refs]
    x = to_tokens(start)
    for step, (t, t_next) in zip(cached, itertools.pairwise(timestep_schedule(x.shape[1], 4)), strict=True):
        cache = ReferenceCache(tokens=sum(part.shape[1] for part in tokens))
        with torch.inference_mode():
            velocity = nine(torch.cat((x, *tokens), 1), ctx, torch.tensor([t]), rope, outputs=x.shape[1], cache=cache)
        x = x + (t_next - t) * velocity
        assert oracle.relative_error(step.latents, from_tokens(x, *start.shape[-2:])) <= 1e-5


def test_the_cache_spares_the_references_after_the_first_step(nine: Transformer) -> None:
    lengths = []
    hook = nine.img_in.register_forward_hook(lambda _module, inputs, _output: lengths.append(inputs[0].shape[1]))
    run(nine, tiny.NINE, initial_noise([1], WIDTH, HEIGHT), references=references(), reference_cache=True)
    hook.remove()
    assert lengths == [24 + 15 + 14, 24, 24, 24]


def test_the_cached_rule_differs_from_plain_references(nine: Transformer) -> None:
    """Otherwise comparing with it would show nothing."""
    start = initial_noise([1], WIDTH, HEIGHT)
    plain = run(nine, tiny.NINE, start, references=references())[-1].latents
    cached = run(nine, tiny.NINE, start, references=references(), reference_cache=True)[-1].latents
    assert oracle.relative_error(cached, plain) > 1e-3


def test_previews_never_change_the_result(klein: Transformer, toys: Toys) -> None:
    start = initial_noise([1, 2], WIDTH, HEIGHT)
    without = run(klein, tiny.KLEIN, start)[-1].latents
    tiny_preview = TinyPreview(load_tiny_decoder(toys.taef2, device=CPU, dtype=torch.float32))
    for preview in (LinearPreview(), tiny_preview):
        for step in denoise(klein, start, context(tiny.KLEIN), steps=4, guidance=1.0, guidance_mode="none"):
            assert preview(step.clean).shape[:2] == (2, 3)
        assert torch.equal(step.latents, without)


def test_text_beyond_float16_is_clipped_on_the_way_in(toys: Toys) -> None:
    model = load_transformer(toys.klein.file, device=CPU, dtype=torch.float16)
    context = torch.randn(1, 8, model.params.context_width, generator=torch.Generator().manual_seed(1)).bfloat16()
    context[0, 0, 0] = 9e4
    steps = denoise(model, initial_noise([1], 64, 64), context, steps=2, guidance=1.0, guidance_mode="none")
    assert all(bool(step.latents.isfinite().all()) for step in steps)
