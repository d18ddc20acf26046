"""What a run tells whoever follows it:

(Queued | Status | Notice | Preview)*  then exactly one of  Result | Stopped | Failed

Loading a checkpoint ahead of a run tells  (Queued | Status)*  and then  Ready | Stopped | Failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flux2_studio.request import Request

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Queued:
    """The run waits; `ahead` runs come first."""

    ahead: int


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
class Preview:
    """Step `step` (1-based) of `steps` is done; `images` is what the pictures would be by now.

    A run of many pictures may be made in several batches: `images` are pictures `first`, `first + 1`, ... (0-based)
    of `count`, and `step` and `steps` count within this batch. `images` is empty where previews are switched off.
    `seconds_left` is the estimate for the rest of the run, None before the first step was timed.
    """

    step: int
    steps: int
    images: tuple[Image, ...]
    first: int
    count: int
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class Result:
    """The run is done: `images[i]` is the saved file of the picture drawn with `seeds[i]`."""

    request: Request  # resolved: exactly what was run
    images: tuple[Path, ...]
    seeds: tuple[int, ...]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Ready:
    """The checkpoint called `checkpoint` is loaded, as far as the memory allows."""

    checkpoint: str


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """The run was cancelled by its owner. `images` are the pictures that were finished and saved before."""

    images: tuple[Path, ...] = ()
    seeds: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Failed:
    """The run ended with an error; `message` is written for the user."""

    message: str


Event = Queued | Status | Notice | Preview | Result | Ready | Stopped | Failed
FINAL = (Result, Ready, Stopped, Failed)
