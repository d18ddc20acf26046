"""The plan's peaks against what a session really takes, allocations counted by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.profiler import ProfilerActivity, profile

from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.images.tensors import images_from_pixels
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import (
    DECODING_STAGE,
    DENOISING_STAGE,
    PROMPT_STAGE,
    REFERENCES_STAGE,
    RequestShape,
)
from flux2_studio.models.session import Session
from flux2_studio.settings import Settings

SIDE = 256


def silent(text: str, fraction: float | None) -> None:
    pass


def taken(run: Callable[[], Any]) -> int:
    """The most bytes alive at once that `run` allocates, weights that it loads aside."""
    with torch.inference_mode(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = sorted(
        (event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"),
        key=lambda event: event.start_ns(),
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.fixture
def models(tmp_path: Path) -> ModelManager:
    settings = Settings(home=tmp_path)
    return ModelManager(settings, Hub(settings))


def open_session(models: ModelManager, name: str, workload: RequestShape) -> Session:
    settings = models._settings
    session = models.open(settings.checkpoint(name), workload, silent)
    session.preload(silent)
    return session


@pytest.mark.parametrize("name", ["nano", "nano-base"])
@pytest.mark.parametrize("references", [0, 2])
def test_each_stage_takes_what_was_planned(models: ModelManager, name: str, references: int) -> None:
    picture = Image.effect_noise((SIDE, SIDE), 60).convert("RGB")
    guided = name == "nano-base"
    workload = RequestShape(width=SIDE, height=SIDE, use_cfg=guided, references=(picture.size,) * references)
    session = open_session(models, name, workload)
    plan = session.plan
    prompts = ["a red fox", "grey"] if guided else ["a red fox"]
    encoded = session.encode_prompts(prompts, silent)
    drawn = session.prepare_transformer(silent)
    latents = [session.encode_reference(picture, silent) for _ in range(references)]
    final = initial_noise([1], SIDE, SIDE, drawn.transformer.params.in_channels)

    def draw() -> None:
        assert drawn.previewer is not None
        for step in denoise(
            drawn.transformer,
            final,
            encoded.context[:1],
            steps=2,
            guidance=2.0 if guided else 1.0,
            guidance_mode=session.checkpoint.guidance_mode,
            negative_context=encoded.context[1:] if guided else None,
            references=latents,
        ):
            images_from_pixels(drawn.previewer(step.clean))

    measured = {DENOISING_STAGE: taken(draw), DECODING_STAGE: taken(lambda: session.decode(final, silent))}
    if references:
        # not one that is remembered
        other = Image.effect_noise((SIDE, SIDE), 50).convert("RGB")
        measured[REFERENCES_STAGE] = taken(lambda: session.encode_reference(other, silent))
    for stage, peak in measured.items():
        assert peak == pytest.approx(plan.stage(stage).activations, rel=0.15), stage
    # So short a prompt takes less than PyTorch's own odds and ends, of which a few hundred kilobytes are allowed.
    reading = taken(lambda: session.encode_prompts([*prompts[1:], "a blue owl"], silent))
    assert reading < plan.stage(PROMPT_STAGE).activations + 500_000
    held = models._residency.device_bytes
    assert plan.is_resident and held == pytest.approx(plan.stage(DENOISING_STAGE).weights, rel=0.01)
    assert held + max(measured.values()) == pytest.approx(plan.peak, rel=0.15)
