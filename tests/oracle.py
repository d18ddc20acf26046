"""What diffusers makes of the same toy weights: the reference that the engine is measured against."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AutoencoderKLFlux2,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    Flux2KleinPipeline,
    Flux2Pipeline,
    Flux2Transformer2DModel,
)
from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu
from PIL import Image
from torch import Tensor

from tests.tiny import MISTRAL_TEMPLATE, Autoencoder, Flow, Text


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """latents: the last ones, normalised and packed [B, 128, h, w]; images: decoded, 8 bits a channel."""

    latents: Tensor
    images: list[Image.Image]


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """As `scheduler/scheduler_config.json` of the published repositories sets it up."""
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=1000,
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
        time_shift_type="exponential",
    )


def sigmas(tokens: int, steps: int) -> Tensor:
    """The scheduler's steps + 1 noise levels, set up as the pipelines set it up."""
    plan = scheduler()
    plan.set_timesteps(
        sigmas=torch.linspace(1.0, 1 / steps, steps).tolist(),
        mu=compute_empirical_mu(image_seq_len=tokens, num_steps=steps),
    )
    return plan.sigmas


def klein(flow: Flow, autoencoder: Autoencoder, text: Text, *, distilled: bool = True) -> DiffusionPipeline:
    """The pipeline of klein (distilled) and of klein Base (not)."""
    return _silent(
        Flux2KleinPipeline(
            scheduler=scheduler(),
            vae=autoencoder.model,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            transformer=flow.model,
            is_distilled=distilled,
        )
    )


def klein_kv(flow: Flow, autoencoder: Autoencoder, text: Text) -> DiffusionPipeline:
    """The pipeline of klein 9B KV, over its own copy of the transformer, because it changes its attention."""
    return _silent(
        Flux2KleinKVPipeline(
            scheduler=scheduler(),
            vae=autoencoder.model,
            text_encoder=text.model,
            tokenizer=text.tokenizer,
            transformer=copy.deepcopy(flow.model),
        )
    )


def dev(flow: Flow, autoencoder: Autoencoder, text: Text) -> DiffusionPipeline:
    """The pipeline of dev. It needs no more of the processor than its tokenizer and chat template."""
    return _silent(
        Flux2Pipeline(
            scheduler=scheduler(),
            vae=autoencoder.model,
            text_encoder=text.model,
            tokenizer=mistral_tokenizer(text),
            transformer=flow.model,
        )
    )


def mistral_tokenizer(text: Text) -> Any:
    """The tokenizer with the processor's chat template."""
    tokenizer = copy.deepcopy(text.tokenizer)
    tokenizer.chat_template = MISTRAL_TEMPLATE
    return tokenizer


def run(pipeline: DiffusionPipeline, noise: Tensor, **arguments: Any) -> Outcome:
    """Run `pipeline` from `noise` [B, 128, h, w], at the picture size that the noise has."""
    _, _, h, w = noise.shape
    last: dict[str, Tensor] = {}

    def keep(_pipeline: DiffusionPipeline, _step: int, _time: Tensor, values: dict[str, Tensor]) -> dict[str, Tensor]:
        last.update(values)
        return {}

    images = pipeline(
        latents=noise,
        height=16 * h,
        width=16 * w,
        callback_on_step_end=keep,
        callback_on_step_end_tensor_inputs=["latents"],
        **arguments,
    ).images
    return Outcome(latents=last["latents"].transpose(1, 2).reshape(noise.shape), images=images)


def prompt_embeddings(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """[B, 512, taps * width]."""
    with torch.no_grad():
        return pipeline.encode_prompt(prompt=list(prompts))[0]


def velocity(
    model: Flux2Transformer2DModel,
    x: Tensor,
    ctx: Tensor,
    t: Tensor,
    x_ids: Tensor,
    ctx_ids: Tensor,
    guidance: Tensor | None = None,
) -> Tensor:
    """One evaluation: x [B, N, 128], ctx [B, L, C], t and guidance [B], ids [tokens, 4]."""
    with torch.no_grad():
        return model(
            hidden_states=x,
            encoder_hidden_states=ctx,
            timestep=t,
            img_ids=x_ids,
            txt_ids=ctx_ids,
            guidance=guidance,
            return_dict=False,
        )[0]


def encode(model: AutoencoderKLFlux2, pixels: Tensor) -> Tensor:
    """Normalised packed latent of pixels in -1..1, by the pipelines' own arithmetic."""
    with torch.no_grad():
        packed = Flux2Pipeline._patchify_latents(model.encode(pixels).latent_dist.mode())
        return (packed - _mean(model)) / _deviation(model)


def decode(model: AutoencoderKLFlux2, latent: Tensor) -> Tensor:
    """Pixels of a normalised packed latent, by the pipelines' own arithmetic."""
    with torch.no_grad():
        return model.decode(Flux2Pipeline._unpatchify_latents(latent * _deviation(model) + _mean(model))).sample


def _mean(model: AutoencoderKLFlux2) -> Tensor:
    return model.bn.running_mean[None, :, None, None]


def _deviation(model: AutoencoderKLFlux2) -> Tensor:
    return (model.bn.running_var + model.config.batch_norm_eps).sqrt()[None, :, None, None]


def _silent(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def relative_error(value: Tensor, reference: Tensor) -> float:
    """The relative L2 distance of `value` from `reference`."""
    assert value.shape == reference.shape, f"{tuple(value.shape)} is not {tuple(reference.shape)}"
    return float((value.double() - reference.double()).norm() / reference.double().norm())


def largest_difference(images: Sequence[Image.Image], references: Sequence[Image.Image]) -> int:
    """The largest difference of any 8-bit channel of any pixel between two lists of pictures."""
    assert [image.size for image in images] == [image.size for image in references]
    return max(
        int((_levels(image) - _levels(reference)).abs().max())
        for image, reference in zip(images, references, strict=True)
    )


def _levels(image: Image.Image) -> Tensor:
    assert image.mode == "RGB"
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()
