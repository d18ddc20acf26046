"""The events that a run reports to its followers, by kind of run.

Generating:  (Queued | Status | Notice | PromptProgress | PromptEnhanced | Preview | Saved | Withheld)*
             then exactly one of  Result | Stopped | Failed
Enhancing a prompt without drawing:  (Queued | Status | Notice | PromptProgress | PromptEnhanced)*
             then  Ready | Stopped | Failed
Preloading a checkpoint:  (Queued | Status)*  then  Ready | Stopped | Failed
A draft:  (Queued | Status | Notice | Preview)*  then  Drafted | Stopped | Failed
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
    """The run is waiting; `runs_ahead` runs come first."""

    runs_ahead: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """The current activity, in words for the user; the next Status replaces it.

    `fraction` is its progress, 0..1, where that is known (a download), else None.
    """

    text: str
    fraction: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Lasting information about this run for the user, such as a rounded size or a truncated prompt."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PromptProgress:
    """A language model is enhancing the prompt; `text` is everything it has written so far."""

    text: str


@dataclass(frozen=True, kw_only=True)
class PromptEnhanced:
    """The language model `by` turned `original` into `prompt`; a run that continues draws `prompt`."""

    original: str
    prompt: str
    by: str


@dataclass(frozen=True, kw_only=True)
class Preview:
    """Step `step` (1-based) of `steps` is done; `images` are previews of the pictures at this step.

    A run of many pictures may be split into several batches: `images` are pictures `first_index`, `first_index + 1`,
    ... (0-based) of `count`, and `step` and `steps` count within this batch. `images` is empty if previews are switched
    off. `seconds_left` is the estimate for the rest of the run, None before the first step was timed. `unfinished` is
    what the studio needs to save each picture in its present state if the run ends here.
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
    """Picture `index` (0-based) of the run is finished: its file is `image`, its seed `seed`, its metadata `record`."""

    index: int
    image: Path
    seed: int
    record: Record


@dataclass(frozen=True, kw_only=True)
class Withheld:
    """The safety check withholds picture `index` (0-based) of the run: its previews must disappear too."""

    index: int


@dataclass(frozen=True, kw_only=True)
class Result:
    """The run is done: `images[i]` is the saved file of the picture drawn with `seeds[i]`.

    There are fewer pictures than requested if the safety check withheld some; a Notice reported that.
    """

    request: Request  # resolved, with the enhanced prompt if there is one: exactly what was run
    images: tuple[Path, ...]
    seeds: tuple[int, ...]
    seconds: float
    provenance: tuple[str, ...] = ()  # the provenance marks in the files, in sentences


@dataclass(frozen=True, kw_only=True)
class Drafted:
    """The draft is done: `image` is the picture of `request` (resolved). It is neither saved nor watermarked."""

    request: Request
    image: Image
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The checkpoint called `checkpoint` is loaded as far as memory allows, or the prompt was enhanced."""

    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The run was cancelled. `images` are the pictures that were finished and saved before that."""

    images: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The run ended with an error; `message` is written for the user.

    `in_prompt_enhancement`: prompt enhancement failed, and the run would work without it.
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
