"""What a picture of the history was made from, as large as it is, to be laid beside it."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.storage.history import History, PictureDetails
from flux2_studio.ui.stage.compare import is_edit, load_original


class OriginalLoader:
    """kept: where the references of runs are, None for nowhere. checkpoint: the one of that name; raises
    `RequestError` where there is none."""

    def __init__(
        self,
        history: History,
        reference_store: ReferenceStore | None,
        find_checkpoint: Callable[[str | None], Checkpoint],
    ) -> None:
        self._history = history
        self._reference_store = reference_store
        self._find_checkpoint = find_checkpoint

    def has_original(self, owner: str, details: PictureDetails) -> bool:
        """Whether there is one to compare `owner`'s picture with: it is an edit, and the first reference is here."""
        return self._original_file(owner, details) is not None

    def load_png(self, owner: str, details: PictureDetails) -> bytes | None:
        """A PNG of it; None where there is none. Raises `StudioError` and `OSError` for a file that cannot be read."""
        file, record = self._original_file(owner, details), details.record
        if file is None or record is None:
            return None
        try:
            checkpoint = self._find_checkpoint(record.request.checkpoint)
        except RequestError:  # one of the user's own, which is gone: how it scaled references is not known
            return None
        # Of the others, and of the mask, it only counts whether there are any.
        mask = file if record.mask else None
        before = load_original(
            replace(record.request, references=(file,) * len(record.references), mask=mask), checkpoint
        )
        if before is None:
            return None
        out = io.BytesIO()
        before.save(out, "PNG", compress_level=1)  # what stays the same must look the same
        return out.getvalue()

    def _original_file(self, owner: str, details: PictureDetails) -> Path | None:
        record = details.record
        if record is None or not is_edit(record.request, len(record.references), masked=bool(record.mask)):
            return None
        sha256 = record.references[0]
        own = self._history.find_file_by_hash(owner, sha256)
        return own if own is not None or self._reference_store is None else self._reference_store.find(sha256)
