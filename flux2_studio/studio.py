"""One run from request to saved pictures. The only orchestrator; every caller goes through `Studio.generate`.

resolve -> references -> load -> encode text -> encode references -> denoise (previews) -> decode -> save -> Result
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
from flux2_studio.events import Event, Notice, Preview, Result, Status, Stopped
from flux2_studio.models.hub import Hub, Progress
from flux2_studio.models.manager import LoadedCheckpoint, ModelManager
from flux2_studio.models.memory import is_out_of_memory
from flux2_studio.outputs.save import Library
from flux2_studio.pictures import images_from_pixels
from flux2_studio.references import fit, fit_note, load_reference
from flux2_studio.request import MULTIPLE, Request, changes
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


class Studio:
    """Turns requests into pictures, one at a time. `jobs.JobQueue` puts many callers in line."""

    def __init__(self, settings: Settings, models: ModelManager | None = None, library: Library | None = None) -> None:
        self.settings = settings
        self._models = models or ModelManager(settings, Hub(settings))
        self._library = library or Library(settings.outputs)

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can run without a download."""
        return self._models.on_disk(checkpoint)

    def resolve(self, request: Request) -> Request:
        """`request` with nothing left open, its references looked at. Raises `RequestError` for what cannot be done."""
        return self._look_at(request)[0]

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
            if not is_out_of_memory(error):
                raise
            raise OutOfMemory(
                f"{self.settings.checkpoint(request.checkpoint).label} does not fit into this device's memory for this "
                f"request. Choose a smaller size, fewer or smaller references, or a smaller checkpoint."
            ) from error

    def _run(self, asked: Request, cancelled: Callable[[], bool], finished: _Finished) -> Iterator[Event]:
        began = time.monotonic()
        _check(cancelled)
        request, references = self._look_at(asked, cancelled)
        self._library.check()  # before hours of work, not after
        yield from (Notice(text=text) for text in changes(asked, request))
        checkpoint = self.settings.checkpoint(request.checkpoint)

        loaded = yield from _with_status(lambda progress: self._models.load(checkpoint, progress), cancelled)
        yield from (Notice(text=text) for text in loaded.notes)
        conditions = yield from _encode(loaded, request, references, cancelled)

        timer = _Timer()
        waiting = list(request.seeds)
        most = self._batch_size(loaded, request, conditions)
        while waiting:
            seeds = waiting[:most]
            pictures = yield from self._draw(loaded, request, seeds, len(waiting), conditions, timer, cancelled)
            if pictures is None:
                most = len(seeds) // 2
                self._models.release_scratch()
                yield Notice(text=f"{len(seeds)} pictures at once do not fit into memory: making {most} at a time.")
                continue
            for picture, seed in zip(pictures, seeds, strict=True):
                one = replace(request, seed=seed, count=1)
                path = self._library.save(picture, one, [reference.sha256 for reference in references])
                finished.images.append(path)
                finished.seeds.append(seed)
            del waiting[: len(seeds)]
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

    def _batch_size(self, loaded: LoadedCheckpoint, request: Request, conditions: _Conditions) -> int:
        assert request.width is not None and request.height is not None
        kept = sum(latent.shape[-2] * latent.shape[-1] for latent in conditions.references)
        tokens = loaded.checkpoint.recipe.length + (request.height // MULTIPLE) * (request.width // MULTIPLE) + kept
        rows = 1 if conditions.negative_context is None else 2
        cached = kept if loaded.checkpoint.reference_cache else 0
        return self._models.batch_size(loaded, request.count, rows * tokens, rows * cached)

    def _draw(
        self,
        loaded: LoadedCheckpoint,
        request: Request,
        seeds: Sequence[int],
        waiting: int,
        conditions: _Conditions,
        timer: _Timer,
        cancelled: Callable[[], bool],
    ) -> Generator[Event, None, list[Image.Image] | None]:
        """The pictures of `seeds`, drawn as one batch with a Preview per step; None if they do not fit into memory.

        waiting: how many pictures of the request are not done yet, these included.
        """
        try:
            latents = yield from _denoise(loaded, request, seeds, waiting, conditions, timer, cancelled)
            if not bool(torch.isfinite(latents).all()):
                raise DeviceError(
                    f"{loaded.checkpoint.label} ran out of the range of {loaded.transformer.dtype}, so there is no "
                    f"picture. Set the precision to bfloat16 or float32 (FLUX2_DTYPE, or --dtype)."
                )
            yield Status(text="Decoding")
            return [images_from_pixels(loaded.autoencoder.decode(latent[None]))[0] for latent in latents]
        except (RuntimeError, MemoryError) as error:
            if len(seeds) == 1 or not is_out_of_memory(error):
                raise
            return None


def _encode(
    loaded: LoadedCheckpoint, request: Request, references: Sequence[_Reference], cancelled: Callable[[], bool]
) -> Generator[Event, None, _Conditions]:
    """Prompts and references as the transformer takes them."""
    _check(cancelled)
    yield Status(text="Reading the prompt")
    guided = loaded.checkpoint.guiding == "cfg" and request.guidance != 1.0
    prompts = [request.prompt, request.negative_prompt or ""] if guided else [request.prompt]
    encoded = loaded.text.encode(prompts)
    if request.negative_prompt and not guided:
        yield Notice(text="The negative prompt has no effect at guidance 1: choose a higher guidance to use it.")
    for name, cut in zip(("prompt", "negative prompt"), encoded.cut, strict=False):
        if cut:
            yield Notice(
                text=f"The {name} is too long for {loaded.checkpoint.label}, which reads "
                f"{loaded.checkpoint.recipe.length} tokens: its last {cut} token{'s' if cut > 1 else ''} (about "
                f"{max(1, cut * 3 // 4)} word{'s' if cut > 2 else ''}) had to be left out."
            )
    latents = []
    for number, reference in enumerate(references, start=1):
        _check(cancelled)
        yield Status(text=f"Reading image {number}" if len(references) > 1 else "Reading the image")
        yield from (Notice(text=note) for note in reference.notes)
        latents.append(loaded.references.encode(reference.image))
    return _Conditions(
        context=encoded.context[:1],
        negative_context=encoded.context[1:] if guided else None,
        references=latents,
    )


def _denoise(
    loaded: LoadedCheckpoint,
    request: Request,
    seeds: Sequence[int],
    waiting: int,
    conditions: _Conditions,
    timer: _Timer,
    cancelled: Callable[[], bool],
) -> Generator[Event, None, Tensor]:
    """Denoise one batch, yielding a Preview per step; the final latents [B, 128, h, w]."""
    assert request.width and request.height and request.steps and request.guidance is not None
    _check(cancelled)
    first = request.count - waiting
    yield Status(text="Drawing" if request.count == 1 else f"Drawing {_range(first, len(seeds), request.count)}")
    timer.start()
    for step in denoise(
        loaded.transformer,
        noise(seeds, request.width, request.height, loaded.transformer.params.in_channels),
        conditions.context,
        steps=request.steps,
        guidance=request.guidance,
        guiding=loaded.checkpoint.guiding,
        negative_context=conditions.negative_context,
        references=conditions.references,
        reference_cache=loaded.checkpoint.reference_cache,
    ):
        images = images_from_pixels(loaded.previewer(step.clean)) if loaded.previewer else []
        timer.stepped(len(seeds))
        yield Preview(
            step=step.index + 1,
            steps=step.steps,
            images=tuple(images),
            first=first,
            count=request.count,
            seconds_left=timer.left(waiting * step.steps - (step.index + 1) * len(seeds)),
        )
        _check(cancelled)
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
