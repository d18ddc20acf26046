"""The autoencoder in strips against the whole one: the same values, no seams, and really less memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiling import Strips
from flux2_studio.engine.weights.loading import load_autoencoder
from flux2_studio.images.tensors import images_from_pixels, pixels_from_image
from flux2_studio.settings import ASSETS
from tests import oracle
from tests.tiny import Toys

CPU = torch.device("cpu")
META = torch.device("meta")
NAMES = ("autoencoder", "deep_autoencoder", "small_decoder", "no_encoder_blocks", "nano")
# Width and height, then the height of a strip: many strips, a lower last one, one row of latents each, a single strip.
CUTS = [((48, 96), 32), ((32, 80), 32), ((80, 64), 16), ((16, 16), 16), ((64, 32), 48)]


@pytest.fixture(scope="module")
def load(toys: Toys) -> Callable[..., Autoencoder]:
    def load(name: str, dtype: torch.dtype = torch.float32) -> Autoencoder:
        file = ASSETS / "nano" / "ae.safetensors" if name == "nano" else getattr(toys, name).file
        return load_autoencoder(file, device=CPU, dtype=dtype)

    return load


def noise(width: int, height: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    """Pixels and a latent of that size, both noise that is brighter at the bottom, so that strips differ."""
    generator = torch.Generator().manual_seed(width + height)
    slope = torch.linspace(-1, 1, height // 16)[:, None]
    latent = torch.randn(batch, 128, height // 16, width // 16, generator=generator) + slope
    pixels = torch.rand(batch, 3, height, width, generator=generator) - torch.linspace(0, 1, height)[:, None]
    return pixels, latent


def gradient(size: int) -> Image.Image:
    """A smooth picture: every channel slopes another way."""
    y, x = torch.meshgrid(torch.linspace(0, 1, size), torch.linspace(0, 1, size), indexing="ij")
    levels = torch.stack([x, y, 1 - (x + y) / 2], -1) * 255
    return Image.fromarray(levels.round().to(torch.uint8).numpy())


def icon(size: int) -> Image.Image:
    with Image.open(ASSETS / "examples" / "fox.png") as image:
        return image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS)


@pytest.mark.parametrize("name", NAMES)
def test_strips_equal_the_whole(load: Callable[..., Autoencoder], name: str) -> None:
    model = load(name)
    for size, rows in CUTS:
        pixels, latent = noise(*size)
        torch.testing.assert_close(model.encode(pixels, rows), model.encode(pixels), atol=1e-4, rtol=0)
        torch.testing.assert_close(model.decode(latent, rows), model.decode(latent), atol=1e-4, rtol=0)


def test_strips_equal_diffusers(load: Callable[..., Autoencoder], toys: Toys) -> None:
    model, reference = load("small_decoder"), toys.small_decoder.model
    pixels, latent = noise(48, 80)
    assert oracle.relative_error(model.encode(pixels, 32), oracle.encode(reference, pixels)) <= 1e-5
    assert oracle.relative_error(model.decode(latent, 32), oracle.decode(reference, latent)) <= 1e-5


def test_statistics_are_stable_far_from_zero() -> None:
    """At a mean of 1000 deviations, a difference of large squares would keep hardly a digit of the variance."""
    x = (
        1000
        + torch.randn(1, 64, 50, 20, generator=torch.Generator().manual_seed(5)) * torch.linspace(1, 2, 50)[:, None]
    )
    norm = nn.GroupNorm(32, 64)
    strips = Strips(CPU, None)
    with torch.inference_mode():
        for strip in x.split(16, 2):
            strips.append(strip)
        exact = F.group_norm(x.double(), 32).float()
        torch.testing.assert_close(strips.group_norm_fn(norm)(x), exact, atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("picture", [gradient, icon])
def test_pictures_are_the_same_within_one_level(
    load: Callable[..., Autoencoder], picture: Callable[[int], Image.Image], dtype: torch.dtype
) -> None:
    model = load("nano", dtype)
    latent = model.encode(pixels_from_image(picture(128)))
    whole = images_from_pixels(model.decode(latent))
    assert oracle.largest_difference(images_from_pixels(model.decode(latent, 32)), whole) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_there_is_no_seam(load: Callable[..., Autoencoder], dtype: torch.dtype) -> None:
    """Rows beside a border are no farther from the whole picture than others are, nor is there a shift of colour."""
    model, rows = load("nano", dtype), 32
    latent = model.encode(pixels_from_image(gradient(192)))[..., :4]  # a third of its columns
    difference = (model.decode(latent, rows).float() - model.decode(latent).float()).double()
    error = difference.square().mean((0, 1, 3)).sqrt()  # per row
    beside = (torch.arange(192) % rows == 0) | (torch.arange(192) % rows == rows - 1)
    beside[[0, -1]] = False  # the picture's own edges
    floor = torch.finfo(dtype).eps * 0.1  # where hardly a value differs at all, chance alone would decide
    assert error[beside].mean() <= 1.5 * error[~beside].mean() + floor
    assert difference.mean((2, 3)).abs().max() <= torch.finfo(dtype).eps


def test_the_height_of_a_strip_is_a_multiple_of_16(load: Callable[..., Autoencoder]) -> None:
    model = load("autoencoder")
    pixels, latent = noise(32, 32)
    for rows in (0, -16, 8, 24):
        with pytest.raises(ValueError, match="multiple of 16"):
            model.encode(pixels, rows)
        with pytest.raises(ValueError, match="multiple of 16"):
            model.decode(latent, rows)


class Ledger(TorchDispatchMode):
    """Counts the bytes of all tensors on `device` that are alive at once.

    What meta tensors would send to the host becomes a host tensor that takes no room.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.alive = self.peak = 0
        self.sent = 0  # bytes that went to the host
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") == CPU and args and isinstance(args[0], Tensor) and args[0].is_meta:
            self.sent += args[0].nbytes
            return torch.empty((), dtype=args[0].dtype).expand(args[0].shape)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **kwargs)
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and x.device == self.device:
                storage = x.untyped_storage()
                if storage._cdata not in self._known | given:
                    self._known.add(storage._cdata)
                    self.alive += storage.nbytes()
                    self.peak = max(self.peak, self.alive)
                    weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return out

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def peak(run: Callable[[], Tensor], device: torch.device = CPU) -> Ledger:
    with Ledger(device) as ledger:
        run()
    return ledger


@pytest.mark.parametrize("name", ["nano", "deep_autoencoder"])
def test_strips_take_less_memory(load: Callable[..., Autoencoder], name: str) -> None:
    model = load(name)
    pixels, latent = noise(64, 512, batch=1)
    assert peak(partial(model.decode, latent, 64)).peak <= 0.6 * peak(partial(model.decode, latent)).peak
    assert peak(partial(model.encode, pixels, 64)).peak <= 0.6 * peak(partial(model.encode, pixels)).peak


def test_a_second_picture_takes_no_more_than_its_pixels(load: Callable[..., Autoencoder]) -> None:
    model = load("nano")
    pixels, latent = noise(64, 256)
    one, two = (peak(partial(model.decode, latent[:n], 32)).peak for n in (1, 2))
    assert two - one <= 4 * pixels[:1].nbytes


def test_with_a_store_the_device_holds_strips_only(load: Callable[..., Autoencoder]) -> None:
    """On meta tensors, as the memory plan counts: all maps go to the host, and come back strip by strip."""
    model = load("nano").to(META)
    pixels, latent = (x.to(META) for x in noise(64, 512, batch=1))
    for run, x in ((model.decode, latent), (model.encode, pixels)):
        whole, strips = peak(partial(run, x), META), peak(partial(run, x, 64, CPU), META)
        assert strips.sent >= 0.5 * whole.peak
        assert strips.peak <= 0.2 * whole.peak


def test_a_store_changes_nothing(load: Callable[..., Autoencoder]) -> None:
    model = load("autoencoder")
    pixels, latent = noise(48, 64)
    assert torch.equal(model.encode(pixels, 32, CPU), model.encode(pixels, 32))
    assert torch.equal(model.decode(latent, 32, CPU), model.decode(latent, 32))
