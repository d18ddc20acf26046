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

from torch import Tensor

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.latents import noise
from flux2_studio.engine.sampling import denoise
from flux2_studio.errors import OutOfMemory
from flux2_studio.events import Event, Notice, Preview, Result, Status, Stopped
from flux2_studio.models.hub import Hub
from flux2_studio.models.manager import Loaded, ModelManager, Progress
from flux2_studio.models.memory import batch_size, is_out_of_memory
from flux2_studio.outputs.save import Library
from flux2_studio.pictures import images_from_pixels, pixels_from_image
from flux2_studio.references import Loaded as Reference
from flux2_studio.references import fit, fit_note, fit_size, load_reference
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
        checkpoint = self.settings.checkpoint(request.checkpoint)
        request.resolve(checkpoint)  # whatever is wrong with the numbers is said before pictures are opened
        cap = checkpoint.reference_cap(len(request.references))
        sizes = [fit_size(load_reference(path).image.size, cap) for path in request.references]
        return request.resolve(checkpoint, sizes)

    def generate(self, request: Request, cancelled: Callable[[], bool] = lambda: False) -> Iterator[Event]:
        """Carry out `request`, yielding events as `events.py` orders them; the last is a Result or, if `cancelled`
        turned true between two steps, Stopped. Raises `StudioError` for what the user must know.
        """
        finished = _Finished()
        try:
            yield from self._run(request, cancelled, finished)
        except _Cancelled:
            yield Stopped(images=tuple(finished.images), seeds=tuple(finished.seeds))

    def _run(self, asked: Request, cancelled: Callable[[], bool], finished: _Finished) -> Iterator[Event]:
        began = time.monotonic()
        _check(cancelled)
        request = self.resolve(asked)
        yield from (Notice(text=text) for text in changes(asked, request))
        checkpoint = self.settings.checkpoint(request.checkpoint)
        references = [load_reference(path) for path in request.references]

        loaded = yield from _with_status(lambda progress: self._models.load(checkpoint, progress), cancelled)
        yield from (Notice(text=text) for text in loaded.notes)

        yield Status(text="Reading the prompt")
        context, negative, cut = _encode_prompts(loaded, request)
        if cut:
            yield Notice(
                text=f"The prompt is too long for {checkpoint.label}: its last {cut} tokens (about "
                f"{max(1, cut * 3 // 4)} words) were left out. It reads {checkpoint.recipe.length} tokens."
            )
        latents = yield from self._encode_references(loaded, references, cancelled)

        timer = _Timer(request)
        waiting = list(request.seeds)
        size = self._batch_size(loaded, request, latents)
        while waiting:
            seeds = waiting[:size]
            first = request.count - len(waiting)
            try:
                batch = yield from self._denoise(
                    loaded, request, seeds, first, context, negative, latents, timer, cancelled
                )
                yield Status(text="Decoding")
                pictures = [images_from_pixels(loaded.autoencoder.decode(latent[None]))[0] for latent in batch]
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                smaller = len(seeds) // 2
                problem = str(error)
            else:
                for picture, seed in zip(pictures, seeds, strict=True):
                    one = replace(request, seed=seed, count=1)
                    path = self._library.save(picture, one, [reference.sha256 for reference in references])
                    finished.images.append(path)
                    finished.seeds.append(seed)
                del waiting[: len(seeds)]
                continue
            self._models.release_scratch()
            if not smaller:
                raise OutOfMemory(
                    f"{checkpoint.label} at {request.width} x {request.height} does not fit into this device's memory. "
                    f"Choose a smaller size, fewer or smaller references, or a smaller checkpoint."
                ) from RuntimeError(problem)
            size = smaller
            yield Notice(text=f"{len(seeds)} pictures at once do not fit into memory: making {smaller} at a time.")
        yield Result(
            request=request,
            images=tuple(finished.images),
            seeds=tuple(finished.seeds),
            seconds=time.monotonic() - began,
        )

    def _encode_references(
        self, loaded: Loaded, references: Sequence[Reference], cancelled: Callable[[], bool]
    ) -> Generator[Event, None, list[Tensor]]:
        cap = loaded.checkpoint.reference_cap(len(references))
        latents = []
        for number, reference in enumerate(references, start=1):
            _check(cancelled)
            yield Status(text=f"Reading image {number}" if len(references) > 1 else "Reading the image")
            image = fit(reference.image, cap)
            yield from (Notice(text=note) for note in reference.notes)
            if note := fit_note(number, reference.image.size, image.size):
                yield Notice(text=note)
            latents.append(loaded.autoencoder.encode(pixels_from_image(image)))
        return latents

    def _batch_size(self, loaded: Loaded, request: Request, references: Sequence[Tensor]) -> int:
        assert request.width is not None and request.height is not None
        sizes = [(request.height // 16, request.width // 16), *(latent.shape[-2:] for latent in references)]
        tokens = loaded.checkpoint.recipe.length + sum(h * w for h, w in sizes)
        if loaded.checkpoint.takes_negative_prompt:
            tokens *= 2
        transformer = loaded.transformer
        return batch_size(request.count, tokens, transformer.params, transformer.dtype, transformer.device)

    def _denoise(
        self,
        loaded: Loaded,
        request: Request,
        seeds: Sequence[int],
        first: int,
        context: Tensor,
        negative: Tensor | None,
        references: Sequence[Tensor],
        timer: _Timer,
        cancelled: Callable[[], bool],
    ) -> Generator[Event, None, Tensor]:
        """Denoise one batch, yielding a Preview per step; the final latents [B, 128, h, w]."""
        assert request.width and request.height and request.steps and request.guidance is not None
        _check(cancelled)
        yield Status(text="Drawing" if request.count == 1 else f"Drawing {_range(first, len(seeds), request.count)}")
        steps = denoise(
            loaded.transformer,
            noise(seeds, request.width, request.height, loaded.transformer.params.in_channels),
            context,
            steps=request.steps,
            guidance=request.guidance,
            guiding=loaded.checkpoint.guiding,
            negative_context=negative,
            references=references,
            reference_cache=loaded.checkpoint.reference_cache,
        )
        timer.start()
        for step in steps:
            images = images_from_pixels(loaded.previewer(step.clean)) if loaded.previewer else []
            timer.stepped(len(seeds))
            yield Preview(
                step=step.index + 1,
                steps=step.steps,
                images=tuple(images),
                first=first,
                count=request.count,
                seconds_left=timer.left(),
            )
            _check(cancelled)
        return step.latents


class _Timer:
    """Estimates the time left from the steps so far, counting a step once per picture."""

    def __init__(self, request: Request) -> None:
        assert request.steps is not None
        self._left = request.steps * request.count
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
        self._left = max(0, self._left - pictures)

    def left(self) -> float:
        return self._spent / self._done * self._left


def _encode_prompts(loaded: Loaded, request: Request) -> tuple[Tensor, Tensor | None, int]:
    """The prompt's context, the negative one where guidance needs it, and how many tokens of the prompt were cut."""
    if loaded.checkpoint.guiding != "cfg" or request.guidance == 1.0:
        encoded = loaded.text.encode([request.prompt])
        return encoded.context, None, encoded.cut[0]
    encoded = loaded.text.encode([request.prompt, request.negative_prompt or ""])
    return encoded.context[:1], encoded.context[1:], encoded.cut[0]


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
        return future.result()


def _check(cancelled: Callable[[], bool]) -> None:
    if cancelled():
        raise _Cancelled


def _range(first: int, length: int, count: int) -> str:
    """'pictures 1-2 of 4', 'picture 3 of 4'."""
    if length == 1:
        return f"picture {first + 1} of {count}"
    return f"pictures {first + 1}-{first + length} of {count}"
