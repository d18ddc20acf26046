"""What a run has drawn and not finished: kept with its job, so that somebody who stops it may keep what was on view.

A `Preview` brings a sketch of each picture that is under way; one that is finished, or withheld, has none any more.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from flux2_studio.errors import SafetyError, StudioError
from flux2_studio.events import Event, Preview, Result, Saved, Withheld

PREVIEW_GONE_MESSAGE = (
    "That preview is not there any more: only those of the last few stopped runs are. Run it again to see it."
)


class PreviewSaver(Protocol):
    """What it takes to keep a sketch: a studio."""

    def save_preview(self, unfinished: Any) -> tuple[Saved, tuple[str, ...]]: ...


@dataclass(frozen=True, kw_only=True)
class SavedPreview:
    """Sketches that are files now. notes: what the user should know of them."""

    pictures: tuple[Saved, ...]
    notes: tuple[str, ...]


class UnfinishedPictures:
    """Those of one run, by the picture's index. Safe to use from any thread."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._found)

    def on_event(self, event: Event) -> None:
        """What `event` of the run says of them."""
        with self._lock:
            match event:
                case Preview():
                    self._found = dict(enumerate(event.unfinished, event.first_index))
                case Saved(index=index) | Withheld(index=index):
                    self._found.pop(index, None)
                case Result():
                    self._found = {}
                case _:
                    pass

    def take_all(self) -> dict[int, Any]:
        """All of them; there are none afterwards."""
        with self._lock:
            found, self._found = self._found, {}
        return found

    def _give_back(self, found: Mapping[int, Any]) -> None:
        with self._lock:
            self._found = {**found, **self._found}

    def save_all(self, saver: PreviewSaver, add_to_history: Callable[[Saved], str | None]) -> SavedPreview:
        """Have `saver` make files of them. add_to_history: puts one where its owner finds it; what is wrong with that,
        if anything is. Raises `StudioError`: what can be tried again is still there then."""
        left = self.take_all()
        if not left:
            raise StudioError(PREVIEW_GONE_MESSAGE)
        pictures: list[Saved] = []
        notes: list[str] = []
        refused: SafetyError | None = None
        for index in sorted(left):
            try:
                saved, told = saver.save_preview(left[index])
            except SafetyError as error:  # this one goes nowhere, and the others are none the worse for it
                refused = error
                notes.append(str(error))
                continue
            except StudioError:
                self._give_back({number: sketch for number, sketch in left.items() if number >= index})
                raise
            trouble = add_to_history(saved)
            pictures.append(saved)
            notes += [*told, *([trouble] if trouble else [])]
        if refused is not None and not pictures:
            raise refused
        return SavedPreview(pictures=tuple(pictures), notes=tuple(dict.fromkeys(notes)))
