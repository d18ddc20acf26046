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
from flux2_studio.engine.flux.inpaint import Keep
from flux2_studio.engine.flux.latents import noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.errors import ClassifierError, DeviceError, SafetyError
from flux2_studio.events import Event, Notice, Preview, Status, Upsampled
from flux2_studio.images.masks import Region, composite, match_colours
from flux2_studio.images.references import padded
from flux2_studio.images.tensors import images_from_pixels
from flux2_studio.models.hub.repositories import Progress
from flux2_studio.models.manager import Drawn, Session
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.plan import Plan, Workload
from flux2_studio.models.worker_thread import check, with_status
from flux2_studio.provenance.c2pa.credentials import Source
from flux2_studio.record import Record
from flux2_studio.request import Request, drawn_size
from flux2_studio.safety.guard import Guard
from flux2_studio.safety.questions import Ask, asking

T = TypeVar("T")
WHOLE = "whole"


@dataclass
class Finished:
    """What a run has done so far: `drawn` pictures, of which those in `images` are saved and the rest were withheld."""

    drawn: int = 0
    images: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)  # on finished pictures, with the seeds of which
    provenance: dict[str, list[int]] = field(default_factory=dict)  # what they carry, likewise
    told: set[str] = field(default_factory=set)  # what need not be said of every picture
    withheld: SafetyError | None = None  # why the last one was

    def fresh(self, notes: Sequence[str]) -> list[Event]:
        """A Notice for each of `notes` that was not told before."""
        new = [note for note in dict.fromkeys(notes) if note not in self.told]
        self.told.update(new)
        return [Notice(text=note) for note in new]

    def keep(self, image: Path, seed: int, notes: Sequence[str], provenance: Sequence[str]) -> None:
        """Picture `image` is done, with what is to be said of it."""
        self.drawn += 1
        self.images.append(image)
        self.seeds.append(seed)
        for told, by in ((notes, self.notes), (provenance, self.provenance)):
            for text in told:
                by.setdefault(text, []).append(seed)

    def named(self, said: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
        """The sentences of `said`, with the seeds of the pictures that they are true of, unless of all."""
        return tuple(text if seeds == self.seeds else f"{text} ({_seeds(seeds)})" for text, seeds in said.items())


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A reference scaled to the checkpoint's cap, what was done to get there, and its file, by hash and as an
    ingredient."""

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str
    source: Source | None = None  # None where nothing is signed


@dataclass(frozen=True, kw_only=True)
class Sketch:
    """A picture as it is after some of its steps, and all that it takes to make a file of it.

    region: what of the first reference may change, None for all of it. first: the first reference, scaled to its cap.
    """

    image: Image.Image
    record: Record
    sources: Sequence[Source]
    region: Region | None = None
    first: Image.Image | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What every picture of a run is drawn from: contexts [1, L, C] and reference latents [1, 128, h, w]."""

    context: Tensor
    negative_context: Tensor | None
    references: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run under way: its resolved request, and what goes along with it from stage to stage.

    upsampled: how its prompt came about, where a language model wrote it. region: what of the first reference may
    change, where not all of it may. pause: seconds that lie between two previews, at least, by `clock`. looking:
    seconds that it took to open and check the references.
    """

    request: Request
    upsampled: Upsampled | None
    references: Sequence[Reference]
    region: Region | None
    session: Session
    workload: Workload
    guard: Guard
    cancelled: Callable[[], bool]
    finished: Finished
    pause: float = 0.0
    clock: Callable[[], float] = time.monotonic
    looking: float = 0.0

    @property
    def sources(self) -> list[Source]:
        """What goes into the credentials of its pictures."""
        return [reference.source for reference in self.references if reference.source is not None]

    @property
    def first(self) -> Image.Image | None:
        """The first reference, scaled to its cap; None where there is none."""
        return self.references[0].image if self.references else None

    def working(self, work: Callable[[Progress], T]) -> Generator[Event, None, T]:
        """Do `work` while telling what it says; it is not begun when the run is cancelled."""
        check(self.cancelled)
        return (yield from with_status(work, self.cancelled))


def workload_of(request: Request, references: Sequence[tuple[int, int]], checkpoint: Checkpoint) -> Workload:
    """What a resolved request asks of the memory; references: the size of each in pixels, scaled to its cap."""
    width, height = request.drawn_size
    read = [drawn_size(*size) for size in references]
    if request.outpaint:  # the first stands on its canvas
        read[:1] = [(width, height)]
    return Workload(
        width=width,
        height=height,
        count=request.count,
        guided=_is_guided(request, checkpoint),
        references=tuple(read),
    )


def _is_guided(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether two prompts are read and every step is computed twice."""
    return checkpoint.guiding == "cfg" and request.guidance != 1.0


def asking_of(run: Run, progress: Progress | None = None) -> tuple[Ask | None, tuple[str, ...]]:
    """The language model to ask what rules and classifiers cannot know, where there is one, and what the user should
    know of that. progress: loads it, if need be. Raises `ClassifierError` where it has to be asked and cannot be."""
    if run.guard.policy == "off" or (writer := run.session.asking(progress)) is None:
        return None, ()
    try:
        return asking(writer), ()
    except ClassifierError as error:
        if run.guard.policy == "on":
            raise
        return None, (str(error),)


def encode(run: Run) -> Generator[Event, None, Conditions]:
    """Prompts and references as the transformer takes them."""
    request, session = run.request, run.session
    guided = _is_guided(request, session.checkpoint)
    prompts = [request.prompt, request.negative_prompt or ""] if guided else [request.prompt]
    yield Status(text="Reading the prompt")
    # Where strangers use the studio, the language model is worth loading to be asked.
    ask, told = yield from run.working(lambda progress: asking_of(run, progress if run.guard.policy == "on" else None))
    yield from run.finished.fresh(told)
    if ask is not None:
        pictures = [reference.image for reference in run.references]
        yield from run.finished.fresh(run.guard.asked(ask, request.prompt, pictures))
    encoded = yield from run.working(lambda progress: session.encode(prompts, progress))
    if request.negative_prompt and not guided:
        yield Notice(text="The negative prompt has no effect at guidance 1: choose a higher guidance to use it.")
    for name, cut in zip(("prompt", "negative prompt"), encoded.cut, strict=False):
        if cut:
            yield Notice(
                text=f"The {name} is too long for {session.checkpoint.label}, which reads "
                f"{session.checkpoint.recipe.length} tokens: its last {cut} token{'s' if cut > 1 else ''} (about "
                f"{max(1, cut * 3 // 4)} word{'s' if cut > 2 else ''}) had to be left out."
            )
    latents = []
    for number, reference in enumerate(run.references, start=1):
        yield Status(text=f"Reading image {number}" if len(run.references) > 1 else "Reading the image")
        yield from run.finished.fresh(reference.notes)
        image = padded(run.region.picture if run.region and number == 1 else reference.image)
        latents.append((yield from run.working(lambda progress: session.encode_reference(image, progress))))  # noqa: B023
    return Conditions(
        context=encoded.context[:1],
        negative_context=encoded.context[1:] if guided else None,
        references=latents,
    )


def denoise_batch(
    run: Run, drawn: Drawn, records: Sequence[Record], waiting: int, conditions: Conditions, timer: Timer
) -> Generator[Event, None, Tensor]:
    """Denoise one batch, yielding a Preview per step; the final latents [B, 128, h, w]. records: of its pictures."""
    request, checkpoint = run.request, run.session.checkpoint
    assert request.steps and request.guidance is not None
    seeds = [record.request.seed for record in records if record.request.seed is not None]
    check(run.cancelled)
    first = request.count - waiting
    yield Status(text="Drawing" if request.count == 1 else f"Drawing {_range(first, len(seeds), request.count)}")
    keep = None
    if run.region is not None:
        keep = Keep(clean=conditions.references[0], change=torch.from_numpy(run.region.tokens))
    timer.start()
    shown = run.clock() if run.pause else 0.0
    for step in denoise(
        drawn.transformer,
        noise(seeds, *request.drawn_size, drawn.transformer.params.in_channels),
        conditions.context,
        steps=request.steps,
        guidance=request.guidance,
        guiding=checkpoint.guiding,
        negative_context=conditions.negative_context,
        references=conditions.references,
        reference_cache=checkpoint.reference_cache,
        keep=keep,
    ):
        images: list[Image.Image] = []
        seen: list[Image.Image] = []
        if drawn.previewer is not None and run.clock() >= shown + run.pause:
            for clean in step.clean.split(1):  # one by one, which takes a batch's memory only once
                images += [visible(image, request) for image in images_from_pixels(drawn.previewer(clean))]
            seen = [run.guard.preview(image) for image in images]
            shown = run.clock()
        else:
            step.latents[0, 0, 0, 0].item()  # waits for the device, as a preview would: else no step had its own time
        timer.stepped(len(seeds))
        done = step.index + 1, step.steps
        yield Preview(
            step=step.index + 1,
            steps=step.steps,
            images=tuple(seen),
            first=first,
            count=request.count,
            seconds_left=timer.left(waiting * step.steps - (step.index + 1) * len(seeds)),
            sketches=tuple(
                Sketch(
                    image=image,
                    record=replace(record, unfinished=done),
                    sources=run.sources,
                    region=run.region,
                    first=run.first,
                )
                for image, record in zip(images, records if images else (), strict=True)
            ),
        )
        check(run.cancelled)
    return step.latents


def draw(
    run: Run,
    drawn: Drawn,
    records: Sequence[Record],
    waiting: int,
    conditions: Conditions,
    timer: Timer,
) -> Generator[Event, None, list[tuple[Image.Image, str]] | None]:
    """The pictures of `records`, drawn as one batch with a Preview per step, and how each was decoded (see `strips`);
    None if they do not fit into memory.

    waiting: how many pictures of the request are not done yet, these included.
    """
    try:
        latents = yield from denoise_batch(run, drawn, records, waiting, conditions, timer)
        if not bool(torch.isfinite(latents).all()):
            raise DeviceError(
                f"{run.session.checkpoint.label} ran out of the range of {drawn.transformer.dtype}, so there is no "
                f"picture. Set the precision to bfloat16 or float32 (FLUX2_DTYPE, or --dtype)."
            )
        pictures = []
        for latent in latents.split(1):
            (image,) = images_from_pixels((yield from decode(run, latent)))
            pictures.append((visible(image, run.request), strips(run.session.plan)))
        return pictures
    except (RuntimeError, MemoryError) as error:
        if len(records) == 1 or not is_out_of_memory(error):
            raise
        return None


def decode(run: Run, latent: Tensor) -> Generator[Event, None, Tensor]:
    """The pixels [1, 3, H, W] of a latent. Where the memory runs out, it is decoded again with less of it: what was
    denoised is not lost."""
    while True:
        try:
            return (yield from run.working(lambda progress: run.session.decode(latent, progress)))
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # its frames hold what was allocated
        if not run.session.decode_leaner():
            raise failure
        yield Notice(text="The memory ran out while the picture was decoded: decoding it again with less of it.")


def visible(image: Image.Image, request: Request) -> Image.Image:
    """What of a drawn picture, of any scale, is the picture that was asked for: without what it was padded by."""
    assert request.width and request.height
    across, down = request.drawn_size
    if (across, down) == (request.width, request.height):
        return image
    width, height = round(image.width * request.width / across), round(image.height * request.height / down)
    return image.crop((0, 0, max(1, width), max(1, height)))


def settled(
    image: Image.Image, request: Request, region: Region | None, first: Image.Image | None
) -> tuple[Image.Image, tuple[str, ...]]:
    """A picture as drawn, of the size that `request` asks for, with its colours matched if it asks for that, and with
    every pixel outside `region` as it was; and what the user should know of that. first: the first reference."""
    notes: tuple[str, ...] = ()
    if request.match_colours and first is not None:
        like, change = (region.picture, region.change) if region else (first, None)
        matched = match_colours(image, like, change)
        if matched is None:
            notes = (
                "The colours were not matched: the mask leaves too little outside to match them with. Make it smaller.",
            )
        image = matched or image
    return (composite(image, region) if region else image), notes


class Timer:
    """Estimates the time left from the steps so far, counting a step once per picture. batch: the seconds of each step
    since it was started."""

    def __init__(self) -> None:
        self.batch: list[float] = []
        self._done = 0
        self._spent = 0.0
        self._since = 0.0

    def start(self) -> None:
        self.batch = []
        self._since = time.monotonic()

    def stepped(self, pictures: int) -> None:
        now = time.monotonic()
        self.batch.append(now - self._since)
        self._spent += self.batch[-1]
        self._since = now
        self._done += pictures

    def left(self, steps: int) -> float:
        """Seconds that `steps` further steps of one picture will take."""
        return self._spent / self._done * steps


def strips(plan: Plan) -> str:
    """How the autoencoder goes through a picture under `plan`: in strips, sums come out in another order."""
    rows = sorted({stage.rows for stage in plan.stages if stage.rows is not None})
    return f"in strips of {' and '.join(map(str, rows))} rows" if rows else WHOLE


def _seeds(seeds: Sequence[int]) -> str:
    """'seed 5', 'seeds 5, 7'."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _range(first: int, length: int, count: int) -> str:
    """'pictures 1-2 of 4', 'picture 3 of 4'."""
    if length == 1:
        return f"picture {first + 1} of {count}"
    return f"pictures {first + 1}-{first + length} of {count}"
