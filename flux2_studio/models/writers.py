"""Language models that write on this machine: a place in memory for one, and what the page says of each.

Does: plans the memory of a language model that is to write, by itself: whole on the device, else with as few of its
layers streamed as will do. Does not know: how it gets there (`manager.py`), what it writes
(`prompting/openai_server.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from flux2_studio.checkpoints import LOCAL_WRITERS, Checkpoint, LocalWriter, local_writers
from flux2_studio.engine.text.writer import Writer
from flux2_studio.errors import OutOfMemory, WeightsError
from flux2_studio.models.checkpoint_files import OpenedWriter, Opener
from flux2_studio.models.hub.hub_errors import amount
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.memory.plan import gigabytes, needed_for, usable
from flux2_studio.settings import Settings

OR_ELSE = "Choose a smaller language model, OpenRouter, or draw without enriching"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A language model on the device, ready to write. notes: what the user should know of how it got there."""

    writer: Writer
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Place:
    """How a language model fits: `peak` bytes of the `limit` that there are while it writes, with `streamed` of its
    `blocks` layers waiting in main memory."""

    peak: int
    limit: int
    streamed: int
    blocks: int

    def notes(self, label: str) -> tuple[str, ...]:
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

    own: whether it is the checkpoint's text encoder, which is on this machine for reading anyway. on_disk: whether it
    can be loaded without a download; download: bytes still to come. memory: bytes that it takes beside what the
    checkpoint does; by its published size where it is not on disk, an upper bound for an own one. text: all of that
    in a sentence, or what is wrong with its files.
    """

    name: str
    label: str
    sees: bool
    own: bool
    on_disk: bool
    download: int
    memory: int
    text: str


def writer_of(checkpoint: Checkpoint) -> LocalWriter | None:
    """The language model that the text encoder of `checkpoint` is made of, None where that cannot write."""
    return next((it for it in LOCAL_WRITERS if (it.part, it.recipe) == (checkpoint.text, checkpoint.recipe)), None)


def offers(checkpoint: Checkpoint, settings: Settings, hub: Hub, opener: Opener) -> tuple[WriterOffer, ...]:
    """See `ModelManager.writers`."""
    here = not settings.reads_remotely(checkpoint)
    own = writer_of(checkpoint) if here else None
    return tuple(_offer(model, model == own, hub, opener) for model in local_writers(checkpoint))


def _offer(model: LocalWriter, own: bool, hub: Hub, opener: Opener) -> WriterOffer:
    part = model.part
    memory, download, text = part.size, 0, ""
    on_disk = hub.on_disk(part)
    try:
        if on_disk:
            opened = opener.writer(model, _silent)
            memory = opened.beside if own else opened.weights.total
        elif hub.from_hub(part):
            download = max(part.size - hub.size_on_disk(part), 0)
        else:
            hub.find(part)  # which says what is wrong with a copy that is not there
    except WeightsError as error:
        text = str(error)
    return WriterOffer(
        name=model.name,
        label=model.label,
        sees=model.sees,
        own=own,
        on_disk=on_disk,
        download=download,
        memory=memory,
        text=text or _sentence(model, own, on_disk, download, memory),
    )


def _sentence(model: LocalWriter, own: bool, on_disk: bool, download: int, memory: int) -> str:
    if own:
        what = "The checkpoint's own text encoder: to write, it loads the layers that reading leaves out"
        return f"{what}, {amount(memory)} more." if on_disk else f"{what}, less than {amount(memory)} more."
    coming = f" after a download of {amount(download)}" if download else ""
    return f"Loads {model.label} ({amount(memory)}){coming}."


def make_place(
    opened: OpenedWriter,
    budget: int,
    device: torch.device,
    *,
    tokens: int,
    pictures: Sequence[tuple[int, int]],
    host: int | None,
    streaming: bool,
) -> Place:
    """How `opened` fits into `budget` bytes of the device's memory while it writes. Other parts have left by then.

    tokens: of the conversation, the answer included. pictures: (height, width) of each in pixels. host, streaming: as
    for `plan.make_plan`. Raises `OutOfMemory`.
    """
    weights, limit = opened.weights, usable(budget, device)
    activations = opened.writing(tokens, tuple(pictures))
    blocks = len(weights.blocks)
    streams = streaming and (host is None or weights.total <= host)  # it is read there as a whole
    for streamed in range(blocks + 1 if streams else 1):
        if (peak := weights.on_device(streamed) + activations) <= limit:
            return Place(peak=peak, limit=limit, streamed=streamed, blocks=blocks)
    label = opened.model.label
    if streaming and host is not None and weights.on_device(blocks) + activations <= limit:
        raise OutOfMemory(
            f"{label} takes {gigabytes(weights.total)} GB, too much for this device's memory at once; to send its "
            f"layers over one by one takes as much main memory, of which {gigabytes(host)} GB are free. {OR_ELSE}, or "
            f"close other programs."
        )
    least = min(weights.total, weights.on_device(blocks)) if streams else weights.total
    raise OutOfMemory(
        f"{label} needs about {gigabytes(needed_for(least + activations, device))} GB of memory to write, and "
        f"{gigabytes(budget)} GB can be used. {OR_ELSE}; weights in 8 bits (FLUX2_QUANTIZE=int8) need less."
    )


def _silent(text: str, fraction: float | None) -> None:
    pass
