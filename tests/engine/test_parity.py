"""From prompt and noise to pixels: the engine's parts put together, against diffusers' pipelines on the same toys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLFlux2, DiffusionPipeline, Flux2Transformer2DModel
from PIL import Image
from torch import Tensor

from flux2_studio.checkpoints import DEV, KLEIN_4B, KLEIN_9B_KV, KLEIN_BASE_4B, Checkpoint
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.text.encoder import TextEncoder, load_text_encoder
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.weights.loading import load_autoencoder, load_transformer
from flux2_studio.events import Result
from flux2_studio.images.references import fit
from flux2_studio.images.tensors import images_from_pixels, pixels_from_image
from flux2_studio.request import Request
from flux2_studio.studio import Studio
from tests import oracle, tiny
from tests.oracle import Outcome
from tests.tiny import Toys

CPU = torch.device("cpu")
PROMPT = "a photo of a red house by the river at night, 夜"
WIDTH, HEIGHT = 96, 64


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A smooth colourful picture with some grain."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, 3, 4, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")
    values = smooth + 0.05 * torch.randn(smooth.shape, generator=generator)
    return Image.fromarray((values[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).contiguous().numpy(), "RGB")


ONE = (picture(80, 64, seed=1),)
TWO = (picture(80, 64, seed=1), picture(64, 112, seed=2))
UNEVEN = (picture(91, 77, seed=3),)  # not multiples of 16: the oracle crops it


def cropped(image: Image.Image) -> Image.Image:
    """`image` as the oracle crops it, in the middle to multiples of 16. The studio pads it instead."""
    width, height = image.width // 16 * 16, image.height // 16 * 16
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


@dataclass
class Parts:
    """The engine's parts of one checkpoint, loaded from toy files and used as a caller would use them."""

    checkpoint: Checkpoint
    flow: Path
    autoencoder_path: Path
    text: Path
    dtype: torch.dtype = torch.float32

    @cached_property
    def transformer(self) -> Transformer:
        return load_transformer(self.flow, device=CPU, dtype=self.dtype)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return load_autoencoder(self.autoencoder_path, device=CPU, dtype=self.dtype)

    @cached_property
    def encoder(self) -> TextEncoder:
        return load_text_encoder(self.text, self.text, self.checkpoint.recipe, device=CPU, dtype=self.dtype)

    def run(
        self,
        start: Tensor,
        *,
        references: Sequence[Image.Image] = (),
        steps: int = 4,
        guidance: float = 1.0,
        negative: str = "",
        prompt: str = PROMPT,
    ) -> Outcome:
        checkpoint = self.checkpoint
        cap = checkpoint.max_pixels_per_reference(len(references))
        latents = [self.autoencoder.encode(pixels_from_image(cropped(fit(image, cap)))) for image in references]
        guided = checkpoint.guidance_mode == "cfg"
        *_, last = denoise(
            self.transformer,
            start,
            self.encoder.encode([prompt]).context,
            steps=steps,
            guidance=guidance,
            guidance_mode=checkpoint.guidance_mode,
            negative_context=self.encoder.encode([negative]).context if guided else None,
            references=latents,
            reference_cache=checkpoint.caches_reference_kv,
        )
        return Outcome(latents=last.latents, images=images_from_pixels(self.autoencoder.decode(last.latents)))


@pytest.fixture(scope="module")
def klein(toys: Toys) -> Parts:
    return Parts(KLEIN_4B, toys.klein.file, toys.autoencoder.file, toys.qwen.folder)


@pytest.fixture(scope="module")
def base(toys: Toys) -> Parts:
    return Parts(KLEIN_BASE_4B, toys.klein_base.sharded, toys.autoencoder.folder, toys.qwen.folder)


@pytest.fixture(scope="module")
def kv(toys: Toys) -> Parts:
    return Parts(KLEIN_9B_KV, toys.nine.folder, toys.small_decoder.file, toys.wide_qwen.folder)


@pytest.fixture(scope="module")
def dev(toys: Toys) -> Parts:
    return Parts(DEV, toys.dev.file, toys.autoencoder.file, toys.mistral.folder)


def start(seed: int = 1) -> Tensor:
    return initial_noise([seed], WIDTH, HEIGHT)


def compare(ours: Outcome, theirs: Outcome) -> None:
    assert oracle.relative_error(ours.latents, theirs.latents) <= 1e-4
    assert oracle.largest_difference(ours.images, theirs.images) <= 1


def reference_run(pipeline: DiffusionPipeline, references: Sequence[Image.Image] = (), **arguments: Any) -> Outcome:
    settings: dict[str, Any] = {"prompt": PROMPT, "num_inference_steps": 4, "image": list(references) or None}
    return oracle.run(pipeline, start(), **{**settings, **arguments})


@pytest.mark.parametrize("references", [(), ONE, TWO, UNEVEN], ids=["text", "one", "two", "uneven"])
def test_klein(klein: Parts, toys: Toys, references: Sequence[Image.Image]) -> None:
    pipeline = oracle.klein(toys.klein, toys.autoencoder, toys.qwen)
    compare(klein.run(start(), references=references), reference_run(pipeline, references, guidance_scale=1.0))


@pytest.mark.parametrize("references", [(), TWO], ids=["text", "two"])
@pytest.mark.parametrize("negative", ["", "dark, green mountain"], ids=["empty", "negative prompt"])
def test_base_with_cfg(base: Parts, toys: Toys, negative: str, references: Sequence[Image.Image]) -> None:
    pipeline = oracle.klein(toys.klein_base, toys.autoencoder, toys.qwen, distilled=False)
    embeddings = oracle.prompt_embeddings(pipeline, [negative])
    expected = reference_run(
        pipeline, references, guidance_scale=4.0, num_inference_steps=6, negative_prompt_embeds=embeddings
    )
    compare(base.run(start(), references=references, guidance=4.0, steps=6, negative=negative), expected)


@pytest.mark.parametrize("references", [(), ONE, TWO], ids=["text", "one", "two"])
def test_dev(dev: Parts, toys: Toys, references: Sequence[Image.Image]) -> None:
    pipeline = oracle.dev(toys.dev, toys.autoencoder, toys.mistral)
    expected = reference_run(pipeline, references, guidance_scale=3.5, num_inference_steps=5)
    compare(dev.run(start(), references=references, guidance=3.5, steps=5), expected)


@pytest.mark.parametrize("references", [(), ONE, TWO], ids=["text", "one", "two"])
def test_klein_kv(kv: Parts, toys: Toys, references: Sequence[Image.Image]) -> None:
    pipeline = oracle.klein_kv(toys.nine, toys.small_decoder, toys.wide_qwen)
    compare(kv.run(start(), references=references), reference_run(pipeline, references))


@pytest.mark.parametrize("name", ["klein-4b", "klein-base-4b", "klein-9b-kv", "dev"])
def test_the_studio_saves_what_diffusers_draws(toys: Toys, tmp_path: Path, name: str) -> None:
    """The whole way: a request with two files as references and a count of two, to the files that were saved."""
    paths = []
    for number, image in enumerate(TWO):
        paths.append(tmp_path / f"{number}.png")
        image.save(paths[-1])
    settings = toys.settings(tmp_path / "home", [name])
    checkpoint = settings.checkpoint(name)
    request = Request(
        prompt=PROMPT,
        negative_prompt="dark" if checkpoint.supports_negative_prompt else None,
        references=tuple(paths),
        width=WIDTH,
        height=HEIGHT,
        steps=None if checkpoint.steps_fixed else 5,
        seed=21,
        count=2,
    )
    *_, result = Studio(settings).generate(request)
    assert isinstance(result, Result)
    pipeline, arguments = {
        "klein-4b": lambda: (oracle.klein(toys.klein, toys.autoencoder, toys.qwen), {"guidance_scale": 1.0}),
        "klein-base-4b": lambda: (
            oracle.klein(toys.klein_base, toys.autoencoder, toys.qwen, distilled=False),
            {"guidance_scale": 4.0},
        ),
        "klein-9b-kv": lambda: (oracle.klein_kv(toys.nine, toys.autoencoder, toys.wide_qwen), {}),
        "dev": lambda: (oracle.dev(toys.dev, toys.autoencoder, toys.mistral), {"guidance_scale": 4.0}),
    }[name]()
    if checkpoint.supports_negative_prompt:
        arguments["negative_prompt_embeds"] = oracle.prompt_embeddings(pipeline, ["dark"])
    for path, seed in zip(result.images, (21, 22), strict=True):
        published = torch.randn(
            (1, 128, HEIGHT // 16, WIDTH // 16), generator=torch.Generator().manual_seed(seed), dtype=torch.bfloat16
        )
        expected = oracle.run(
            pipeline,
            published.float(),
            prompt=PROMPT,
            image=list(TWO),
            num_inference_steps=result.request.steps,
            **arguments,
        )
        with Image.open(path) as saved:
            assert oracle.largest_difference([saved], expected.images) <= 1


@pytest.mark.parametrize("references", [(), TWO], ids=["text", "two"])
def test_a_batch_draws_each_picture_as_if_alone(klein: Parts, references: Sequence[Image.Image]) -> None:
    seeds = [11, 12, 13]
    batch = klein.run(initial_noise(seeds, WIDTH, HEIGHT), references=references)
    for i, seed in enumerate(seeds):
        alone = klein.run(initial_noise([seed], WIDTH, HEIGHT), references=references)
        assert oracle.largest_difference([batch.images[i]], alone.images) <= 1


def test_the_pictures_differ_where_they_should(klein: Parts) -> None:
    """Comparisons within one level prove something only if other inputs give other pictures."""
    same = klein.run(start()).images
    assert oracle.largest_difference(klein.run(start(2)).images, same) > 30
    assert oracle.largest_difference(klein.run(start(), prompt="a dog").images, same) > 10
    one = klein.run(start(), references=TWO)
    swapped = klein.run(start(), references=TWO[::-1])
    assert oracle.relative_error(swapped.latents, one.latents) > 1e-2
    assert min(extremes[1] - extremes[0] for extremes in same[0].getextrema()) > 100


@pytest.mark.parametrize("name", ["klein", "dev"])
def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers(toys: Toys, request: Any, name: str) -> None:
    exact_parts: Parts = request.getfixturevalue(name)
    flow: tiny.Flow = getattr(toys, name)
    text = toys.qwen if name == "klein" else toys.mistral
    half_flow = tiny.Flow(
        model=Flux2Transformer2DModel.from_pretrained(flow.folder, torch_dtype=torch.bfloat16),
        file=flow.file,
        folder=flow.folder,
        sharded=flow.sharded,
    )
    half_vae = tiny.Autoencoder(
        model=AutoencoderKLFlux2.from_pretrained(toys.autoencoder.folder, torch_dtype=torch.bfloat16),
        file=toys.autoencoder.file,
        folder=toys.autoencoder.folder,
    )
    half_text = tiny.Text(model=type(text.model).from_pretrained(text.folder, dtype=torch.bfloat16), folder=text.folder)
    build = oracle.klein if name == "klein" else oracle.dev
    guidance = 1.0 if name == "klein" else 3.5
    exact = exact_parts.run(start(), references=ONE, guidance=guidance).latents
    theirs = reference_run(build(half_flow, half_vae, half_text), ONE, guidance_scale=guidance).latents.float()
    half = Parts(exact_parts.checkpoint, flow.file, toys.autoencoder.file, text.folder, dtype=torch.bfloat16)
    ours = half.run(start(), references=ONE, guidance=guidance).latents
    assert 0 < oracle.relative_error(ours, exact) <= 2 * oracle.relative_error(theirs, exact)
