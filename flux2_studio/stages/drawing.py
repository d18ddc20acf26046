"""The stages of a run from its prompt to its latents, and what goes along with it. `studio.py` puts them in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.flux.inpaint import InpaintMask
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.errors import ClassifierError, DeviceError, SafetyError
from flux2_studio.events import Event, Notice, Preview, PromptEnhanced, Status
from flux2_studio.images.masks import EditRegion, composite_within, match_colours
from flux2_studio.images.references import pad_to_multiple
from flux2_studio.images.tensors import images_from_pixels
from flux2_studio.models.hub.repositories import ProgressCallback
from flux2_studio.models.manager import Sampler, Session
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.plan import MemoryPlan, RequestShape
from flux2_studio.models.worker_thread import in_worker_thread, raise_if_cancelled
from flux2_studio.provenance.c2pa.credentials import ReferenceIngredient
from flux2_studio.record import Record
from flux2_studio.request import Request, padded_size
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.safety.questions import YesNoModel, make_yes_no_model

T = TypeVar("T")
UNTILED = "whole"


@dataclass
class RunOutputs:
    """What a run has done so far: `sampler` pictures, of which those in `images` are saved and the rest were
    withheld."""

    completed_count: int = 0
    images: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)  # on finished pictures, with the seeds of which
    provenance: dict[str, list[int]] = field(default_factory=dict)  # what they carry, likewise
    reported: set[str] = field(default_factory=set)  # what need not be said of every picture
    withheld: SafetyError | None = None  # why the last one was

    def new_notices(self, notes: Sequence[str]) -> list[Event]:
        """A Notice for each of `notes` that was not told before."""
        new = [note for note in dict.fromkeys(notes) if note not in self.reported]
        self.reported.update(new)
        return [Notice(text=note) for note in new]

    def add_picture(self, image: Path, seed: int, notes: Sequence[str], provenance: Sequence[str]) -> None:
        """Picture `image` is done, with what is to be said of it."""
        self.completed_count += 1
        self.images.append(image)
        self.seeds.append(seed)
        for told, by in ((notes, self.notes), (provenance, self.provenance)):
            for text in told:
                by.setdefault(text, []).append(seed)

    def with_seeds(self, said: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """The sentences of `said`, with the seeds of the pictures that they are true of, unless of all."""
        return tuple(text if seeds == self.seeds else f"{text} ({_seeds(seeds)})" for text, seeds in said.items())


@dataclass(frozen=True, kw_only=True)
class PreparedReference:
    """A reference scaled to the checkpoint's cap, what was done to get there, and its file, by hash and as an
    ingredient."""

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str
    ingredient: ReferenceIngredient | None = None  # None where nothing is signed


@dataclass(frozen=True, kw_only=True)
class UnfinishedPicture:
    """A picture as it is after some of its steps, and all that it takes to make a file of it.

    region: what of the first reference may change, None for all of it. first_reference: the first reference, scaled to
    its cap.
    """

    image: Image.Image
    record: Record
    ingredients: Sequence[ReferenceIngredient]
    region: EditRegion | None = None
    first_reference: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What every picture of a run is drawn from: contexts [1, L, C] and reference latents [1, 128, h, w]."""

    context: Tensor
    negative_context: Tensor | None
    references: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """One run under way: its resolved request, and what goes along with it from stage to stage.

    enhanced: how its prompt came about, where a language model wrote it. region: what of the first reference may
    change, where not all of it may. preview_interval: seconds that lie between two previews, at least, by `clock`.
    looking: seconds that it took to open and check the references.
    """

    request: Request
    enhanced: PromptEnhanced | None
    references: Sequence[PreparedReference]
    region: EditRegion | None
    session: Session
    request_shape: RequestShape
    guard: SafetyGuard
    cancelled: Callable[[], bool]
    outputs: RunOutputs
    preview_interval: float = 0.0
    clock: Callable[[], float] = time.monotonic
    check_seconds: float = 0.0

    @property
    def ingredients(self) -> list[ReferenceIngredient]:
        """What goes into the credentials of its pictures."""
        return [reference.ingredient for reference in self.references if reference.ingredient is not None]

    @property
    def first_reference(self) -> Image.Image | None:
        """The first reference, scaled to its cap; None where there is none."""
        return self.references[0].image if self.references else None

    def run_in_worker(self, work: Callable[[ProgressCallback], T]) -> Generator[Event, None, T]:
        """Do `work` while telling what it says; it is not begun when the run is cancelled."""
        raise_if_cancelled(self.cancelled)
        return (yield from in_worker_thread(work, self.cancelled))


def make_request_shape(request: Request, references: Sequence[tuple[int, int]], checkpoint: Checkpoint) -> RequestShape:
    """What a resolved request asks of the memory; references: the size of each in pixels, scaled to its cap."""
    width, height = request.padded_size
    read = [padded_size(*size) for size in references]
    if request.outpaint:  # the first stands on its canvas
        read[:1] = [(width, height)]
    return RequestShape(
        width=width,
        height=height,
        count=request.count,
        use_cfg=_uses_cfg(request, checkpoint),
        references=tuple(read),
    )


def _uses_cfg(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether two prompts are read and every step is computed twice."""
    return checkpoint.guidance_mode == "cfg" and request.guidance != 1.0


def find_yes_no_model(
    run: RunContext, progress: ProgressCallback | None = None
) -> tuple[YesNoModel | None, tuple[str, ...]]:
    """The language model to ask what rules and classifiers cannot know, where there is one, and what the user should
    know of that. progress: loads it, if need be. Raises `ClassifierError` where it has to be asked and cannot be."""
    if run.guard.policy == "off" or (writer := run.session.acquire_vision_model(progress)) is None:
        return None, ()
    try:
        return make_yes_no_model(writer), ()
    except ClassifierError as error:
        if run.guard.policy == "on":
            raise
        return None, (str(error),)


def encode_conditioning(run: RunContext) -> Generator[Event, None, Conditioning]:
    """Prompts and references as the transformer takes them."""
    request, session = run.request, run.session
    guided = _uses_cfg(request, session.checkpoint)
    prompts = [request.prompt, request.negative_prompt or ""] if guided else [request.prompt]
    yield Status(text="Reading the prompt")
    # Where strangers use the studio, the language model is worth loading to be asked.
    ask, told = yield from run.run_in_worker(
        lambda progress: find_yes_no_model(run, progress if run.guard.policy == "on" else None)
    )
    yield from run.outputs.new_notices(told)
    if ask is not None:
        pictures = [reference.image for reference in run.references]
        yield from run.outputs.new_notices(run.guard.check_with_model(ask, request.prompt, pictures))
    encoded = yield from run.run_in_worker(lambda progress: session.encode_prompts(prompts, progress))
    if request.negative_prompt and not guided:
        yield Notice(text="The negative prompt has no effect at guidance 1: choose a higher guidance to use it.")
    for name, cut in zip(("prompt", "negative prompt"), encoded.truncated_tokens, strict=False):
        if cut:
            yield Notice(
                text=f"The {name} is too long for {session.checkpoint.label}, which reads "
                f"{session.checkpoint.recipe.length} tokens: its last {cut} token{'s' if cut > 1 else ''} (about "
                f"{max(1, cut * 3 // 4)} word{'s' if cut > 2 else ''}) had to be left out."
            )
    latents = []
    for number, reference in enumerate(run.references, start=1):
        yield Status(text=f"Reading image {number}" if len(run.references) > 1 else "Reading the image")
        yield from run.outputs.new_notices(reference.notes)
        image = pad_to_multiple(run.region.original if run.region and number == 1 else reference.image)
        latents.append((yield from run.run_in_worker(lambda progress: session.encode_reference(image, progress))))  # noqa: B023
    return Conditioning(
        context=encoded.context[:1],
        negative_context=encoded.context[1:] if guided else None,
        references=latents,
    )


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
            step.latents[0, 0, 0, 0].item()  # waits for the device, as a preview would: else no step had its own time
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


def crop_padding(image: Image.Image, request: Request) -> Image.Image:
    """What of a drawn picture, of any scale, is the picture that was asked for: without what it was padded by."""
    assert request.width and request.height
    across, down = request.padded_size
    if (across, down) == (request.width, request.height):
        return image
    width, height = round(image.width * request.width / across), round(image.height * request.height / down)
    return image.crop((0, 0, max(1, width), max(1, height)))


def composite_region(
    image: Image.Image, request: Request, region: EditRegion | None, first_reference: Image.Image | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture as drawn, of the size that `request` asks for, with its colours matched if it asks for that, and with
    every pixel outside `region` as it was; and what the user should know of that. first_reference: the first
    reference."""
    notes: tuple[str, ...] = ()
    if request.match_colours and first_reference is not None:
        like, change = (region.original, region.edit_mask) if region else (first_reference, None)
        matched = match_colours(image, like, change)
        if matched is None:
            notes = (
                "The colours were not matched: the mask leaves too little outside to match them with. Make it smaller.",
            )
        image = matched or image
    return (composite_within(image, region) if region else image), notes


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


def _seeds(seeds: Sequence[int]) -> str:
    """'seed 5', 'seeds 5, 7'."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _range(first: int, length: int, count: int) -> str:
    """'pictures 1-2 of 4', 'picture 3 of 4'."""
    if length == 1:
        return f"picture {first + 1} of {count}"
    return f"pictures {first + 1}-{first + length} of {count}"
