"""The original of an edited picture in History, at the size of the result, for comparison."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.storage.history import History, PictureDetails
from flux2_studio.ui.stage.compare import is_edit, load_original


class OriginalLoader:
    """Loads originals.

    reference_store: references of runs, None if there are none. find_checkpoint: returns the checkpoint of a name;
    raises `RequestError` for an unknown one.
    """

    def __init__(
        self,
        history: History,
        reference_store: ReferenceStore | None,
        find_checkpoint: Callable[[str | None], Checkpoint],
        pictures: PictureCache,
    ) -> None:
        self._history = history
        self._reference_store = reference_store
        self._find_checkpoint = find_checkpoint
        self._pictures = pictures

    def has_original(self, owner: str, details: PictureDetails) -> bool:
        """Whether `owner`'s picture can be compared: it is an edit, and its first reference is available."""
        return self._original_file(owner, details) is not None

    def load_png(self, owner: str, details: PictureDetails) -> bytes | None:
        """The original as PNG; None if there is none. Raises `StudioError` and `OSError` for an unreadable file."""
        file, record = self._original_file(owner, details), details.record
        if file is None or record is None:
            return None
        try:
            checkpoint = self._find_checkpoint(record.request.checkpoint)
        except RequestError:  # a user's checkpoint that is gone: its scaling of references is unknown
            return None
        # Only the number of references and the presence of a mask matter: the first file stands in for all.
        mask = file if record.mask else None
        original = load_original(
            replace(record.request, references=(file,) * len(record.references), mask=mask), checkpoint, self._pictures
        )
        if original is None:
            return None
        out = io.BytesIO()
        original.save(out, "PNG", compress_level=1)  # lossless: unchanged areas must look unchanged
        return out.getvalue()

    def _original_file(self, owner: str, details: PictureDetails) -> Path | None:
        record = details.record
        if record is None or not is_edit(record.request, len(record.references), masked=bool(record.mask)):
            return None
        sha256 = record.references[0]
        own_file = self._history.find_file_by_hash(owner, sha256)
        return own_file if own_file is not None or self._reference_store is None else self._reference_store.find(sha256)
