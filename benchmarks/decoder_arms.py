"""The decoder's arms: latents to pixels, by ours and by diffusers' autoencoder, over the same weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import LINEAR
from benchmarks.measuring import installed, time_on
from benchmarks.synthetic import fill, shapes_of
from benchmarks.transformer_arms import OURS, THEIRS
from flux2_studio.engine.params import AutoencoderParams
from flux2_studio.engine.vae.autoencoder import Autoencoder, unpack_latent
from flux2_studio.engine.weights.layouts import autoencoder_plan

DECODING = "decoding"

Decode = Callable[[Tensor], Tensor]  # latent [1, 128, h, w] -> pixels [1, 3, 16h, 16w]


def latent_of(params: AutoencoderParams, side: int, device: torch.device) -> Tensor:
    """Of a picture of side x side pixels, in float32 as the denoising loop gives it."""
    at = side // params.patch
    generator = torch.Generator().manual_seed(4)
    return torch.randn(1, 4 * params.latent_channels, at, at, generator=generator).to(device)


# --- the floor ---


def work(params: AutoencoderParams, side: int) -> float:
    """Operations that one picture takes: convolutions, and attention at the bottom. Norms and sums do not count."""
    channels = params.decoder_channels
    pixels = (side // 2 ** (len(channels) - 1)) ** 2
    inner = channels[-1]

    def conv(inputs: int, outputs: int, kernel: int = 3) -> int:
        return 2 * kernel**2 * inputs * outputs * pixels

    def residual(inputs: int, outputs: int) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        return conv(inputs, outputs) + conv(outputs, outputs) + shortcut

    latent = params.latent_channels
    operations = conv(latent, latent, 1) + conv(latent, inner)
    operations += 2 * residual(inner, inner) + 4 * conv(inner, inner, 1) + 4 * pixels**2 * inner
    for level in reversed(range(len(channels))):
        for _ in range(params.decoder_blocks):
            operations += residual(inner, channels[level])
            inner = channels[level]
        if level:
            pixels *= 4
            operations += conv(inner, inner)
    return operations + conv(inner, 3)


def floor(params: AutoencoderParams, side: int, rates: Mapping[str, float]) -> float:
    """Seconds, were a convolution as quick as a product of matrices."""
    return work(params, side) / rates[LINEAR]


# --- the arms ---


def made(params: AutoencoderParams, device: torch.device, dtype: torch.dtype) -> Autoencoder:
    """With random weights; its statistics in float32, as they are loaded."""
    with torch.device("meta"):
        model = Autoencoder(params)
    fill(model, seed=2, device=device, dtype=dtype)
    model.bn.float()
    return model.eval()


def sharing(model: Autoencoder) -> Any:
    """diffusers' autoencoder with the very weights of `model`, in the same memory but for the statistics."""
    params = model.params
    diffusers = importlib.import_module("diffusers")
    with torch.device("meta"):
        other = diffusers.AutoencoderKLFlux2(
            block_out_channels=params.encoder_channels,
            decoder_block_out_channels=params.decoder_channels,
            layers_per_block=params.encoder_blocks,
            latent_channels=params.latent_channels,
        )
    shapes = shapes_of(other)
    ours = model.state_dict()
    state = {"bn.num_batches_tracked": torch.zeros((), dtype=torch.long, device=model.device)}
    for target, source in autoencoder_plan(shapes).items():
        (name,) = source.names
        state[name] = ours[target].view(shapes[name]).to(model.dtype)
    other.load_state_dict(state, assign=True)
    return other.requires_grad_(False).eval()


def our_ways(model: Autoencoder) -> dict[str, Decode]:
    """Further ways of ours are added here."""
    return {OURS: model.decode}


def their_ways(model: Autoencoder) -> dict[str, Decode]:
    """diffusers over the weights of `model`; none where it is not installed."""
    return {THEIRS: theirs(sharing(model))} if installed("diffusers") else {}


def theirs(model: Any) -> Decode:
    """What the pipelines do after the last step."""

    @torch.inference_mode()
    def decode(latent: Tensor) -> Tensor:
        mean, variance = (
            tensor[None, :, None, None].to(latent) for tensor in (model.bn.running_mean, model.bn.running_var)
        )
        latent = latent * torch.sqrt(variance + model.config.batch_norm_eps) + mean
        pixels: Tensor = model.decode(unpack_latent(latent).to(model.dtype), return_dict=False)[0]
        return pixels

    return decode


# --- measuring ---


def time_side(
    ways: Mapping[str, Decode],
    params: AutoencoderParams,
    side: int,
    rates: Mapping[str, float],
    *,
    device: torch.device,
    rounds: int,
    warmups: int,
    limit: float | None = None,
) -> dict[str, Any]:
    """Seconds of every way for a picture of side x side pixels, and what they are to diffusers and the floor."""
    latent = latent_of(params, side, device)
    works = {name: _bound(decode, latent) for name, decode in ways.items()}
    arms = time_on(device, works, rounds=rounds, warmups=warmups, limit=limit)
    least = floor(params, side, rates)
    for figures in arms.values():
        if THEIRS in arms:
            figures["times diffusers"] = arms[THEIRS]["median"] / figures["median"]
        figures["times the floor"] = figures["median"] / least
    return {"floor": least, "seconds": {DECODING: arms}}


def _bound(decode: Decode, latent: Tensor) -> Callable[[], Tensor]:
    return lambda: decode(latent)


def errors(ways: Mapping[str, Decode], model: Autoencoder, side: int) -> dict[str, float]:
    """The relative L2 error of each way's pixels against the same weights in float32."""
    latent = latent_of(model.params, side, model.device)
    with torch.device("meta"):
        exact = Autoencoder(model.params)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()}, assign=True)
    # By itself cuDNN rounds what it multiplies in float32 to ten bits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        reference = exact.eval().requires_grad_(False).decode(latent).double()
    return {
        name: float((decode(latent).double() - reference).norm() / reference.norm()) for name, decode in ways.items()
    }
