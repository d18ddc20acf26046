"""Local language models for prompt enhancement: their memory plan and the offers that the page lists.

A writer is planned alone on the device: whole if it fits, otherwise with as few layers streamed as possible.
`manager.py` loads it; `prompting/openai_server.py` runs it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flux2_studio.checkpoints import LOCAL_WRITERS, Checkpoint, LocalWriter, list_local_writers
from flux2_studio.engine.text.writer import Writer
from flux2_studio.errors import OutOfMemory, WeightsError
from flux2_studio.models.checkpoint_files import CheckpointOpener, LocalWriterFiles
from flux2_studio.models.hub.downloads import ignore_progress
from flux2_studio.models.hub.hub_errors import format_size
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.memory.plan import format_gigabytes, required_budget, usable_bytes
from flux2_studio.settings import Settings

OTHER_WRITER_HINT = "Choose a smaller language model, OpenRouter, or draw without enhancing"


@dataclass(frozen=True, kw_only=True)
class LoadedWriter:
    """A language model on the device, ready to write. notes: messages for the user about how it was loaded."""

    writer: Writer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WriterPlan:
    """The memory plan of a language model. While it writes, it takes `peak` of the `limit` usable bytes, and `streamed`
    of its `blocks` layers stay in main memory."""

    peak: int
    limit: int
    streamed: int
    blocks: int

    def make_notes(self, label: str) -> tuple[str, ...]:
        if not self.streamed:
            return ()
        return (
            f"{self.streamed} of {label}'s {self.blocks} layers do not fit into this device's memory: they wait in "
            f"main memory and are sent over for every piece of a word, so it writes slowly. A smaller language model "
            f"or OpenRouter is quicker.",
        )


@dataclass(frozen=True, kw_only=True)
class WriterOffer:
    """A language model that can enhance prompts for a checkpoint, with its current state.

    is_text_encoder: whether it is the checkpoint's own text encoder, used on this machine.
    is_on_disk: whether it can be loaded without a download. download: bytes still to download.
    memory: bytes that it takes in addition to the checkpoint. If it is not on disk, this is its published size, which
    is an upper bound for the checkpoint's own text encoder.
    description: a sentence with all of that, or with the problem of its files.
    """

    name: str
    label: str
    has_vision: bool
    is_text_encoder: bool
    is_on_disk: bool
    download: int
    memory: int
    description: str


def find_text_encoder_writer(checkpoint: Checkpoint) -> LocalWriter | None:
    """Returns the language model of which `checkpoint`'s text encoder is a part, None if that model cannot write."""
    return next((it for it in LOCAL_WRITERS if (it.part, it.recipe) == (checkpoint.text, checkpoint.recipe)), None)


def list_writer_offers(
    checkpoint: Checkpoint, settings: Settings, hub: Hub, opener: CheckpointOpener
) -> tuple[WriterOffer, ...]:
    """See `ModelManager.list_writers`."""
    runs_locally = not settings.uses_remote_text_encoder(checkpoint)
    own = find_text_encoder_writer(checkpoint) if runs_locally else None
    return tuple(_make_offer(model, model == own, hub, opener) for model in list_local_writers(checkpoint))


def _make_offer(model: LocalWriter, is_text_encoder: bool, hub: Hub, opener: CheckpointOpener) -> WriterOffer:
    part = model.part
    memory, download, problem = part.size, 0, ""
    on_disk = hub.is_on_disk(part)
    try:
        if on_disk:
            opened = opener.writer(model, ignore_progress)
            memory = opened.extra_bytes if is_text_encoder else opened.weights.total
        elif hub.is_from_hub(part):
            download = max(part.size - hub.size_on_disk(part), 0)
        else:
            hub.find(part)  # raises if the local copy is missing
    except WeightsError as error:
        problem = str(error)
    return WriterOffer(
        name=model.name,
        label=model.label,
        has_vision=model.has_vision,
        is_text_encoder=is_text_encoder,
        is_on_disk=on_disk,
        download=download,
        memory=memory,
        description=problem or _describe_offer(model, is_text_encoder, on_disk, download, memory),
    )


def _describe_offer(model: LocalWriter, is_text_encoder: bool, on_disk: bool, download: int, memory: int) -> str:
    if is_text_encoder:
        summary = "The checkpoint's own text encoder: to write, it loads the layers that reading leaves out"
        return (
            f"{summary}, {format_size(memory)} more."
            if on_disk
            else f"{summary}, less than {format_size(memory)} more."
        )
    download_note = f" after a download of {format_size(download)}" if download else ""
    return f"Loads {model.label} ({format_size(memory)}){download_note}."


def plan_writer(
    opened: LocalWriterFiles,
    budget: int,
    device: torch.device,
    *,
    tokens: int,
    image_sizes: Sequence[tuple[int, int]],
    free_host_bytes: int | None,
    streaming: bool,
) -> WriterPlan:
    """Plans how `opened` fits into `budget` bytes of device memory while it writes, with all other parts offloaded.

    tokens: of the whole conversation, including the answer. image_sizes: (height, width) of each picture in pixels.
    free_host_bytes, streaming: as for `plan.make_plan`. Raises `OutOfMemory`.
    """
    weights, limit = opened.weights, usable_bytes(budget, device)
    activations = opened.writing_bytes(tokens, tuple(image_sizes))
    blocks = len(weights.bytes_per_block)
    can_stream = streaming and (
        free_host_bytes is None or weights.total <= free_host_bytes
    )  # streaming loads all weights into main memory first
    for streamed in range(blocks + 1 if can_stream else 1):
        if (peak := weights.device_bytes(streamed) + activations) <= limit:
            return WriterPlan(peak=peak, limit=limit, streamed=streamed, blocks=blocks)
    label = opened.model.label
    if streaming and free_host_bytes is not None and weights.device_bytes(blocks) + activations <= limit:
        raise OutOfMemory(
            f"{label} takes {format_gigabytes(weights.total)} GB, too much for this device's memory at once; to send "
            "its "
            f"layers over one by one takes as much main memory, of which {format_gigabytes(free_host_bytes)} GB are "
            f"free. {OTHER_WRITER_HINT}, or "
            f"close other programs."
        )
    least = min(weights.total, weights.device_bytes(blocks)) if can_stream else weights.total
    raise OutOfMemory(
        f"{label} needs about {format_gigabytes(required_budget(least + activations, device))} GB of memory to "
        "write, and "
        f"{format_gigabytes(budget)} GB can be used. {OTHER_WRITER_HINT}; weights in 8 bits (FLUX2_QUANTIZE=int8) "
        "need less."
    )
