"""What the stages of one run share: its resolved request, its references, the session, and what it has finished."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import SafetyError
from flux2_studio.events import Event, Notice, PromptEnhanced
from flux2_studio.images.masks import EditRegion
from flux2_studio.models.hub.repositories import ProgressCallback
from flux2_studio.models.memory.plan import RequestShape
from flux2_studio.models.session import Session
from flux2_studio.models.worker_thread import in_worker_thread, raise_if_cancelled
from flux2_studio.provenance.c2pa.credentials import ReferenceIngredient
from flux2_studio.record import Record
from flux2_studio.request import Request, padded_size
from flux2_studio.safety.guard import SafetyGuard

T = TypeVar("T")


@dataclass
class RunOutputs:
    """What a run has done so far: `completed_count` pictures. Those in `images` are saved, the others were withheld."""

    completed_count: int = 0
    images: list[Path] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    notes: dict[str, list[int]] = field(default_factory=dict)  # note -> seeds of the saved pictures that it is about
    provenance: dict[str, list[int]] = field(default_factory=dict)  # provenance mark -> seeds, likewise
    reported: set[str] = field(default_factory=set)  # notices already sent, so that none is sent twice
    withheld: SafetyError | None = None  # why the last withheld picture was withheld

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
class RunContext:
    """One run in progress: its resolved request, and what its stages share.

    enhanced: the event of the prompt enhancement; None if there was none. region: the part of the result that may
    change; None if all of it may. preview_interval: the least number of seconds between two previews, by `clock`.
    check_seconds: seconds spent on opening and checking the references.
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
        """Run `work` in a worker thread and yield its progress. Raises `Cancelled`, also before it starts."""
        raise_if_cancelled(self.cancelled)
        return (yield from in_worker_thread(work, self.cancelled))


def make_request_shape(request: Request, references: Sequence[tuple[int, int]], checkpoint: Checkpoint) -> RequestShape:
    """Return what determines the memory of a resolved request. references: (width, height) of each after scaling."""
    width, height = request.padded_size
    read = [padded_size(*size) for size in references]
    if request.outpaint:  # the first stands on its canvas
        read[:1] = [(width, height)]
    return RequestShape(
        width=width,
        height=height,
        count=request.count,
        use_cfg=uses_cfg(request, checkpoint),
        references=tuple(read),
    )


def uses_cfg(request: Request, checkpoint: Checkpoint) -> bool:
    """Whether two prompts are read and every step is computed twice."""
    return checkpoint.guidance_mode == "cfg" and request.guidance != 1.0


def _seeds(seeds: Sequence[int]) -> str:
    """'seed 5', 'seeds 5, 7'."""
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
