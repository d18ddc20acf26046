"""A run's unfinished pictures, kept with its job so that a user who stops the run can still save the previews.

Each `Preview` event carries one unfinished picture per picture in progress; finished and withheld pictures are removed.
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
    """Saves an unfinished picture as a file; the studio implements it."""

    def save_preview(self, unfinished: Any) -> tuple[Saved, tuple[str, ...]]: ...


@dataclass(frozen=True, kw_only=True)
class SavedPreview:
    """Previews saved as files. notes: what the user should know about them."""

    pictures: tuple[Saved, ...]
    notes: tuple[str, ...]


class UnfinishedPictures:
    """The unfinished pictures of one run, by the picture's index. Safe to use from any thread."""

    def __init__(self) -> None:
        self._found: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        with self._lock:
            return len(self._found)

    def on_event(self, event: Event) -> None:
        """Update the pictures from an event of the run."""
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
        """Remove and return all pictures."""
        with self._lock:
            pictures, self._found = self._found, {}
        return pictures

    def _give_back(self, found: Mapping[int, Any]) -> None:
        with self._lock:
            self._found = {**found, **self._found}

    def save_all(self, saver: PreviewSaver, add_to_history: Callable[[Saved], str | None]) -> SavedPreview:
        """Have `saver` write all pictures as files. add_to_history: adds one to its owner's history; returns an error
        message or None. Raises `StudioError`; pictures that can be tried again are then kept."""
        unfinished = self.take_all()
        if not unfinished:
            raise StudioError(PREVIEW_GONE_MESSAGE)
        pictures: list[Saved] = []
        notes: list[str] = []
        refusal: SafetyError | None = None
        for index in sorted(unfinished):
            try:
                saved, saver_notes = saver.save_preview(unfinished[index])
            except SafetyError as error:  # drop this one and save the others
                refusal = error
                notes.append(str(error))
                continue
            except StudioError:
                self._give_back({number: picture for number, picture in unfinished.items() if number >= index})
                raise
            problem = add_to_history(saved)
            pictures.append(saved)
            notes += [*saver_notes, *([problem] if problem else [])]
        if refusal is not None and not pictures:
            raise refusal
        return SavedPreview(pictures=tuple(pictures), notes=tuple(dict.fromkeys(notes)))
