"""Inspect any file for its provenance: what it says about its origin, and how far that can be trusted.

Four things are examined: the file itself, its settings, the invisible watermark and the content credentials. Each can
be missing, forged or removed, and each means something only together with the others: settings are unproven unless an
intact signature by a known signer covers them. `Inspection.findings` puts that into words.

Pixels are examined as stored, because the watermark is in the stored pixels: EXIF orientation and colour profiles are
not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from flux2_studio.errors import RequestError, StudioError
from flux2_studio.files.hashing import hash_bytes
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
FORMAT_NAMES = {"MPO": "JPEG", "WEBP": "WebP"}  # Pillow's names whose usual name differs


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The results for one file. Texts are plain, never HTML, and single lines except prompts.

    format: PNG, JPEG, ...; "" if the file is not a picture or cannot be opened; `problem` then says why. width, height:
    in pixels as stored, 0 if unknown. bytes: the file size. sha256: of the whole file, "" if it is too large to read.
    watermark: the closest match among the messages; None if detection was impossible, and `watermark_problem` says why.
    watermark_box: where it was found, if not in the whole picture.
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
        """Conclusions in sentences for the user, the most important first."""
        found = [self.problem] if self.problem else []
        if self.is_picture and self.settings.record and (unfinished := self.settings.record.unfinished):
            found.append(
                f"This is an unfinished preview, as it was after step {unfinished[0]} of {unfinished[1]}: its settings "
                f"do not make this picture again, but the finished one."
            )
        if self.is_picture:
            found += [_settings_finding(self), *_contradictions(self), _watermark_finding(self)]
        summary = self.credentials.summary
        return (*found, f"There are content credentials. {summary}" if self.credentials.signer else summary)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON-compatible values."""
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
    """Inspect `picture`, a file or its bytes; problems with it are reported in the result.

    signer: recognises one's own credentials. messages: the watermark messages to look for. Raises `RequestError` if
    `picture` is a path without a readable file.
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
    picture_findings = _examine_picture(data, name, messages, box)
    return Inspection(
        name=name,
        bytes=size,
        sha256=hash_bytes(data),
        settings=settings if picture_findings.format else FoundSettings(),
        credentials=signer.read(data),
        **vars(picture_findings),
    )


def setting_rows(record: Record) -> list[tuple[str, str]]:
    """The settings as rows of name and text, without empty ones. Prompts may have several lines."""
    request = record.request
    enhanced_by = f"by {record.upsampled_by}" if record.upsampled_by else ""
    size = f"{request.width} x {request.height}"
    batch_position = f" (picture {record.place + 1} of {record.together} drawn together)" if record.together > 1 else ""
    marks = {"watermark": "watermark", "metadata": "settings", "sign": "content credentials"}
    unfinished = (
        f"a preview, kept after step {record.unfinished[0]} of {record.unfinished[1]}" if record.unfinished else ""
    )
    table = [
        ("Unfinished", unfinished),
        ("Prompt", request.prompt),
        ("Enhanced", enhanced_by),
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
        ("Seed", f"{request.seed}{batch_position}"),
        ("Steps", f"{request.steps}"),
        ("Guidance", f"{request.guidance:g}"),
        ("Saved as", request.format),
        ("Asked to carry", ", ".join(text for field, text in marks.items() if getattr(request, field))),
        ("Versions", ", ".join(f"{name} {version}" for name, version in record.versions.items())),
        ("Computed with", ", ".join(f"{name} {value}" for name, value in record.computed.items())),
    ]
    return [(name, text) for name, text in table if text]


def describe_outpaint(request: Request) -> str:
    """By how much the picture was extended, in words; "" if it was not."""
    return ", ".join(f"{pixels} on the {side}" for side, pixels in vars(request.outpaint).items() if pixels)


def credential_rows(credentials: Credentials) -> list[tuple[str, str]]:
    """Signer, actions and ingredients as rows of name and text; [] if there are none."""
    confirmed = "this installation" if credentials.own else "confirmed by nobody here"
    table = [
        ("Signed by", f"{credentials.signer} ({confirmed})" if credentials.signer else ""),
        ("Program", credentials.generator),
    ]
    for action in credentials.actions:
        description = ", ".join(filter(None, (action.text, action.agent, action.when)))
        table += [("Action", description), ("Prompt, published", action.prompt)]
    for ingredient in credentials.ingredients:
        signed = f"with credentials of its own{f', by {ingredient.generator}' if ingredient.generator else ''}"
        facts = (ingredient.relation, signed if ingredient.signed else "", *ingredient.problems)
        table.append((ingredient.title, "; ".join(filter(None, facts)) or "nothing more is said of it"))
    table += [("Problem", problem) for problem in credentials.problems]
    return [(name, text) for name, text in table if text]


# --- examining --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _PictureFindings:
    """Results for the picture itself; the fields are those of `Inspection`."""

    format: str = ""
    width: int = 0
    height: int = 0
    problem: str | None = None
    watermark: WatermarkDetection | None = None
    watermark_problem: str | None = None
    watermark_box: Box | None = None


def _read(picture: Path | bytes, name: str) -> tuple[bytes, int]:
    """Return the bytes of `picture`, at most `MAX_INSPECTED_BYTES` + 1, and its total size."""
    if isinstance(picture, bytes):
        return picture, len(picture)
    try:
        if not picture.is_file():  # missing, a folder, or a device or pipe, which may never end
            raise RequestError(f"There is no file {name} that could be looked at: check its name.")
        with picture.open("rb") as file:
            data = file.read(MAX_INSPECTED_BYTES + 1)
        return data, picture.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise RequestError(f"{name} cannot be opened: check that you may read it.") from error


def _examine_picture(data: bytes, name: str, messages: Sequence[WatermarkMessage], box: Box | None) -> _PictureFindings:
    """Decode the picture and look for a watermark. box: where the settings say that the watermark is."""
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
            # Only the part in which a watermark is looked for: an RGB copy of the whole picture may take gigabytes.
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
    detection, problem = _detect_watermark(pixels, (width, height), messages)
    in_box = _detect_watermark(part, part.size, messages)[0] if part is not None else None
    found_box = (
        box
        if in_box is not None and (detection is None or in_box.chance_probability < detection.chance_probability)
        else None
    )
    if found_box is not None:
        detection, problem = in_box, None
    return _PictureFindings(
        format=format,
        width=width,
        height=height,
        watermark=detection,
        watermark_problem=problem,
        watermark_box=found_box,
    )


def _detect_watermark(
    pixels: Image.Image, size: tuple[int, int], messages: Sequence[WatermarkMessage]
) -> tuple[WatermarkDetection | None, str | None]:
    """Return the most likely detection of `messages` in the pixels, or the reason why there is none.

    size: of the whole picture; `pixels` may be only its upper part.
    """
    if min(pixels.size) < watermark.BLOCK_PIXELS or pixels.width * watermark.BLOCK_PIXELS > watermark.MAX_READ_PIXELS:
        return None, f"{size[0]} x {size[1]} pixels is no shape in which one is looked for."
    detections = [found for message in messages if (found := watermark.detect_watermark(pixels, message)) is not None]
    if not detections:
        return None, f"{size[0]} x {size[1]} pixels are too few to hold one."
    return min(detections, key=lambda found: found.chance_probability), None


# --- conclusions ------------------------------------------------------------------------------------------------


def _settings_finding(inspection: Inspection) -> str:
    if inspection.settings.record is None:
        return inspection.settings.problem or "There are no settings in the file."
    credentials = inspection.credentials
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


def _contradictions(inspection: Inspection) -> list[str]:
    """Where the settings and the file disagree."""
    if inspection.settings.record is None:
        return []
    request = inspection.settings.record.request
    found = []
    if (request.width, request.height) != (inspection.width, inspection.height):
        found.append(
            f"The settings are of a picture of {request.width} x {request.height} pixels, and this one has "
            f"{inspection.width} x {inspection.height}: it was changed since, or they belong to another picture."
        )
    if request.format.upper() != inspection.format.upper():
        found.append(f"The settings are of a picture saved as {request.format}, and this is {inspection.format}.")
    if request.watermark and inspection.watermark is not None and not inspection.watermark.found:
        found.append(
            "The settings ask for a watermark, and there is none: the picture could not hold it, or its pixels were "
            "changed since."
        )
    if request.sign and not inspection.credentials.present:
        found.append("The settings ask for content credentials, and there are none: they were taken off since.")
    return found


def _watermark_finding(inspection: Inspection) -> str:
    if inspection.watermark is None:
        return f"Whether there is a watermark cannot be told. {inspection.watermark_problem or ''}".strip()
    if not inspection.watermark.found:
        return str(inspection.watermark)
    where = " It lies in the part that was edited, as the settings say." if inspection.watermark_box else ""
    return f"{inspection.watermark}{where} It tells what kind of program made the picture, not who used it."
