"""Metadata in saved pictures: the settings that made a picture, and the statement that an AI model made it.

Every format gets EXIF (Software, Model) and XMP: `Iptc4xmpExt:DigitalSourceType`, by which search engines and archives
recognise generated pictures, and the system used (IPTC Photo Metadata 2025.1). The settings are a JSON object: the text
entry `parameters` in a PNG, EXIF's UserComment in JPEG and WebP:

    {"request": {"prompt": ..., "seed": ..., ...}, "checkpoint": {"name", "label", "sha256"},
     "references": [sha256, ...], "mask": sha256, "outpaint": {"left", "top", "right", "bottom"},
     "loras": [{"name", "weight", "sha256"}, ...], "original_prompt",
     "upsampled_by", "place", "together", "marked": [left, top, right, bottom], "versions": {...}, "computed": {...},
     "unfinished": [step, steps], only in a saved preview}

References are stored as the SHA-256 of the file's bytes: a path means nothing on another machine and may reveal more
about its owner than intended. LoRAs have a hash beside name and weight, because a name may refer to another file later.
The JSON is plain ASCII, so that every reader gets it right and every prompt can be written.

Files to read are untrusted. Reading decodes no pixels and checks every value; invalid settings are dropped, and a
sentence says so. Even valid settings are only what the file claims: anybody can write them.

Pitfalls handled here:
- a JPEG segment holds 64 KB, which a long prompt in an Asian script exceeds; then the settings are left out, with a
  note;
- on opening a file, Pillow raises for text that unpacks to more than 1 MB, and for more than 64 MB of it in all;
- Pillow copies some of `Image.info` from the file it read into the next one it writes.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any
from xml.sax.saxutils import escape

from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo

from flux2_studio import __version__
from flux2_studio.errors import RequestError
from flux2_studio.record import SOURCE_TYPE_URL, Record
from flux2_studio.request import MAX_COUNT, MAX_NAME, MAX_PROMPT, ImageFormat, Request

SOFTWARE = f"AI generated; flux2-studio {__version__}"
ENCODING_QUALITY = 95  # of JPEG and WebP; lower quality or chroma subsampling weakens the watermark
MAX_FORMAT_SIDE_PIXELS: Mapping[ImageFormat, int] = {
    "png": 2**31 - 1,
    "jpeg": 65_500,
    "webp": 16_383,
}  # limits of the encoders
METADATA_FORMATS = ("PNG", "JPEG", "WEBP")  # in which settings are read
MAX_SEGMENT = 65_533  # bytes of EXIF in a JPEG
MAX_TEXT = 10**6  # characters; three prompts of the maximum length take less
MAX_ENTRIES = 32  # per list or table in the JSON
MAX_VALUE = 200  # characters per name or value in `versions` and `computed`
MAX_NUMBER = 10**6  # pixels per side, steps
MAX_PROBLEM = 300  # characters

XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:xmp="http://ns.adobe.com/xap/1.0/"
 xmlns:photoshop="http://ns.adobe.com/photoshop/1.0/"
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">
{properties}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""

# EXIF tag numbers.
MODEL, SOFTWARE_TAG, EXIF_IFD, USER_COMMENT = 0x0110, 0x0131, 0x8769, 0x9286
ASCII = b"ASCII\0\0\0"  # marks a UserComment as plain text

# Fields of a request that the JSON stores elsewhere, or that are not settings of one picture.
FIELDS_STORED_ELSEWHERE = {"checkpoint", "references", "mask", "outpaint", "loras", "upsampling", "count"}
SETTINGS_KEYS = {
    "request",
    "checkpoint",
    "references",
    "mask",
    "outpaint",
    "loras",
    "original_prompt",
    "upsampled_by",
    "place",
    "together",
    "marked",
    "versions",
    "computed",
    "unfinished",
}
OTHER_PROGRAM = "The file holds settings of another program, which are not read here."
DAMAGED = "What the file says of itself is damaged, or made to be: it cannot be read."


@dataclass(frozen=True, kw_only=True)
class EncodedPicture:
    """A picture's file. notes: what could not be written, for the user."""

    data: bytes
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class FoundSettings:
    """The settings in a file, if any; `problem` says why settings that are there cannot be used."""

    record: Record | None = None
    problem: str | None = None


def check_size(width: int, height: int, format: ImageFormat) -> None:
    """Raise `RequestError` if `format` cannot hold that many pixels per side. Call it before the work starts."""
    limit = MAX_FORMAT_SIDE_PIXELS[format]
    if max(width, height) > limit:
        raise RequestError(
            f"{width} x {height} pixels do not go into a {_format_name(format)}, which has at most {limit:,} a side: "
            f"save as PNG, or choose a smaller size."
        )


def encode_picture(image: Image.Image, format: ImageFormat, record: Record | None) -> EncodedPicture:
    """Encode `image` (RGB, [0, 255]) as `format` with the metadata of `record`, or without metadata if it is None.

    PNG is lossless. Raises `RequestError` if the picture is too large for `format`.
    """
    check_size(*image.size, format)
    plain = image.convert("RGB")  # a copy
    plain.info.clear()
    notes: tuple[str, ...] = ()
    extra: dict[str, Any] = {}
    if record is not None:
        text = json.dumps(record_to_dict(record))
        extra = {"exif": _exif(record, None if format == "png" else text)}
        if format == "jpeg" and len(extra["exif"]) > MAX_SEGMENT:
            extra = {"exif": _exif(record, None)}
            notes = (
                "The settings are not in the file: a JPEG has no room for a prompt of this length. Save as PNG or WebP "
                "to keep them with the picture.",
            )
        if format == "png":
            extra["pnginfo"] = info = PngInfo()
            info.add_text("Software", SOFTWARE)
            info.add_text("parameters", text)
            info.add_itxt("XML:com.adobe.xmp", _xmp(record))
        else:
            extra["xmp"] = _xmp(record).encode()
    if format == "jpeg":
        extra |= {"quality": ENCODING_QUALITY, "subsampling": "4:4:4"}
    elif format == "webp":
        extra |= {"quality": ENCODING_QUALITY, "method": 4}
    out = io.BytesIO()
    plain.save(out, format=format.upper(), **extra)
    return EncodedPicture(data=out.getvalue(), notes=notes)


def read_settings(data: bytes) -> FoundSettings:
    """Read the settings in the bytes of any untrusted file. Never raises."""
    foreign = False
    try:
        with Image.open(io.BytesIO(data), formats=METADATA_FORMATS) as file:
            if file.format == "PNG":
                text = file.info.get("parameters")
                foreign = not {"prompt", "workflow"}.isdisjoint(file.info)  # ComfyUI's
            else:
                comment = file.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
                text = _settings_in_comment(comment) if isinstance(comment, bytes) else None
    except UnidentifiedImageError:
        return FoundSettings(problem="No settings can be read: this is no PNG, JPEG or WebP picture, or a damaged one.")
    except Image.DecompressionBombError:
        return FoundSettings(problem="The picture is too large to be looked at.")
    except Exception:  # noqa: BLE001 - for malicious files, decoders raise nearly every exception there is
        return FoundSettings(problem=DAMAGED)
    if not isinstance(text, str) or not text.strip():
        return FoundSettings(problem=OTHER_PROGRAM) if foreign else FoundSettings()
    if len(text) > MAX_TEXT:
        return FoundSettings(
            problem=f"The settings in the file have more than {MAX_TEXT:,} characters: they are not read."
        )
    if not text.lstrip().startswith("{"):
        return FoundSettings(problem=OTHER_PROGRAM)
    try:
        return FoundSettings(record=_parse_record(_parse_json(text)))
    except _InvalidSettings as wrong:
        return FoundSettings(problem=_on_one_line(str(wrong)))
    except RequestError as error:
        return FoundSettings(problem=_on_one_line(f"The settings in the file cannot be used: {error}"))


def record_to_dict(record: Record) -> dict[str, Any]:
    """Convert `record` to the JSON object in a file. It must have one hash per LoRA of its request."""
    request = record.request
    return {
        "request": {key: value for key, value in request.as_dict().items() if key not in FIELDS_STORED_ELSEWHERE},
        "checkpoint": {"name": request.checkpoint, "label": record.label, "sha256": record.checkpoint},
        "references": list(record.references),
        "mask": record.mask or None,
        "outpaint": asdict(request.outpaint),
        "loras": [asdict(lora) | {"sha256": sha256} for lora, sha256 in zip(request.loras, record.loras, strict=True)],
        "original_prompt": record.original_prompt,
        "upsampled_by": record.upsampled_by,
        "place": record.place,
        "together": record.together,
        "marked": list(record.marked) if record.marked else None,
        "versions": dict(record.versions),
        "computed": dict(record.computed),
        **({"unfinished": list(record.unfinished)} if record.unfinished else {}),
    }


def record_from_json(text: str) -> Record:
    """Parse the JSON text of `record_to_dict`. Raises `RequestError` for anything else."""
    try:
        return _parse_record(_parse_json(text))
    except _InvalidSettings as wrong:
        raise RequestError(_on_one_line(str(wrong))) from wrong


def request_to_reproduce(record: Record) -> Request:
    """The request whose picture number `record.place` is this one, bit for bit on the same kind of machine.

    The caller must still find its references. Raises `RequestError` if there is no such request.
    """
    seed = record.request.seed
    assert seed is not None, "a record's request is resolved"
    return replace(record.request, seed=seed - record.place, count=record.together)


# --- writing ----------------------------------------------------------------------------------------------------


def _exif(record: Record, text: str | None) -> bytes:
    exif = Image.Exif()
    exif[MODEL] = record.label
    exif[SOFTWARE_TAG] = SOFTWARE
    if text is not None:
        exif.get_ifd(EXIF_IFD)[USER_COMMENT] = ASCII + text.encode("ascii")
    return exif.tobytes()


def _xmp(record: Record) -> str:
    source_type = "compositeWithTrainedAlgorithmicMedia" if record.references else "trainedAlgorithmicMedia"
    properties = {
        "xmp:CreatorTool": f"flux2-studio {__version__}",
        "photoshop:Credit": "AI generated",
        "Iptc4xmpExt:DigitalSourceType": f"{SOURCE_TYPE_URL}{source_type}",
        "Iptc4xmpExt:AISystemUsed": record.label,
    }
    if record.checkpoint:
        properties["Iptc4xmpExt:AISystemVersionUsed"] = f"sha256:{record.checkpoint}"
    return XMP.format(
        properties="\n".join(f"<{name}>{escape(_line(value))}</{name}>" for name, value in properties.items())
    )


def _line(text: str) -> str:
    """Replace unprintable characters, which XML 1.0 cannot hold even escaped, by blanks."""
    return "".join(it if it.isprintable() else " " for it in text)


def _format_name(format: ImageFormat) -> str:
    return {"png": "PNG", "jpeg": "JPEG", "webp": "WebP"}[format]


# --- reading ----------------------------------------------------------------------------------------------------


class _InvalidSettings(Exception):
    """The JSON does not follow our format. The message is a sentence for the user."""


def _settings_in_comment(comment: bytes) -> str | None:
    """Extract settings, ours or another program's, from a UserComment; None for other comments (a camera's)."""
    coding, text = comment[:8], comment[8:]
    if coding == ASCII:
        plain = text.decode("latin-1")
    elif coding == b"UNICODE\0":
        plain = text.decode("utf-16-be", "replace")
    else:
        return None
    return plain if plain.lstrip().startswith("{") or "Steps: " in plain else None


def _parse_json(text: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise _InvalidSettings(f"The settings in the file hold {constant} as a number: they are not read.")

    try:
        parsed = json.loads(text, parse_constant=refuse)
    except RecursionError as error:
        raise _InvalidSettings("The settings in the file are nested too deeply: they are not read.") from error
    except ValueError as error:  # also for a number with more digits than Python converts
        raise _InvalidSettings("The settings in the file are damaged: they are no well-formed JSON.") from error
    if not isinstance(parsed, dict) or not {"request", "checkpoint"} <= parsed.keys():
        raise _InvalidSettings(OTHER_PROGRAM)
    if unknown := parsed.keys() - SETTINGS_KEYS:
        raise _InvalidSettings(
            f"The settings in the file have a part {min(unknown)!r}, which this version does not know."
        )
    return parsed


def _parse_record(parsed: Mapping[str, Any]) -> Record:
    """Validate and convert the JSON object. Raises `_InvalidSettings` or `RequestError`."""
    request = _checked_table(parsed["request"], "request")
    if misplaced := request.keys() & FIELDS_STORED_ELSEWHERE:
        raise _InvalidSettings(f"The settings in the file have {min(misplaced)} in a place where it never stands.")
    checkpoint = _checked_table(parsed["checkpoint"], "checkpoint")
    loras = [_checked_table(entry, "loras") for entry in _list(parsed, "loras")]
    hashes = tuple(_hash(entry.pop("sha256", None)) for entry in loras)
    record = Record(
        request=Request.from_dict(
            request
            | {
                "checkpoint": _name(checkpoint.get("name"), "name"),
                "loras": loras,
                "outpaint": _checked_table(parsed.get("outpaint", {}), "outpaint"),
            }
        ),
        label=_name(checkpoint.get("label"), "label"),
        checkpoint=_hash(checkpoint["sha256"]) if checkpoint.get("sha256") else "",
        references=tuple(_hash(entry) for entry in _list(parsed, "references")),
        mask=_hash(parsed["mask"]) if parsed.get("mask") else "",
        loras=hashes,
        original_prompt=_prompt(parsed.get("original_prompt")),
        upsampled_by=None if parsed.get("upsampled_by") is None else _name(parsed["upsampled_by"], "upsampled_by"),
        place=_integer(parsed.get("place", 0), "place", MAX_COUNT),
        together=_integer(parsed.get("together", 1), "together", MAX_COUNT),
        marked=_box(parsed.get("marked")),
        unfinished=_step(parsed.get("unfinished")),
        versions=_checked_texts(parsed, "versions"),
        computed=_checked_texts(parsed, "computed"),
    )
    _check_resolved(record)
    return record


def _check_resolved(record: Record) -> None:
    """Check that the request is fully resolved, as in every file we write, and valid."""
    request = record.request
    for name in ("width", "height", "steps"):
        _integer(getattr(request, name), name, MAX_NUMBER)
    if request.seed is None or request.negative_prompt is None or type(request.guidance) not in (int, float):
        raise _InvalidSettings("The settings in the file lack the seed, the guidance or the negative prompt.")
    if record.place >= record.together:
        raise _InvalidSettings("The settings in the file call the picture one more than were drawn together.")
    request_to_reproduce(record)


def _checked_table(value: object, name: str) -> dict[str, Any]:
    if not isinstance(value, dict) or any(isinstance(it, dict | list) for it in value.values()):
        raise _InvalidSettings(f"What the settings in the file have as {name} is of another form than this studio's.")
    return dict(value)


def _list(parsed: Mapping[str, Any], name: str) -> list[object]:
    value = parsed.get(name, [])
    if not isinstance(value, list) or len(value) > MAX_ENTRIES:
        raise _InvalidSettings(f"What the settings in the file have as {name} is no list, or too long a one.")
    return value


def _hash(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _InvalidSettings("The settings in the file name a file by something that is no SHA-256.")
    return value


def _name(value: object, name: str, longest: int = MAX_NAME) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= longest:
        raise _InvalidSettings(f"What the settings in the file have as {name} is no name, or too long a one.")
    return value


def _prompt(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_PROMPT or any("\ud800" <= it <= "\udfff" for it in value):
        raise _InvalidSettings("The original prompt in the file's settings is no text, or too long.")
    return value


def _integer(value: object, name: str, most: int) -> int:
    if type(value) is not int or not 0 <= value <= most:
        raise _InvalidSettings(f"What the settings in the file have as {name} is no whole number from 0 to {most:,}.")
    return value


def _box(value: object) -> tuple[int, int, int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 4:
        raise _InvalidSettings("What the settings in the file have as marked is no rectangle.")
    left, top, right, bottom = (_integer(it, "marked", MAX_NUMBER) for it in value)
    if left >= right or top >= bottom:
        raise _InvalidSettings("What the settings in the file have as marked is no rectangle.")
    return left, top, right, bottom


def _step(value: object) -> tuple[int, int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != 2:
        raise _InvalidSettings("What the settings in the file have as unfinished is no step of so many.")
    step, steps = (_integer(it, "unfinished", MAX_NUMBER) for it in value)
    if not 0 < step <= steps:
        raise _InvalidSettings("What the settings in the file have as unfinished is no step of so many.")
    return step, steps


def _checked_texts(parsed: Mapping[str, Any], name: str) -> dict[str, str]:
    table = _checked_table(parsed.get(name, {}), name)
    if len(table) > MAX_ENTRIES:
        raise _InvalidSettings(f"What the settings in the file have as {name} is too long.")
    return {_name(key, name, MAX_VALUE): _name(value, name, MAX_VALUE) for key, value in table.items()}


def _on_one_line(text: str) -> str:
    """Put `text`, which may quote the file, on one line and truncate it."""
    line = _line(text[: MAX_PROBLEM + 1])
    return line if len(line) <= MAX_PROBLEM else f"{line[: MAX_PROBLEM - 1]}…"
