"""The stages that make pictures from noise: denoising with previews, then decoding."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.engine.flux.inpaint import InpaintMask
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.errors import DeviceError
from flux2_studio.events import Event, Notice, Preview, Status
from flux2_studio.images.tensors import images_from_pixels
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.plan import MemoryPlan
from flux2_studio.models.session import Sampler
from flux2_studio.models.worker_thread import raise_if_cancelled
from flux2_studio.record import Record
from flux2_studio.stages.compositing import crop_padding
from flux2_studio.stages.conditioning import Conditioning
from flux2_studio.stages.run_context import RunContext, UnfinishedPicture

UNTILED = "whole"


def generate_batch(
    run: RunContext,
    sampler: Sampler,
    records: Sequence[Record],
    remaining: int,
    conditioning: Conditioning,
    timer: StepTimer,
) -> Generator[Event, None, list[tuple[Image.Image, str]] | None]:
    """The pictures of `records`, drawn as one batch with a Preview per step, and how each was decoded (see
    `describe_tiling`); None if they do not fit into memory.

    remaining: how many pictures of the request are not done yet, these included.
    """
    try:
        latents = yield from denoise_batch(run, sampler, records, remaining, conditioning, timer)
        if not bool(torch.isfinite(latents).all()):
            raise DeviceError(
                f"{run.session.checkpoint.label} ran out of the range of {sampler.transformer.dtype}, so there is no "
                f"picture. Set the precision to bfloat16 or float32 (FLUX2_DTYPE, or --dtype)."
            )
        pictures = []
        for latent in latents.split(1):
            (image,) = images_from_pixels((yield from decode_latent(run, latent)))
            pictures.append((crop_padding(image, run.request), describe_tiling(run.session.plan)))
        return pictures
    except (RuntimeError, MemoryError) as error:
        if len(records) == 1 or not is_out_of_memory(error):
            raise
        return None


def denoise_batch(
    run: RunContext,
    sampler: Sampler,
    records: Sequence[Record],
    remaining: int,
    conditioning: Conditioning,
    timer: StepTimer,
) -> Generator[Event, None, Tensor]:
    """Denoise one batch, yielding a Preview per step; the final latents [B, 128, h, w]. records: of its pictures."""
    request, checkpoint = run.request, run.session.checkpoint
    assert request.steps and request.guidance is not None
    seeds = [record.request.seed for record in records if record.request.seed is not None]
    raise_if_cancelled(run.cancelled)
    first = request.count - remaining
    yield Status(text="Drawing" if request.count == 1 else f"Drawing {_range(first, len(seeds), request.count)}")
    keep = None
    if run.region is not None:
        keep = InpaintMask(known_latent=conditioning.references[0], editable=torch.from_numpy(run.region.token_mask))
    timer.start()
    shown = run.clock() if run.preview_interval else 0.0
    for step in denoise(
        sampler.transformer,
        initial_noise(seeds, *request.padded_size, sampler.transformer.params.in_channels),
        conditioning.context,
        steps=request.steps,
        guidance=request.guidance,
        guidance_mode=checkpoint.guidance_mode,
        negative_context=conditioning.negative_context,
        references=conditioning.references,
        reference_cache=checkpoint.caches_reference_kv,
        inpaint=keep,
    ):
        images: list[Image.Image] = []
        seen: list[Image.Image] = []
        if sampler.previewer is not None and run.clock() >= shown + run.preview_interval:
            for clean in step.clean.split(1):  # one by one, which takes a batch's memory only once
                images += [crop_padding(image, request) for image in images_from_pixels(sampler.previewer(clean))]
            seen = [run.guard.mosaic_if_flagged(image) for image in images]
            shown = run.clock()
        else:
            step.latents[0, 0, 0, 0].item()  # waits for the device, as a preview does, so that each step can be timed
        timer.record_step(len(seeds))
        done = step.index + 1, step.steps
        yield Preview(
            step=step.index + 1,
            steps=step.steps,
            images=tuple(seen),
            first_index=first,
            count=request.count,
            seconds_left=timer.seconds_left(remaining * step.steps - (step.index + 1) * len(seeds)),
            unfinished=tuple(
                UnfinishedPicture(
                    image=image,
                    record=replace(record, unfinished=done),
                    ingredients=run.ingredients,
                    region=run.region,
                    first_reference=run.first_reference,
                )
                for image, record in zip(images, records if images else (), strict=True)
            ),
        )
        raise_if_cancelled(run.cancelled)
    return step.latents


def decode_latent(run: RunContext, latent: Tensor) -> Generator[Event, None, Tensor]:
    """The pixels [1, 3, H, W] of a latent. Where the memory runs out, it is decoded again with less of it: what was
    denoised is not lost."""
    while True:
        try:
            return (yield from run.run_in_worker(lambda progress: run.session.decode(latent, progress)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold what was allocated
        if not run.session.reduce_decoding_memory():
            raise failure
        yield Notice(text="The memory ran out while the picture was decoded: decoding it again with less of it.")


class StepTimer:
    """Estimates the time left from the steps so far, counting a step once per picture. step_seconds: the seconds of
    each step since it was started."""

    def __init__(self) -> None:
        self.step_seconds: list[float] = []
        self._done = 0
        self._spent = 0.0
        self._since = 0.0

    def start(self) -> None:
        self.step_seconds = []
        self._since = time.monotonic()

    def record_step(self, pictures: int) -> None:
        now = time.monotonic()
        self.step_seconds.append(now - self._since)
        self._spent += self.step_seconds[-1]
        self._since = now
        self._done += pictures

    def seconds_left(self, steps: int) -> float:
        """Seconds that `steps` further steps of one picture will take."""
        return self._spent / self._done * steps


def describe_tiling(plan: MemoryPlan) -> str:
    """How the autoencoder goes through a picture under `plan`: in strips, sums come out in another order."""
    rows = sorted({stage.strip_height for stage in plan.stages if stage.strip_height is not None})
    return f"in strips of {' and '.join(map(str, rows))} rows" if rows else UNTILED


def _range(first: int, length: int, count: int) -> str:
    """'pictures 1-2 of 4', 'picture 3 of 4'."""
    if length == 1:
        return f"picture {first + 1} of {count}"
    return f"pictures {first + 1}-{first + length} of {count}"
