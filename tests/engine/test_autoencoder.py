"""The autoencoder against diffusers', in every layout and geometry, nano's included."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLFlux2
from safetensors.torch import load_file
from torch import Tensor

from flux2_studio.engine.vae.autoencoder import pack_latent, unpack_latent
from flux2_studio.engine.weights.loading import load_autoencoder
from flux2_studio.settings import ASSETS
from tests import oracle, tiny
from tests.tiny import Autoencoder, Toys

CPU = torch.device("cpu")
NAMES = ("autoencoder", "deep_autoencoder", "small_decoder", "no_encoder_blocks")
LAYOUTS = ("single file", "folder", "diffusers file")


def pixels(width: int = 80, height: int = 64) -> Tensor:
    """Two different pictures, smooth with some grain, in -1..1."""
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 4, width), indexing="ij")
    smooth = torch.stack([torch.sin(x + y), torch.cos(2 * x - y), torch.sin(x * y)])
    grain = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(3))
    return (torch.stack([smooth, smooth.flip(1)]) * 0.7 + 0.1 * grain).clamp(-1, 1)


def latent() -> Tensor:
    return torch.randn(2, 128, 4, 5, generator=torch.Generator().manual_seed(4))


def path_of(toy: Autoencoder, layout: str) -> Path:
    return dict(zip(LAYOUTS, toy.layouts, strict=True))[layout]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_encoding_and_decoding_equal_diffusers(toys: Toys, name: str, layout: str) -> None:
    toy: Autoencoder = getattr(toys, name)
    model = load_autoencoder(path_of(toy, layout), device=CPU, dtype=torch.float32)
    assert oracle.relative_error(model.encode(pixels()), oracle.encode(toy.model, pixels())) <= 1e-5
    assert oracle.relative_error(model.decode(latent()), oracle.decode(toy.model, latent())) <= 1e-5


def test_the_autoencoder_of_nano_equals_diffusers() -> None:
    path = ASSETS / "nano" / "ae.safetensors"
    published = load_file(path)
    reference = AutoencoderKLFlux2(block_out_channels=(64, 64, 64, 64), layers_per_block=0).eval()
    names = tiny.bfl_autoencoder_names(reference)
    assert set(names.values()) == published.keys()
    reference.load_state_dict(
        {theirs: published[ours].reshape(reference.state_dict()[theirs].shape) for theirs, ours in names.items()}
    )
    model = load_autoencoder(path, device=CPU, dtype=torch.float32)
    assert oracle.relative_error(model.encode(pixels()), oracle.encode(reference, pixels())) <= 1e-5
    assert oracle.relative_error(model.decode(latent()), oracle.decode(reference, latent())) <= 1e-5


@pytest.mark.parametrize(("name", "size"), [("autoencoder", tiny.AUTOENCODER), ("small_decoder", tiny.SMALL_DECODER)])
def test_sizes_are_read_from_the_shapes(toys: Toys, name: str, size: tiny.AutoencoderSize) -> None:
    params = load_autoencoder(getattr(toys, name).file, device=CPU, dtype=torch.float32).params
    assert params.encoder_channels == size.encoder_channels
    assert params.decoder_channels == (size.decoder_channels or size.encoder_channels)
    assert (params.encoder_blocks, params.decoder_blocks) == (size.blocks, size.blocks + 1)
    assert (params.latent_channels, params.patch) == (32, 16)


def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers(toys: Toys) -> None:
    toy = toys.autoencoder
    ours = load_autoencoder(toy.file, device=CPU, dtype=torch.bfloat16)
    theirs = AutoencoderKLFlux2.from_pretrained(toy.folder, torch_dtype=torch.bfloat16)
    exact = oracle.decode(toy.model, latent())
    bound = 2 * oracle.relative_error(oracle.decode(theirs, latent().bfloat16()), exact)
    assert 0 < oracle.relative_error(ours.decode(latent()).float(), exact) <= bound
    exact = oracle.encode(toy.model, pixels())
    bound = 2 * oracle.relative_error(oracle.encode(theirs, pixels().bfloat16()), exact)
    assert 0 < oracle.relative_error(ours.encode(pixels()).float(), exact) <= bound


def test_packing_is_channel_major_and_undone_by_unpacking() -> None:
    x = torch.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)
    packed = pack_latent(x)
    assert packed.shape == (2, 12, 2, 3)
    for channel, row, column in ((0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1)):
        assert torch.equal(packed[:, channel * 4 + row * 2 + column], x[:, channel, row::2, column::2])
    assert torch.equal(unpack_latent(packed), x)
