"""Language models that write on this machine: a place in memory for one, and what the page says of each.

Does: plans the memory of a language model that is to write, by itself: whole on the device, else with as few of its
layers streamed as will do. Does not know: how it gets there (`manager.py`), what it writes
(`prompting/openai_server.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flux2_studio.checkpoints import LOCAL_WRITERS, Checkpoint, LocalWriter, list_local_writers
from flux2_studio.engine.text.writer import Writer
from flux2_studio.errors import OutOfMemory, WeightsError
from flux2_studio.models.checkpoint_files import CheckpointOpener, LocalWriterFiles
from flux2_studio.models.hub.hub_errors import format_size
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.memory.plan import format_gigabytes, required_budget, usable_bytes
from flux2_studio.settings import Settings

OTHER_WRITER_HINT = "Choose a smaller language model, OpenRouter, or draw without enriching"


@dataclass(frozen=True, kw_only=True)
class LoadedWriter:
    """A language model on the device, ready to write. notes: what the user should know of how it got there."""

    writer: Writer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class WriterPlan:
    """How a language model fits: `peak` bytes of the `limit` that there are while it writes, with `streamed` of its
    `bytes_per_block` layers waiting in main memory."""

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
    """A language model that can enrich prompts beside a checkpoint, as it is now.

    is_text_encoder: whether it is the checkpoint's text encoder, which is on this machine for reading anyway.
    is_on_disk: whether it can be loaded without a download; download: bytes still to come. memory: bytes that it takes
    beside what the checkpoint does; by its published size where it is not on disk, an upper bound for an own one.
    description: all of that in a sentence, or what is wrong with its files.
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
    """The language model that the text encoder of `checkpoint` is made of, None where that cannot write."""
    return next((it for it in LOCAL_WRITERS if (it.part, it.recipe) == (checkpoint.text, checkpoint.recipe)), None)


def list_writer_offers(
    checkpoint: Checkpoint, settings: Settings, hub: Hub, opener: CheckpointOpener
) -> tuple[WriterOffer, ...]:
    """See `ModelManager.writers`."""
    here = not settings.uses_remote_text_encoder(checkpoint)
    own = find_text_encoder_writer(checkpoint) if here else None
    return tuple(_offer(model, model == own, hub, opener) for model in list_local_writers(checkpoint))


def _offer(model: LocalWriter, is_text_encoder: bool, hub: Hub, opener: CheckpointOpener) -> WriterOffer:
    part = model.part
    memory, download, text = part.size, 0, ""
    on_disk = hub.is_on_disk(part)
    try:
        if on_disk:
            opened = opener.writer(model, _ignore_progress)
            memory = opened.extra_bytes if is_text_encoder else opened.weights.total
        elif hub.is_from_hub(part):
            download = max(part.size - hub.size_on_disk(part), 0)
        else:
            hub.find(part)  # which says what is wrong with a copy that is not there
    except WeightsError as error:
        text = str(error)
    return WriterOffer(
        name=model.name,
        label=model.label,
        has_vision=model.has_vision,
        is_text_encoder=is_text_encoder,
        is_on_disk=on_disk,
        download=download,
        memory=memory,
        description=text or _sentence(model, is_text_encoder, on_disk, download, memory),
    )


def _sentence(model: LocalWriter, is_text_encoder: bool, on_disk: bool, download: int, memory: int) -> str:
    if is_text_encoder:
        what = "The checkpoint's own text encoder: to write, it loads the layers that reading leaves out"
        return f"{what}, {format_size(memory)} more." if on_disk else f"{what}, less than {format_size(memory)} more."
    coming = f" after a download of {format_size(download)}" if download else ""
    return f"Loads {model.label} ({format_size(memory)}){coming}."


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
    """How `opened` fits into `budget` bytes of the device's memory while it writes. Other parts have left by then.

    tokens: of the conversation, the answer included. image_sizes: (height, width) of each in pixels. free_host_bytes,
    streaming: as for `plan.make_plan`. Raises `OutOfMemory`.
    """
    weights, limit = opened.weights, usable_bytes(budget, device)
    activations = opened.writing_bytes(tokens, tuple(image_sizes))
    blocks = len(weights.bytes_per_block)
    streams = streaming and (free_host_bytes is None or weights.total <= free_host_bytes)  # it is read there as a whole
    for streamed in range(blocks + 1 if streams else 1):
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
    least = min(weights.total, weights.device_bytes(blocks)) if streams else weights.total
    raise OutOfMemory(
        f"{label} needs about {format_gigabytes(required_budget(least + activations, device))} GB of memory to "
        "write, and "
        f"{format_gigabytes(budget)} GB can be used. {OTHER_WRITER_HINT}; weights in 8 bits (FLUX2_QUANTIZE=int8) "
        "need less."
    )


def _ignore_progress(text: str, fraction: float | None) -> None:
    pass
