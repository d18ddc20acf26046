"""A run's first stage, where it is wanted: the prompt is enriched by the language model that the request names.

Whatever goes wrong here is an `UpsampleError`, so that whoever asked may go on without; nothing goes on without it in
silence.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from PIL import Image

from flux2_studio.checkpoints import Checkpoint, LocalWriter, local_writers
from flux2_studio.errors import DeviceError, UpsampleError, WeightsError
from flux2_studio.events import Event, Notice, Status, Upsampled, Writing
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.worker_thread import Cancelled, check, with_status
from flux2_studio.prompting.instructions import Mode
from flux2_studio.prompting.openai_server import (
    ApiKey,
    Local,
    OpenRouter,
    Sampling,
    Upsampler,
    no_writers,
    shrunk,
    upsample,
)
from flux2_studio.prompting.replies import OR_WITHOUT, Answer
from flux2_studio.request import Request, Upsampling
from flux2_studio.settings import Settings

TRY = "use fewer or smaller references, or try again later"
INSTRUCTIONS = 1024  # tokens, and more than the longest of them has, with the conversation's own marks


def check_choice(choice: Upsampling, checkpoint: Checkpoint, settings: Settings, key: ApiKey | None) -> None:
    """Raises `UpsampleError` where what `choice` names is plainly not to be had: before anything else is done."""
    if choice.by == "openrouter":
        OpenRouter.of(settings, choice.model, key)
    elif choice.by == "local":
        writer_of(choice, checkpoint)


def writer_of(choice: Upsampling, checkpoint: Checkpoint) -> LocalWriter:
    """The local writer that `choice` names, or the first that is offered. Raises `UpsampleError`."""
    offered = local_writers(checkpoint)
    if not offered:
        raise UpsampleError(no_writers(checkpoint))
    for writer in offered:
        if choice.model in (None, writer.name):
            return writer
    names = ", ".join(writer.name for writer in offered)
    raise UpsampleError(f"{choice.model} cannot write prompts for {checkpoint.label}: choose {names}, {OR_WITHOUT}.")


def enrich(
    request: Request,
    references: Sequence[Image.Image],
    settings: Settings,
    models: ModelManager,
    key: ApiKey | None,
    cancelled: Callable[[], bool],
) -> Generator[Event, None, Upsampled]:
    """The prompt of `request` (resolved), enriched as its `upsampling` says: what was written, piece by piece, then
    `Upsampled`, which is yielded as well as returned.

    references: as the engine sees them. key: the user's own, which goes before that of `settings`. Raises
    `UpsampleError`; `Cancelled` once `cancelled`.
    """
    choice = request.upsampling
    checkpoint = settings.checkpoint(request.checkpoint)
    try:
        if choice.by == "openrouter":
            upsampler: Upsampler = OpenRouter.of(settings, choice.model, key, _sampling(choice))
        else:
            model = writer_of(choice, checkpoint)
            upsampler = yield from _local(model, choice, request.prompt, references, models, cancelled)
        answer = yield from _written(upsampler, request, references, cancelled)
    except (DeviceError, WeightsError) as error:  # of the model here: it is missing, or too large
        raise UpsampleError(f"The prompt could not be enriched. {error} Choose another model, {OR_WITHOUT}.") from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if choice.by != "local":  # then a run may be under way beside this, with its weights
            raise UpsampleError(f"There is too little main memory left for this: {TRY}, {OR_WITHOUT}.") from error
        models.release_all()
        raise UpsampleError(
            f"The language model does not fit into memory: choose a smaller one, or OpenRouter, {OR_WITHOUT}."
        ) from error
    yield from (Notice(text=note) for note in answer.notes)
    done = Upsampled(original=request.prompt, prompt=answer.prompt, by=upsampler.label)
    yield done
    return done


def _local(
    model: LocalWriter,
    choice: Upsampling,
    prompt: str,
    references: Sequence[Image.Image],
    models: ModelManager,
    cancelled: Callable[[], bool],
) -> Generator[Event, None, Local]:
    check(cancelled)
    sizes = [(image.height, image.width) for image in shrunk(references)] if model.sees else []
    sampling = _sampling(choice, Sampling(temperature=model.temperature, top_p=model.top_p))
    tokens = INSTRUCTIONS + len(prompt.encode()) + sampling.max_tokens  # no text has more tokens than bytes
    writing = yield from with_status(lambda progress: models.writer(model, progress, sizes, tokens=tokens), cancelled)
    yield from (Notice(text=note) for note in writing.notes)
    return Local(writing.writer, model, sampling)


def _written(
    upsampler: Upsampler, request: Request, references: Sequence[Image.Image], cancelled: Callable[[], bool]
) -> Generator[Event, None, Answer]:
    assert request.seed is not None, "resolve the request first"
    yield Status(text=f"Enriching the prompt: {upsampler.label}")
    mode: Mode = "edit" if references else "generate"
    text = ""
    pieces = upsample(upsampler, request.prompt, references, mode, seed=request.seed, cancelled=cancelled)
    with closing(pieces):
        while True:
            check(cancelled)
            try:
                text += next(pieces)
            except StopIteration as end:
                if end.value is None:
                    raise Cancelled from None
                answer: Answer = end.value
                return answer
            yield Writing(text=text)


def _sampling(choice: Upsampling, advised: Sampling | None = None) -> Sampling:
    """How the model chooses its words: as `choice` says, else as `advised`."""
    advised = advised or Sampling()
    chosen: dict[str, Any] = {
        name: getattr(advised, name) if getattr(choice, name) is None else getattr(choice, name)
        for name in ("temperature", "top_p", "max_tokens")
    }
    return Sampling(**chosen)
