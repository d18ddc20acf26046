"""From a drawn picture to its finished file: watermark, settings, signature, in this order.

The watermark lies in the pixels, so it comes before they are encoded; the settings are written with them; the signature
covers every byte, so it is the last thing that happens to the file. What is done is told, and so is what is not.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace

from PIL import Image

from flux2_studio.provenance import metadata, watermark
from flux2_studio.provenance.c2pa.credentials import ReferenceIngredient, Signer
from flux2_studio.provenance.watermark import WatermarkDetection, WatermarkMessage
from flux2_studio.record import Record
from flux2_studio.request import Request


@dataclass(frozen=True, kw_only=True)
class FinishedFile:
    """A picture's finished file, and its record, which tells where the watermark lies. notes: what the user should
    know; provenance: what it carries now, a sentence each."""

    data: bytes
    record: Record
    notes: tuple[str, ...]
    provenance: tuple[str, ...]


class Finisher:
    """Finishes pictures. message: what the watermark says."""

    def __init__(self, message: WatermarkMessage, signer: Signer) -> None:
        self.message = message
        self.signer = signer

    def check(self, request: Request) -> None:
        """Raises `CredentialsError` where the pictures of `request` (resolved) could not be signed, and `RequestError`
        where their format has no room for them: before hours of work."""
        assert request.width and request.height, "resolve the request first"
        metadata.check_size(request.width, request.height, request.format)
        if request.sign:
            _ = self.signer.identity

    def finish(
        self,
        image: Image.Image,
        record: Record,
        ingredients: Sequence[ReferenceIngredient] = (),
        edit_mask: Image.Image | None = None,
    ) -> FinishedFile:
        """The file of `image` (RGB), as the record's request wants it.

        ingredients: `Signer.source` of each reference. edit_mask: L, 0 where no pixel may be touched; None for nowhere.
        Raises `CredentialsError`.
        """
        request = record.request
        notes: list[str] = []
        provenance: list[str] = []
        mark: WatermarkDetection | None = None
        if request.watermark:
            if edit_mask is None:
                marked = watermark.embed_watermark(image, self.message)
            else:
                marked = watermark.embed_watermark_within(image, edit_mask, self.message)
            record = replace(record, marked=marked.box)
            image, mark = marked.image, marked.detection
            notes += [marked.reason] if marked.reason else []
        encoded = metadata.encode_picture(image, request.format, record if request.metadata else None)
        data = encoded.data
        notes += encoded.notes
        if mark is not None and request.format != "png":
            mark = self._detect_after_encoding(data, record.marked, notes)
        if mark is not None:
            where = ""
            if record.marked is not None:
                found = "Inspect finds it by the file's settings" if request.metadata else "nothing in the file says so"
                left, top, right, bottom = record.marked
                where = (
                    f" It lies in what was edited alone, {right - left} x {bottom - top} pixels from ({left}, {top}) "
                    f"on, where a reader has to look: {found}."
                )
            provenance.append(
                f"Invisible watermark: {mark.matching_bits} of the {len(mark.message.bits)} bits of "
                f"{mark.message.label} were "
                f"read back.{where}"
            )
        if request.metadata and not encoded.notes:
            provenance.append("Its settings are in the file, and that a model made it.")
        if request.sign:
            said = f"Invisible watermark: {mark.message.label}" if mark else None
            prompt = request.prompt if request.sign_prompt else None
            signed = self.signer.sign(data, record.label, ingredients, said, prompt)
            data = signed.data
            notes += signed.notes
            identity = self.signer.identity
            by = "this installation's own identity" if identity.local else f"the certificate of {identity.name}"
            provenance.append(f"Content credentials (C2PA), signed with {by}: later changes show.")
        return FinishedFile(data=data, record=record, notes=tuple(notes), provenance=tuple(provenance))

    def _detect_after_encoding(
        self, data: bytes, box: tuple[int, int, int, int] | None, notes: list[str]
    ) -> WatermarkDetection | None:
        """The watermark in `box`, or the whole, of a file whose format changes pixels; None, and a note, where that
        destroyed it."""
        with Image.open(io.BytesIO(data)) as file:
            found = watermark.detect_watermark(file.convert("RGB").crop(box), self.message)
        if found is not None and found.match_ratio >= watermark.MIN_MATCH_RATIO:
            return found
        bits = len(self.message.bits)
        notes.append(
            f"No watermark that can be relied on: only {found.matching_bits if found else 0} of its {bits} bits "
            "outlived the "
            f"compression. Save as PNG to keep it."
        )
        return None
