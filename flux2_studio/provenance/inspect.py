"""What a picture says of where it comes from, and what of that can be relied on. For any file, by whomever.

Four things are looked at: the file itself, the settings in it, the invisible watermark and the content credentials.
Each can be missing, forged or torn off, and each means something only together with the others: settings are what
somebody wrote into the file, unless a signature that is known and intact covers them. `findings` puts that into words.

Pixels are judged as they are stored, for that is where a watermark lies: not turned as EXIF would have it, not brought
to another colour space.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flux2_studio.errors import RequestError, StudioError
from flux2_studio.images.references import MAX_REFERENCE_PIXELS, display_name, open_image
from flux2_studio.provenance import metadata, watermark
from flux2_studio.provenance.c2pa.credentials import MAX_INSPECTED_BYTES, Signer
from flux2_studio.provenance.c2pa.report import Credentials, unreadable_credentials
from flux2_studio.provenance.metadata import FoundSettings
from flux2_studio.provenance.watermark import WatermarkDetection, WatermarkMessage
from flux2_studio.record import Record
from flux2_studio.request import Request

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

UNNAMED = "The file"
FORMAT_NAMES = {"MPO": "JPEG", "WEBP": "WebP"}  # formats by Pillow's names, where people have another one


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found in one file. Texts are plain, on one line but for prompts, and never HTML.

    format: PNG, JPEG, ...; "" for a file that is no picture, or none that can be opened, and then `problem` says why.
    width, height: pixels, as they are stored; 0 where they are not known. bytes: the file's size. sha256: of the whole
    file, "" for one that is too large to be read. watermark: what comes closest to one of the messages; None where it
    could not be looked for, and then `watermark_problem` says why. watermark_box: where in the picture it was found, if
    not in the whole.
    """

    name: str
    bytes: int
    sha256: str
    settings: FoundSettings
    credentials: Credentials
    format: str = ""
    width: int = 0
    height: int = 0
    problem: str | None = None
    watermark: WatermarkDetection | None = None
    watermark_problem: str | None = None
    watermark_box: Box | None = None

    @property
    def is_picture(self) -> bool:
        return bool(self.format)

    @property
    def findings(self) -> tuple[str, ...]:
        """What all of that amounts to, in sentences for the user, the most important first."""
        found = [self.problem] if self.problem else []
        if self.is_picture and self.settings.record and (unfinished := self.settings.record.unfinished):
            found.append(
                f"This is an unfinished preview, as it was after step {unfinished[0]} of {unfinished[1]}: its settings "
                f"do not make this picture again, but the finished one."
            )
        if self.is_picture:
            found += [_on_settings(self), *_contradictions(self), _on_watermark(self)]
        said = self.credentials.summary
        return (*found, f"There are content credentials. {said}" if self.credentials.signer else said)

    def as_dict(self) -> dict[str, Any]:
        """All of it as JSON knows it."""
        record, mark = self.settings.record, self.watermark
        return {
            "file": {
                "name": self.name,
                "format": self.format,
                "width": self.width,
                "height": self.height,
                "bytes": self.bytes,
                "sha256": self.sha256,
                "problem": self.problem,
            },
            "settings": metadata.record_to_dict(record) if record else None,
            "settings_problem": self.settings.problem,
            "watermark": {
                "message": mark.message.label,
                "found": mark.found,
                "bits": len(mark.message.bits),
                "right": mark.matching_bits,
                "match": mark.match_ratio,
                "chance": mark.chance_probability,
                "box": list(self.watermark_box) if self.watermark_box else None,
            }
            if mark
            else None,
            "watermark_problem": self.watermark_problem,
            "credentials": asdict(self.credentials),
            "findings": list(self.findings),
        }


def inspect_picture(picture: Path | bytes, signer: Signer, messages: Sequence[WatermarkMessage]) -> Inspection:
    """Look at `picture`, a file or its bytes, by whomever; whatever is wrong with it is said in the result.

    signer: knows which credentials are one's own. messages: what a watermark may say. Raises `RequestError` for a path
    at which there is no file that can be read.
    """
    name = display_name(picture) if isinstance(picture, Path) else UNNAMED
    data, size = _read(picture, name)
    if len(data) > MAX_INSPECTED_BYTES:
        too_large = f"the file is larger than {MAX_INSPECTED_BYTES // 10**6} MB"
        return Inspection(
            name=name,
            bytes=size,
            sha256="",
            settings=FoundSettings(),
            credentials=unreadable_credentials(too_large),
            problem=f"It cannot be looked at: {too_large}.",
        )
    settings = metadata.read_settings(data)
    box = settings.record.marked if settings.record else None
    seen = _examine_picture(data, name, messages, box)
    return Inspection(
        name=name,
        bytes=size,
        sha256=hashlib.sha256(data).hexdigest(),
        settings=settings if seen.format else FoundSettings(),
        credentials=signer.read(data),
        **vars(seen),
    )


def setting_rows(record: Record) -> list[tuple[str, str]]:
    """The settings as a table of names and texts, without those that are empty. Prompts may have several lines."""
    request = record.request
    enriched = f"by {record.upsampled_by}" if record.upsampled_by else ""
    size = f"{request.width} x {request.height}"
    together = f" (picture {record.place + 1} of {record.together} drawn together)" if record.together > 1 else ""
    marks = {"watermark": "watermark", "metadata": "settings", "sign": "content credentials"}
    stopped = (
        f"a preview, kept after step {record.unfinished[0]} of {record.unfinished[1]}" if record.unfinished else ""
    )
    table = [
        ("Unfinished", stopped),
        ("Prompt", request.prompt),
        ("Enriched", enriched),
        ("Original prompt", record.original_prompt or ""),
        ("Negative prompt", request.negative_prompt or ""),
        ("Checkpoint", f"{record.label} ({request.checkpoint})"),
        ("Checkpoint's file", record.checkpoint),
        ("References", ", ".join(f"image {number}: {sha}" for number, sha in enumerate(record.references, 1))),
        ("Mask", record.mask),
        ("Outpainted by", describe_outpaint(request)),
        ("Colours", "matched to image 1" if request.match_colours else ""),
        ("LoRAs", ", ".join(f"{lora.name} ({lora.weight:g})" for lora in request.loras)),
        ("Size", size),
        ("Seed", f"{request.seed}{together}"),
        ("Steps", f"{request.steps}"),
        ("Guidance", f"{request.guidance:g}"),
        ("Saved as", request.format),
        ("Asked to carry", ", ".join(text for field, text in marks.items() if getattr(request, field))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("Computed with", ", ".join(f"{name} {value}" for name, value in record.computed.items())),
    ]
    return [(name, text) for name, text in table if text]


def describe_outpaint(request: Request) -> str:
    """By how much the picture grew, in words; "" where it did not."""
    return ", ".join(f"{pixels} on the {side}" for side, pixels in vars(request.outpaint).items() if pixels)


def credential_rows(credentials: Credentials) -> list[tuple[str, str]]:
    """Who signed, what was done and what went into it, as a table of names and texts; [] where there is nothing."""
    confirmed = "this installation" if credentials.own else "confirmed by nobody here"
    table = [
        ("Signed by", f"{credentials.signer} ({confirmed})" if credentials.signer else ""),
        ("Program", credentials.generator),
    ]
    for action in credentials.actions:
        done = ", ".join(filter(None, (action.text, action.agent, action.when)))
        table += [("Action", done), ("Prompt, published", action.prompt)]
    for ingredient in credentials.ingredients:
        signed = f"with credentials of its own{f', by {ingredient.generator}' if ingredient.generator else ''}"
        facts = (ingredient.relation, signed if ingredient.signed else "", *ingredient.problems)
        table.append((ingredient.title, "; ".join(filter(None, facts)) or "nothing more is said of it"))
    table += [("Problem", problem) for problem in credentials.problems]
    return [(name, text) for name, text in table if text]


# --- looking ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _PictureFindings:
    """What the picture itself shows; the fields are those of `Inspection`."""

    format: str = ""
    width: int = 0
    height: int = 0
    problem: str | None = None
    watermark: WatermarkDetection | None = None
    watermark_problem: str | None = None
    watermark_box: Box | None = None


def _read(picture: Path | bytes, name: str) -> tuple[bytes, int]:
    """The bytes of `picture`, one more than `MAX_INSPECTED_BYTES` at most, and how many there are in all."""
    if isinstance(picture, bytes):
        return picture, len(picture)
    try:
        if not picture.is_file():  # missing, a folder, or a device or pipe, which could be read for ever
            raise RequestError(f"There is no file {name} that could be looked at: check its name.")
        with picture.open("rb") as file:
            data = file.read(MAX_INSPECTED_BYTES + 1)
        return data, picture.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RequestError(f"{name} cannot be opened: check that you may read it.") from error


def _examine_picture(data: bytes, name: str, messages: Sequence[WatermarkMessage], box: Box | None) -> _PictureFindings:
    """box: where the settings say that the watermark lies."""
    if not data:
        return _PictureFindings(problem="The file is empty.")
    format, width, height = "", 0, 0
    try:
        with open_image(data, name, any_size=True) as file:
            format, (width, height) = FORMAT_NAMES.get(file.format or "", file.format or ""), file.size
            if width * height > MAX_REFERENCE_PIXELS:
                return _PictureFindings(
                    format=format,
                    width=width,
                    height=height,
                    watermark_problem=f"More than {MAX_REFERENCE_PIXELS // 10**6} megapixels are not read.",
                )
            file.load()
            width, height = file.size
            # No more than a watermark is looked for in: a copy of the whole in RGB may take gigabytes.
            pixels = file.crop((0, 0, width, max(1, min(height, watermark.MAX_READ_PIXELS // width)))).convert("RGB")
            part = None
            if box is not None and box[2] <= width and box[3] <= height:
                part = file.crop(
                    (*box[:3], min(box[3], box[1] + watermark.MAX_READ_PIXELS // (box[2] - box[0])))
                ).convert("RGB")
    except StudioError as error:
        if not format:
            return _PictureFindings(problem=f"{error}")
        return _PictureFindings(
            format=format,
            width=width,
            height=height,
            problem="The picture cannot be decoded here: it is damaged or incomplete, or of a rare kind.",
            watermark_problem="The pixels cannot be read.",
        )
    mark, why = _detect_watermark(pixels, (width, height), messages)
    within = _detect_watermark(part, part.size, messages)[0] if part is not None else None
    marked = (
        box if within is not None and (mark is None or within.chance_probability < mark.chance_probability) else None
    )
    if marked is not None:
        mark, why = within, None
    return _PictureFindings(
        format=format, width=width, height=height, watermark=mark, watermark_problem=why, watermark_box=marked
    )


def _detect_watermark(
    pixels: Image.Image, size: tuple[int, int], messages: Sequence[WatermarkMessage]
) -> tuple[WatermarkDetection | None, str | None]:
    """Which of `messages` the pixels come closest to saying, or why that cannot be told. size: of the whole picture, of
    which `pixels` may be the upper part."""
    if min(pixels.size) < watermark.BLOCK_PIXELS or pixels.width * watermark.BLOCK_PIXELS > watermark.MAX_READ_PIXELS:
        return None, f"{size[0]} x {size[1]} pixels is no shape in which one is looked for."
    read = [found for message in messages if (found := watermark.detect_watermark(pixels, message)) is not None]
    if not read:
        return None, f"{size[0]} x {size[1]} pixels are too few to hold one."
    return min(read, key=lambda found: found.chance_probability), None


# --- what it amounts to -----------------------------------------------------------------------------------------


def _on_settings(seen: Inspection) -> str:
    if seen.settings.record is None:
        return seen.settings.problem or "There are no settings in the file."
    credentials = seen.credentials
    if credentials.own:
        return "The settings in the file are those that this installation wrote: it signed them, and they are intact."
    if credentials.intact:
        return (
            f"The settings in the file are unchanged since “{credentials.signer}” signed it; nobody here confirms who "
            f"that is."
        )
    if credentials.state == "none":
        return "The settings are only what the file claims: it is not signed, and anybody can write them."
    return "The settings are only what the file claims: the signature that should vouch for them does not hold."


def _contradictions(seen: Inspection) -> list[str]:
    """Where the settings say one thing, and the file is another."""
    if seen.settings.record is None:
        return []
    request = seen.settings.record.request
    found = []
    if (request.width, request.height) != (seen.width, seen.height):
        found.append(
            f"The settings are of a picture of {request.width} x {request.height} pixels, and this one has "
            f"{seen.width} x {seen.height}: it was changed since, or they belong to another picture."
        )
    if request.format.upper() != seen.format.upper():
        found.append(f"The settings are of a picture saved as {request.format}, and this is {seen.format}.")
    if request.watermark and seen.watermark is not None and not seen.watermark.found:
        found.append(
            "The settings ask for a watermark, and there is none: the picture could not hold it, or its pixels were "
            "changed since."
        )
    if request.sign and not seen.credentials.present:
        found.append("The settings ask for content credentials, and there are none: they were taken off since.")
    return found


def _on_watermark(seen: Inspection) -> str:
    if seen.watermark is None:
        return f"Whether there is a watermark cannot be told. {seen.watermark_problem or ''}".strip()
    if not seen.watermark.found:
        return str(seen.watermark)
    where = " It lies in the part that was edited, as the settings say." if seen.watermark_box else ""
    return f"{seen.watermark}{where} It tells what kind of program made the picture, not who used it."
