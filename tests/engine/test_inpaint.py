"""What a mask leaves is held at every step: exact values, and through the whole loop."""

from __future__ import annotations

import pytest
import torch

from flux2_studio.engine.flux.inpaint import InpaintMask, blend_known_region
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise, timestep_schedule
from flux2_studio.engine.weights.loading import load_transformer
from tests.tiny import Toys

CPU = torch.device("cpu")


def test_hold_is_the_straight_line_between_picture_and_noise() -> None:
    x, start = torch.full((2, 3, 4), 5.0), torch.full((2, 3, 4), -2.0)
    clean = torch.full((1, 3, 4), 8.0)
    change = torch.tensor([True, False, False])
    held = blend_known_region(x, change, clean, start, 0.25)
    assert held.shape == x.shape
    assert (held[:, 0] == 5).all()
    assert (held[:, 1:] == 0.75 * 8 + 0.25 * -2).all()
    assert torch.equal(blend_known_region(x, change, clean, start, 0.0)[:, 1:], clean[:, 1:].expand(2, -1, -1))
    assert torch.equal(blend_known_region(x, change, clean, start, 1.0)[:, 1:], start[:, 1:])


@pytest.mark.parametrize("guiding", ["none", "cfg"])
def test_every_step_holds_what_is_outside(toys: Toys, guiding: str) -> None:
    model = load_transformer(toys.klein.file, device=CPU, dtype=torch.float32)
    start = initial_noise([1, 2], 64, 96)
    clean = initial_noise([9], 64, 96)
    change = torch.zeros(6, 4, dtype=torch.bool)
    change[1:3, 2:] = True
    context = torch.randn(1, 5, model.params.context_width, generator=torch.Generator().manual_seed(3))
    steps = list(
        denoise(
            model,
            start,
            context,
            steps=3,
            guidance=2.0,
            guidance_mode=guiding,  # type: ignore[arg-type]
            negative_context=context * 0.5,
            references=[clean],
            inpaint=InpaintMask(known_latent=clean, editable=change),
        )
    )
    for step, t in zip(steps, timestep_schedule(24, 3)[1:], strict=True):
        expected = (1 - t) * clean + t * start
        assert torch.equal(step.latents[..., ~change], expected[..., ~change])
        assert torch.equal(step.clean[..., ~change], clean.expand(2, -1, -1, -1)[..., ~change])
        assert not torch.allclose(step.latents[..., change], expected[..., change])
