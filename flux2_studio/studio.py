"""One run from request to saved pictures. The only orchestrator; every caller goes through `Studio.generate`.

resolve -> references -> plan -> encode text -> encode references -> denoise (previews) -> decode -> save -> Result
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from torch import Tensor

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.latents import noise
from flux2_studio.engine.sampling import denoise
from flux2_studio.errors import DeviceError, OutOfMemory
from flux2_studio.events import Event, Notice, Preview, Ready, Result, Status, Stopped
from flux2_studio.models.hub import Hub, Progress
from flux2_studio.models.loras import Loras
from flux2_studio.models.manager import Drawn, ModelManager, Session
from flux2_studio.models.memory import is_out_of_memory
from flux2_studio.models.plan import Plan, Workload
from flux2_studio.models.refusals import amount
from flux2_studio.outputs.save import Library
from flux2_studio.pictures import images_from_pixels
from flux2_studio.references import fit, fit_note, load_reference
from flux2_studio.request import Request, changes
from flux2_studio.settings import Settings

T = TypeVar("T")


class _Cancelled(Exception):
    """The owner wants no more of this run."""


@dataclass
class _Finished:
    """What a run has saved so far."""

    images: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """A reference as the engine takes it, what was done to get there, and the hash of its file."""

    image: Image.Image
    notes: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, kw_only=True)
class _Conditions:
    """What every picture of a run is drawn from: contexts [1, L, C] and reference latents [1, 128, h, w]."""

    context: Tensor
    negative_context: Tensor | None
    references: Sequence[Tensor]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run under way: its resolved request, and what goes along with it from stage to stage."""

    request: Request
    references: Sequence[_Reference]
    session: Session
    cancelled: Callable[[], bool]
    finished: _Finished

    def working(self, work: Callable[[Progress], T]) -> Generator[Event, None, T]:
        """Do `work` while telling what it says; it is not begun when the run is cancelled."""
        _check(self.cancelled)
        return (yield from _with_status(work, self.cancelled))


class Studio:
    """Turns requests into pictures, one at a time. `jobs.JobQueue` puts many callers in line."""

    def __init__(self, settings: Settings, models: ModelManager | None = None, library: Library | None = None) -> None:
        self.settings = settings
        self._models = models or ModelManager(settings, Hub(settings))
        self._library = library or Library(settings.outputs)

    @property
    def loras(self) -> Loras:
        """The LoRAs that requests may choose."""
        return self._models.loras

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can run without a download."""
        return self._models.on_disk(checkpoint)

    def resolve(self, request: Request) -> Request:
        """`request` with nothing left open, its references looked at. Raises `RequestError` for what cannot be done."""
        return self._look_at(request)[0]

    def outlook(self, request: Request, references: Sequence[tuple[int, int]] = ()) -> str:
        """How `request` will fit into memory, in words; "" where its checkpoint is not on disk. Reads headers only.

        references: the size of each in pixels, as it will be read. Raises `StudioError` where it will not fit.
        """
        checkpoint = self.settings.checkpoint(request.checkpoint)
        if not self.on_disk(checkpoint):
            return ""
        workload = _workload(request.resolve(checkpoint, references), references, checkpoint)
        return self._models.outlook(checkpoint, workload, request.loras).text(self._models.place)

    def needs(self, checkpoint: Checkpoint) -> str:
        """What `checkpoint` needs of the memory, in words: by its published sizes, for it may not be here yet."""
        sizes = [part.size for part in checkpoint.parts]
        there = self._models.capacity
        return (
            f"Takes about {amount(sum(sizes))} of memory at once, {amount(max(sizes))} when its parts take turns; "
            f"{self._models.place} has {amount(there)}."
        )

    def prepare(self, name: str, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Load checkpoint `name`, which must be on disk, as far as it fits, before it is asked for. Yields Status, then
        Ready, or Stopped once `cancelled`. Raises `StudioError`."""
        checkpoint = self.settings.checkpoint(name)
        usual = Request(prompt="any").resolve(checkpoint)

        def load(progress: Progress) -> None:
            self._models.open(checkpoint, _workload(usual, [], checkpoint), progress).preload(progress)

        try:
            yield from _with_status(load, cancelled)
            yield Ready(checkpoint=name)
        except _Cancelled:
            yield Stopped()
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(name, error) from error

    def generate(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Carry out `request`, yielding events as `events.py` orders them; the last is a Result or, if `cancelled`
        turned true between two steps, Stopped. Raises `StudioError` for what the user must know.
        """
        finished = _Finished()
        try:
            yield from self._run(request, cancelled, finished)
        except _Cancelled:
            yield Stopped(images=tuple(finished.images), seeds=tuple(finished.seeds))
        except (RuntimeError, MemoryError) as error:
            raise self._exhausted(request.checkpoint, error) from error

    def _exhausted(self, name: str | None, error: RuntimeError | MemoryError) -> OutOfMemory:
        """What the user is told of `error`, once all weights have left the memory. Raises `error` if it is another."""
        if not is_out_of_memory(error):
            raise error
        self._models.release_all()
        return OutOfMemory(
            f"{self.settings.checkpoint(name).label} does not fit into this device's memory for this request. Choose a "
            f"smaller size, fewer or smaller references, or a smaller checkpoint."
        )

    def _run(self, asked: Request, cancelled: Callable[[], bool], finished: _Finished) -> Iterator[Event]:
        began = time.monotonic()
        _check(cancelled)
        request, references = self._look_at(asked, cancelled)
        self._library.check()  # before hours of work, not after
        yield from (Notice(text=text) for text in changes(asked, request))
        checkpoint = self.settings.checkpoint(request.checkpoint)
        workload = _workload(request, [reference.image.size for reference in references], checkpoint)
        exhausted: Plan | None = None  # the plan that turned out to be too much
        while len(finished.images) < request.count:
            before = exhausted
            session = yield from _with_status(
                lambda progress: self._models.open(
                    checkpoint,
                    workload,
                    progress,
                    loras=request.loras,
                    after=before,  # noqa: B023 - run at once
                ),
                cancelled,
            )
            run = _Run(request=request, references=references, session=session, cancelled=cancelled, finished=finished)
            if not before:
                yield from (Notice(text=text) for text in session.notes)
            if not session.plan.resident:
                yield Notice(text=session.plan.text(self._models.place))
            try:
                yield from self._make(run)
            except (RuntimeError, MemoryError) as error:
                if before or not is_out_of_memory(error):
                    raise
                exhausted = session.plan
            if exhausted and not before:
                del run, session  # and whatever they hold on the device
                self._models.release_all()
                yield Notice(text="The memory ran out, in spite of the plan: trying once more, with less of it in use.")
        yield Result(
            request=request,
            images=tuple(finished.images),
            seeds=tuple(finished.seeds),
            seconds=time.monotonic() - began,
        )

    def _look_at(
        self, request: Request, cancelled: Callable[[], bool] = lambda: False
    ) -> tuple[Request, list[_Reference]]:
        """The resolved request, and its references at the size at which they are read."""
        checkpoint = self.settings.checkpoint(request.checkpoint)
        request.resolve(checkpoint)  # whatever is wrong with the numbers is said before pictures are opened
        self.loras.check(request.loras, checkpoint, None)
        cap = checkpoint.reference_cap(len(request.references))
        references = []
        for number, path in enumerate(request.references, start=1):
            _check(cancelled)
            whole = load_reference(path)  # one at a time: a photograph takes hundreds of megabytes until it is fitted
            image = fit(whole.image, cap)
            note = fit_note(number, whole.image.size, image.size)
            references.append(
                _Reference(image=image, notes=(*whole.notes, *([note] if note else [])), sha256=whole.sha256)
            )
        return request.resolve(checkpoint, [reference.image.size for reference in references]), references

    def _make(self, run: _Run) -> Iterator[Event]:
        """Draw and save the pictures of `run` that are not finished yet."""
        conditions = yield from _encode(run)
        timer = _Timer()
        most = run.session.plan.batch
        waiting = list(run.request.seeds[len(run.finished.images) :])
        told = False
        while waiting:
            seeds = waiting[:most]
            drawn = yield from run.working(run.session.draw)
            if not told:
                yield from (Notice(text=lora.report.text) for lora in drawn.applied)
                told = True
            pictures = yield from self._draw(run, drawn, seeds, len(waiting), conditions, timer)
            if pictures is None:
                most = len(seeds) // 2
                self._models.release_scratch()
                yield Notice(text=f"{len(seeds)} pictures at once do not fit into memory: making {most} at a time.")
                continue
            for picture, seed in zip(pictures, seeds, strict=True):
                path = self._library.save(
                    picture,
                    replace(run.request, seed=seed, count=1),
                    [reference.sha256 for reference in run.references],
                    [lora.sha256 for lora in drawn.applied],
                )
                run.finished.images.append(path)
                run.finished.seeds.append(seed)
            del waiting[: len(seeds)]

    def _draw(
        self,
        run: _Run,
        drawn: Drawn,
        seeds: Sequence[int],
        waiting: int,
        conditions: _Conditions,
        timer: _Timer,
    ) -> Generator[Event, None, list[Image.Image] | None]:
        """The pictures of `seeds`, drawn as one batch with a Preview per step; None if they do not fit into memory.

        waiting: how many pictures of the request are not done yet, these included.
        """
        try:
            latents = yield from _denoise(run, drawn, seeds, waiting, conditions, timer)
            if not bool(torch.isfinite(latents).all()):
                raise DeviceError(
                    f"{run.session.checkpoint.label} ran out of the range of {drawn.transformer.dtype}, so there is no "
                    f"picture. Set the precision to bfloat16 or float32 (FLUX2_DTYPE, or --dtype)."
                )
            pictures = []
            for latent in latents.split(1):
                pixels = yield from run.working(lambda progress: run.session.decode(latent, progress))  # noqa: B023
                pictures += images_from_pixels(pixels)
            return pictures
        except (RuntimeError, MemoryError) as error:
            if len(seeds) == 1 or not is_out_of_memory(error):
                raise
            return None


def _workload(request: Request, references: Sequence[tuple[int, int]], checkpoint: Checkpoint) -> Workload:
    """What a resolved request asks of the memory; references: the size of each in pixels, as it will be read."""
    assert request.width and request.height
    return Workload(
        width=request.width,
        height=request.height,
        count=request.count,
        guided=_is_guided(request, checkpoint),
        references=tuple(references),
    )


def _is_guided(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether two prompts are read and every step is computed twice."""
    return checkpoint.guiding == "cfg" and request.guidance != 1.0


def _encode(run: _Run) -> Generator[Event, None, _Conditions]:
    """Prompts and references as the transformer takes them."""
    request, session = run.request, run.session
    guided = _is_guided(request, session.checkpoint)
    prompts = [request.prompt, request.negative_prompt or ""] if guided else [request.prompt]
    yield Status(text="Reading the prompt")
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
        yield from (Notice(text=note) for note in reference.notes)
        image = reference.image
        latents.append((yield from run.working(lambda progress: session.encode_reference(image, progress))))  # noqa: B023
    return _Conditions(
        context=encoded.context[:1],
        negative_context=encoded.context[1:] if guided else None,
        references=latents,
    )


def _denoise(
    run: _Run, drawn: Drawn, seeds: Sequence[int], waiting: int, conditions: _Conditions, timer: _Timer
) -> Generator[Event, None, Tensor]:
    """Denoise one batch, yielding a Preview per step; the final latents [B, 128, h, w]."""
    request, checkpoint = run.request, run.session.checkpoint
    assert request.width and request.height and request.steps and request.guidance is not None
    _check(run.cancelled)
    first = request.count - waiting
    yield Status(text="Drawing" if request.count == 1 else f"Drawing {_range(first, len(seeds), request.count)}")
    timer.start()
    for step in denoise(
        drawn.transformer,
        noise(seeds, request.width, request.height, drawn.transformer.params.in_channels),
        conditions.context,
        steps=request.steps,
        guidance=request.guidance,
        guiding=checkpoint.guiding,
        negative_context=conditions.negative_context,
        references=conditions.references,
        reference_cache=checkpoint.reference_cache,
    ):
        images: list[Image.Image] = []
        if drawn.previewer is not None:
            for clean in step.clean.split(1):  # one by one, which takes a batch's memory only once
                images += images_from_pixels(drawn.previewer(clean))
        timer.stepped(len(seeds))
        yield Preview(
            step=step.index + 1,
            steps=step.steps,
            images=tuple(images),
            first=first,
            count=request.count,
            seconds_left=timer.left(waiting * step.steps - (step.index + 1) * len(seeds)),
        )
        _check(run.cancelled)
    return step.latents


class _Timer:
    """Estimates the time left from the steps so far, counting a step once per picture."""

    def __init__(self) -> None:
        self._done = 0
        self._spent = 0.0
        self._since = 0.0

    def start(self) -> None:
        self._since = time.monotonic()

    def stepped(self, pictures: int) -> None:
        now = time.monotonic()
        self._spent += now - self._since
        self._since = now
        self._done += pictures

    def left(self, steps: int) -> float:
        """Seconds that `steps` further steps of one picture will take."""
        return self._spent / self._done * steps


def _with_status(work: Callable[[Progress], T], cancelled: Callable[[], bool]) -> Generator[Event, None, T]:
    """Run `work` in a thread of its own, yielding what it tells as Status; cancelling ends it at its next word."""
    told: queue.SimpleQueue[Status | None] = queue.SimpleQueue()
    abandoned = threading.Event()

    def progress(text: str, fraction: float | None) -> None:
        if abandoned.is_set() or cancelled():
            raise _Cancelled
        told.put(Status(text=text, fraction=fraction))

    with ThreadPoolExecutor(1, thread_name_prefix="flux2-loader") as pool:
        future = pool.submit(work, progress)
        future.add_done_callback(lambda _: told.put(None))
        try:
            while (status := told.get()) is not None:
                yield status
        finally:
            abandoned.set()  # whoever stops listening must not leave a download running
        try:
            return future.result()
        finally:
            # An exception's traceback holds this frame, and the future holds the exception: together they would keep
            # alive whatever was half loaded.
            del future


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise _Cancelled


def _range(first: int, length: int, count: int) -> str:
    """'pictures 1-2 of 4', 'picture 3 of 4'."""
    if length == 1:
        return f"picture {first + 1} of {count}"
    return f"pictures {first + 1}-{first + length} of {count}"
