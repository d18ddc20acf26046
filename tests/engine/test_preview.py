"""Previews: the linear projection, and TAEF2's decoder in both spellings of its keys, also with its real weights."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flux2_studio.engine.vae.autoencoder import unpack_latent
from flux2_studio.engine.vae.preview import LINEAR_BIAS, LINEAR_FACTORS, AutoencoderPreview, LinearPreview, TinyPreview
from flux2_studio.engine.weights.loading import load_autoencoder, load_tiny_decoder
from tests import oracle, tiny
from tests.tiny import Toys

CPU = torch.device("cpu")
# TAEF2's published .pth files are not part of this repository: a folder beside the checkout may hold them.
PUBLISHED = Path(os.environ.get("FLUX2_TEST_TAEF2", Path(__file__).resolve().parents[3] / "shared" / "taef2"))


def clean() -> Tensor:
    return torch.randn(2, 128, 3, 4, generator=torch.Generator().manual_seed(8))


def test_the_linear_preview_is_the_published_projection() -> None:
    pixels = LinearPreview()(clean())
    assert pixels.shape == (2, 3, 6, 8)
    latent = clean()
    for picture, y, x in ((0, 0, 0), (0, 5, 7), (1, 3, 2)):
        channels = [latent[picture, 4 * c + 2 * (y % 2) + x % 2, y // 2, x // 2].item() for c in range(32)]
        for colour in range(3):
            weighted = sum(value * LINEAR_FACTORS[c][colour] for c, value in enumerate(channels))
            in_0_1 = (weighted + LINEAR_BIAS[colour] + 1) / 2
            assert pixels[picture, colour, y, x].item() / 2 + 0.5 == pytest.approx(in_0_1, abs=1e-6)


def test_the_linear_factors_are_the_published_ones() -> None:
    """A checksum of the table as ComfyUI and InvokeAI print it, and a few of its rows."""
    assert len(LINEAR_FACTORS) == 32
    assert LINEAR_BIAS == (-0.0329, -0.0718, -0.0851)
    assert LINEAR_FACTORS[3] == (0.2144, 0.3009, 0.3652)
    assert LINEAR_FACTORS[8] == (-0.3527, -0.2712, -0.1666)
    assert LINEAR_FACTORS[31] == (-0.0111, -0.0460, -0.0614)
    sums = [sum(row[colour] * (c + 1) for c, row in enumerate(LINEAR_FACTORS)) for colour in range(3)]
    assert sums == pytest.approx((-0.8335, -1.6564, -3.4132), abs=1e-9)


def spellings(decoder: dict[str, Tensor], encoder: dict[str, Tensor], folder: Path) -> dict[str, Path]:
    return {
        "pth indices": tiny.save_state(decoder, folder / "taef2_decoder.safetensors"),
        "hub": tiny.save_state(tiny.taef2_hub_names(decoder, encoder), folder / "taef2.safetensors"),
    }


@pytest.mark.parametrize("spelling", ["pth indices", "hub"])
def test_the_tiny_decoder_equals_its_description(tmp_path: Path, spelling: str) -> None:
    decoder, encoder = tiny.taef2_decoder(), tiny.taef2_encoder()
    tiny.randomise(decoder, 41)
    tiny.randomise(encoder, 42)
    files = spellings(decoder.state_dict(), encoder.state_dict(), tmp_path)
    ours = load_tiny_decoder(files[spelling], device=CPU, dtype=torch.float32)
    latent = 4 * unpack_latent(clean())  # far enough out for the clamp to matter
    with torch.no_grad():
        assert oracle.relative_error(ours(latent), decoder(latent)) <= 1e-5


def test_the_tiny_preview_unpacks_and_scales(toys: Toys) -> None:
    decoder = tiny.taef2_decoder()
    hub = load_file(toys.taef2)
    decoder.load_state_dict(
        {
            key: hub[f"decoder.layers.{int(key.split('.')[0]) - 1}.{key.split('.', 1)[1]}"]
            for key in decoder.state_dict()
        }
    )
    pixels = TinyPreview(load_tiny_decoder(toys.taef2, device=CPU, dtype=torch.float32))(clean())
    assert pixels.shape == (2, 3, 48, 64)
    with torch.no_grad():
        assert oracle.relative_error((pixels + 1) / 2, decoder(unpack_latent(clean()))) <= 1e-5


def test_a_checkpoints_own_decoder_previews_what_it_will_decode(toys: Toys) -> None:
    model = load_autoencoder(toys.autoencoder.file, device=CPU, dtype=torch.float32)
    assert torch.equal(AutoencoderPreview(model)(clean()), model.decode(clean()))


def photograph() -> Tensor:
    """A made-up landscape, RGB [1, 3, 256, 256] in 0..1: soft sky, hills with edges, fine grain."""
    generator = torch.Generator().manual_seed(12)
    y, x = torch.meshgrid(torch.linspace(0, 1, 256), torch.linspace(0, 1, 256), indexing="ij")
    sky = torch.stack([0.45 + 0.35 * y, 0.6 + 0.25 * y, 0.85 - 0.05 * y])
    sun = torch.exp(-80 * ((x - 0.7) ** 2 + (y - 0.25) ** 2))
    picture = sky + sun * torch.tensor([0.3, 0.2, -0.1])[:, None, None]
    for level, colour in ((0.5, (0.35, 0.45, 0.5)), (0.65, (0.25, 0.4, 0.2)), (0.82, (0.3, 0.22, 0.12))):
        ridge = level + 0.05 * torch.sin(9 * x + 40 * level) + 0.02 * torch.sin(31 * x)
        shade = 0.85 + 0.3 * (y - ridge)
        hill = torch.tensor(colour)[:, None, None] * shade
        picture = torch.where(y > ridge, hill, picture)
    grain = torch.nn.functional.avg_pool2d(torch.randn(1, 3, 258, 258, generator=generator), 3, stride=1)
    return (picture[None] + 0.02 * grain).clamp(0, 1)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"TAEF2's published weights are not at {PUBLISHED}")
def test_the_published_weights_decode_what_their_encoder_wrote(tmp_path: Path) -> None:
    states = {
        half: {
            key: tensor.float()
            for key, tensor in torch.load(
                PUBLISHED / f"taef2_{half}.pth", weights_only=True, map_location="cpu"
            ).items()
        }
        for half in ("decoder", "encoder")
    }
    decoder, encoder = tiny.taef2_decoder(), tiny.taef2_encoder()
    decoder.load_state_dict(states["decoder"])
    encoder.load_state_dict(states["encoder"])
    picture = photograph()
    with torch.no_grad():
        latent = encoder(picture)
        expected = decoder(latent)
    for path in spellings(states["decoder"], states["encoder"], tmp_path).values():
        ours = load_tiny_decoder(path, device=CPU, dtype=torch.float32)
        with torch.no_grad():
            decoded = ours(latent)
        assert oracle.relative_error(decoded, expected) <= 1e-5
        error = (decoded.clamp(0, 1) - picture).square().mean().item()
        assert -10 * math.log10(error) >= 28, "published round trips of photographs are at 30 to 32 dB"
