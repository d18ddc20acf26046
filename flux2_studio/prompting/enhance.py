"""Prompt enhancement, the optional first stage of a run, by the language model that the request names.

Every failure is an `UpsampleError`, so that the user can choose to run without enhancement. The stage never falls back
silently.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import Any

from PIL import Image

from flux2_studio.checkpoints import Checkpoint, LocalWriter, list_local_writers
from flux2_studio.errors import DeviceError, UpsampleError, WeightsError
from flux2_studio.events import Event, Notice, PromptEnhanced, PromptProgress, Status
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.worker_thread import Cancelled, in_worker_thread, raise_if_cancelled
from flux2_studio.prompting.instructions import PromptMode
from flux2_studio.prompting.openai_server import (
    ApiKey,
    ChatServerUpsampler,
    LocalUpsampler,
    PromptUpsampler,
    SamplingParams,
    no_local_writers_message,
    shrink_references,
    upsample_prompt,
)
from flux2_studio.prompting.replies import OR_WITHOUT_ENHANCING, ParsedReply
from flux2_studio.request import Request, Upsampling
from flux2_studio.settings import Settings

SMALLER_REFERENCES_HINT = "use fewer or smaller references, or try again later"
MAX_INSTRUCTION_TOKENS = 1024  # an upper bound, including the tokens of the chat template


def check_upsampling_choice(choice: Upsampling, checkpoint: Checkpoint, settings: Settings, key: ApiKey | None) -> None:
    """Check early what can be checked without loading anything. Raises `UpsampleError` if the choice is unavailable."""
    if choice.by == "openrouter":
        ChatServerUpsampler.from_settings(settings, choice.model, key)
    elif choice.by == "local":
        select_local_writer(choice, checkpoint)


def select_local_writer(choice: Upsampling, checkpoint: Checkpoint) -> LocalWriter:
    """Return the local writer that `choice` names, or the first one offered. Raises `UpsampleError`."""
    offered = list_local_writers(checkpoint)
    if not offered:
        raise UpsampleError(no_local_writers_message(checkpoint))
    for writer in offered:
        if choice.model in (None, writer.name):
            return writer
    names = ", ".join(writer.name for writer in offered)
    raise UpsampleError(
        f"{choice.model} cannot write prompts for {checkpoint.label}: choose {names}, {OR_WITHOUT_ENHANCING}."
    )


def enhance_prompt(
    request: Request,
    references: Sequence[Image.Image],
    settings: Settings,
    models: ModelManager,
    key: ApiKey | None,
    cancelled: Callable[[], bool],
) -> Generator[Event, None, PromptEnhanced]:
    """Enhance the prompt of `request` (resolved) as its `upsampling` says. Yields the text as it is written, then a
    `PromptEnhanced`, which it also returns.

    references: as the engine sees them. key: the user's own, which takes precedence over that of `settings`. Raises
    `UpsampleError`, and `Cancelled` once `cancelled` returns True.
    """
    choice = request.upsampling
    checkpoint = settings.checkpoint(request.checkpoint)
    try:
        if choice.by == "openrouter":
            upsampler: PromptUpsampler = ChatServerUpsampler.from_settings(
                settings, choice.model, key, _sampling_params(choice)
            )
        else:
            model = select_local_writer(choice, checkpoint)
            upsampler = yield from _load_local_upsampler(model, choice, request.prompt, references, models, cancelled)
        answer = yield from _stream_enhanced_prompt(upsampler, request, references, cancelled)
    except (DeviceError, WeightsError) as error:  # the local model is missing or too large
        raise UpsampleError(
            f"The prompt could not be enhanced. {error} Choose another model, {OR_WITHOUT_ENHANCING}."
        ) from error
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if choice.by != "local":  # a run may be using its weights at the same time: keep them
            raise UpsampleError(
                f"There is too little main memory left for this: {SMALLER_REFERENCES_HINT}, {OR_WITHOUT_ENHANCING}."
            ) from error
        models.release_all()
        raise UpsampleError(
            f"The language model does not fit into memory: choose a smaller one, or OpenRouter, {OR_WITHOUT_ENHANCING}."
        ) from error
    yield from (Notice(text=note) for note in answer.notes)
    event = PromptEnhanced(original=request.prompt, prompt=answer.prompt, by=upsampler.label)
    yield event
    return event


def _load_local_upsampler(
    model: LocalWriter,
    choice: Upsampling,
    prompt: str,
    references: Sequence[Image.Image],
    models: ModelManager,
    cancelled: Callable[[], bool],
) -> Generator[Event, None, LocalUpsampler]:
    raise_if_cancelled(cancelled)
    sizes = [(image.height, image.width) for image in shrink_references(references)] if model.has_vision else []
    sampling = _sampling_params(choice, SamplingParams(temperature=model.temperature, top_p=model.top_p))
    # A text has at most one token per byte.
    tokens = MAX_INSTRUCTION_TOKENS + len(prompt.encode()) + sampling.max_tokens
    loaded = yield from in_worker_thread(
        lambda progress: models.acquire_writer(model, progress, sizes, tokens=tokens), cancelled
    )
    yield from (Notice(text=note) for note in loaded.notes)
    return LocalUpsampler(loaded.writer, model, sampling)


def _stream_enhanced_prompt(
    upsampler: PromptUpsampler, request: Request, references: Sequence[Image.Image], cancelled: Callable[[], bool]
) -> Generator[Event, None, ParsedReply]:
    assert request.seed is not None, "resolve the request first"
    yield Status(text=f"Enhancing the prompt: {upsampler.label}")
    mode: PromptMode = "edit" if references else "generate"
    text = ""
    pieces = upsample_prompt(upsampler, request.prompt, references, mode, seed=request.seed, cancelled=cancelled)
    with closing(pieces):
        while True:
            raise_if_cancelled(cancelled)
            try:
                text += next(pieces)
            except StopIteration as end:
                if end.value is None:
                    raise Cancelled from None
                answer: ParsedReply = end.value
                return answer
            yield PromptProgress(text=text)


def _sampling_params(choice: Upsampling, advised: SamplingParams | None = None) -> SamplingParams:
    """Return the sampling settings of `choice`, with those of `advised` where it sets none."""
    advised = advised or SamplingParams()
    chosen: dict[str, Any] = {
        name: getattr(advised, name) if getattr(choice, name) is None else getattr(choice, name)
        for name in ("temperature", "top_p", "max_tokens")
    }
    return SamplingParams(**chosen)
