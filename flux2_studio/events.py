"""What a run tells whoever follows it:

(Queued | Status | Notice | Writing | Upsampled | Preview | Saved | Withheld)*
then exactly one of  Result | Stopped | Failed

Enriching a prompt without drawing tells  (Queued | Status | Notice | Writing | Upsampled)*  and then
Ready | Stopped | Failed. Loading a checkpoint ahead of a run tells  (Queued | Status)*  and then
Ready | Stopped | Failed. A draft tells  (Queued | Status | Notice | Preview)*  and then  Drafted | Stopped | Failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2_studio.record import Record
from flux2_studio.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The run waits; `runs_ahead` runs come first."""

    runs_ahead: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is being done now, in the user's words; the next Status replaces it.

    `fraction` is how much of it is done, 0..1, where that is known (a download), else None.
    """

    text: str
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something the user should know of this run and that stays true: a rounded size, a cut prompt."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """A language model is enriching the prompt: `text` is all that it has written so far."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PromptEnhanced:
    """The language model called `by` is done: `prompt` is what it made of `original`, and what is drawn if the run
    goes on."""

    original: str
    prompt: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Step `step` (1-based) of `steps` is done; `images` is what the pictures would be by now.

    A run of many pictures may be made in several batches: `images` are pictures `first_index`, `first + 1`, ...
    (0-based) of `count`, and `step` and `steps` count within this batch. `images` is empty where previews are switched
    off. `seconds_left` is the estimate for the rest of the run, None before the first step was timed. `unfinished` is
    what the studio needs to make a file of each picture as it is by now, should the run end here.
    """

    step: int
    steps: int
    images: tuple[Image, ...]
    first_index: int
    count: int
    seconds_left: float | None
    unfinished: tuple[Any, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Picture `index` (0-based) of the run is finished: `image` is its file, drawn with `seed`, as `record` says."""

    index: int
    image: Path
    seed: int
    record: Record


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """The safety check keeps picture `index` (0-based) of the run back: nothing of it is to be seen any more."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The run is done: `images[i]` is the saved file of the picture drawn with `seeds[i]`.

    Fewer than were asked for where the safety check withheld some, which a Notice told.
    """

    request: Request  # resolved, its prompt enriched if that was asked for: exactly what was run
    images: tuple[Path, ...]
    seeds: tuple[int, ...]
    seconds: float
    provenance: tuple[str, ...] = ()  # what the pictures carry so that others can tell where they come from


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """The draft is done: `image` is what `request` (resolved) gives. It is neither saved nor marked."""

    request: Request
    image: Image
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The checkpoint called `checkpoint` is loaded as far as the memory allows, or its prompt enriched."""

    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The run was cancelled by its owner. `images` are the pictures that were finished and saved before."""

    images: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The run ended with an error; `message` is written for the user.

    `in_prompt_enhancement`: what failed was enriching the prompt, and the run would go on without it.
    """

    message: str
    in_prompt_enhancement: bool = False


Event = (
    Queued
    | Status
    | Notice
    | PromptProgress
    | PromptEnhanced
    | Preview
    | Saved
    | Withheld
    | Result
    | Drafted
    | Ready
    | Stopped
    | Failed
)
FINAL_EVENTS = (Result, Drafted, Ready, Stopped, Failed)
