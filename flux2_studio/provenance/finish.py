"""Turn a generated picture into its finished file: watermark, settings, signature, in this order.

The watermark changes pixels, so it comes before encoding; the settings are written while encoding; the signature covers
every byte, so it comes last. The result lists what was done and what was not.
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
    """A finished file and its record, which includes the position of the watermark.

    notes: for the user. provenance: the marks it carries, one sentence each.
    """

    data: bytes
    record: Record
    notes: tuple[str, ...]
    provenance: tuple[str, ...]


class Finisher:
    """Finishes pictures. message: the watermark's message."""

    def __init__(self, message: WatermarkMessage, signer: Signer) -> None:
        self.message = message
        self.signer = signer

    def check(self, request: Request) -> None:
        """Check that the pictures of `request` (resolved) can be finished, before hours of work.

        Raises `CredentialsError` if they cannot be signed, and `RequestError` if they are too large for their format.
        """
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
        """Make the file of `image` (RGB) as the record's request asks.

        ingredients: `Signer.make_ingredient` of each reference. edit_mask: L, 0 where pixels must not change; None if
        all may. Raises `CredentialsError`.
        """
        request = record.request
        notes: list[str] = []
        provenance: list[str] = []
        detection: WatermarkDetection | None = None
        if request.watermark:
            if edit_mask is None:
                marked = watermark.embed_watermark(image, self.message)
            else:
                marked = watermark.embed_watermark_within(image, edit_mask, self.message)
            record = replace(record, marked=marked.box)
            image, detection = marked.image, marked.detection
            notes += [marked.reason] if marked.reason else []
        encoded = metadata.encode_picture(image, request.format, record if request.metadata else None)
        data = encoded.data
        notes += encoded.notes
        if detection is not None and request.format != "png":
            detection = self._detect_after_encoding(data, record.marked, notes)
        if detection is not None:
            position_text = ""
            if record.marked is not None:
                how_to_find = (
                    "Inspect finds it by the file's settings" if request.metadata else "nothing in the file says so"
                )
                left, top, right, bottom = record.marked
                position_text = (
                    f" It lies in what was edited alone, {right - left} x {bottom - top} pixels from ({left}, {top}) "
                    f"on, where a reader has to look: {how_to_find}."
                )
            provenance.append(
                f"Invisible watermark: {detection.matching_bits} of the {len(detection.message.bits)} bits of "
                f"{detection.message.label} were "
                f"read back.{position_text}"
            )
        if request.metadata and not encoded.notes:
            provenance.append("Its settings are in the file, and that a model made it.")
        if request.sign:
            mark_description = f"Invisible watermark: {detection.message.label}" if detection else None
            prompt = request.prompt if request.sign_prompt else None
            signed = self.signer.sign(data, record.label, ingredients, mark_description, prompt)
            data = signed.data
            notes += signed.notes
            identity = self.signer.identity
            signer_name = (
                "this installation's own identity" if identity.local else f"the certificate of {identity.name}"
            )
            provenance.append(f"Content credentials (C2PA), signed with {signer_name}: later changes show.")
        return FinishedFile(data=data, record=record, notes=tuple(notes), provenance=tuple(provenance))

    def _detect_after_encoding(
        self, data: bytes, box: tuple[int, int, int, int] | None, notes: list[str]
    ) -> WatermarkDetection | None:
        """Detect the watermark after lossy encoding, in `box` or the whole picture.

        Returns None, and adds to `notes`, if the compression destroyed it.
        """
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
