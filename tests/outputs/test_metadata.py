"""A saved picture tells what made it, to us and to anyone; and a hostile file can neither hurt nor mislead a reader."""

from __future__ import annotations

import io
import json
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import flux2_studio
from flux2_studio.errors import RequestError
from flux2_studio.provenance import metadata
from flux2_studio.provenance.metadata import FoundSettings, encode_picture, read_settings
from flux2_studio.record import Record
from flux2_studio.request import ImageFormat, LoraChoice, Request

EVERY: tuple[ImageFormat, ...] = get_args(ImageFormat)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
REQUEST = Request(
    prompt='a "quoted" fox,\nüber 狐 🦊',
    negative_prompt="",
    checkpoint="klein-base-4b",
    references=(Path("/home/someone/secret-project/face.png"),),
    width=1024,
    height=768,
    steps=50,
    guidance=4.0,
    seed=9,
    loras=(LoraChoice(name="styles/ink", weight=0.5),),
    format="jpeg",
    watermark=False,
    sign=False,
    sign_prompt=True,
)
RECORD = Record(
    request=REQUEST,
    label="FLUX.2 [klein] Base 4B",
    checkpoint="12" * 32,
    references=("ab" * 32, "ba" * 32),
    loras=("cd" * 32,),
    original_prompt="fox",
    upsampled_by="mistralai/mistral-small",
    place=2,
    together=4,
    versions={"flux2-studio": "0.1.0", "torch": "2.13.0+cu130"},
    computed={"device": "NVIDIA H100", "precision": "bfloat16"},
)
WITHOUT_PATHS = replace(RECORD, request=replace(REQUEST, references=()))


def written(format: ImageFormat = "png", record: Record | None = RECORD) -> bytes:
    return encode_picture(PICTURE, format, record).data


def with_prompt(prompt: str) -> Record:
    request = replace(REQUEST, prompt=prompt, negative_prompt=prompt, references=())
    return replace(RECORD, request=request, original_prompt=prompt)


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    everything = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), *chunks]
    everything += [(b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in everything
    )


def parameters(text: str | bytes) -> bytes:
    """A PNG of somebody who wrote `text` as its parameters."""
    return png((b"tEXt", b"parameters\0" + (text.encode("latin-1") if isinstance(text, str) else text)))


def commented(comment: bytes, format: str = "JPEG") -> bytes:
    """A picture of somebody who wrote `comment` as its UserComment."""
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    out = io.BytesIO()
    PICTURE.save(out, format, exif=exif)
    return out.getvalue()


def said(**changes: Any) -> dict[str, Any]:
    """The JSON in a picture of ours, with some of its parts exchanged; None takes one away."""
    own = json.loads(Image.open(io.BytesIO(written())).info["parameters"]) | changes
    return {key: value for key, value in own.items() if value is not None}


def request(**changes: Any) -> dict[str, Any]:
    return {"request": said()["request"] | changes}


# --- writing ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", EVERY)
def test_what_is_written_is_read_back(format: ImageFormat) -> None:
    made = encode_picture(PICTURE, format, RECORD)
    assert made.notes == ()
    assert read_settings(made.data) == FoundSettings(record=WITHOUT_PATHS)


@pytest.mark.parametrize("format", EVERY)
def test_what_is_not_known_is_read_back_as_such(format: ImageFormat) -> None:
    bare = Record(request=replace(REQUEST, references=(), loras=()), label="nano")
    assert read_settings(written(format, bare)) == FoundSettings(record=bare)


def test_the_json_is_for_others_too() -> None:
    own = said()
    assert own["request"]["prompt"] == 'a "quoted" fox,\nüber 狐 🦊'
    assert own["checkpoint"] == {"name": "klein-base-4b", "label": "FLUX.2 [klein] Base 4B", "sha256": "12" * 32}
    assert own["references"] == ["ab" * 32, "ba" * 32]
    assert own["loras"] == [{"name": "styles/ink", "weight": 0.5, "sha256": "cd" * 32}]
    assert Image.open(io.BytesIO(written())).info["parameters"].isascii()


def test_pixels_are_kept_by_png_and_nearly_by_the_others() -> None:
    smooth = PICTURE.resize((8, 8)).resize((96, 64), Image.Resampling.BICUBIC)
    for format in EVERY:
        with Image.open(io.BytesIO(encode_picture(smooth, format, RECORD).data)) as file:
            assert file.format == {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}[format]
            difference = np.abs(np.asarray(file.convert("RGB"), dtype=int) - np.asarray(smooth, dtype=int)).mean()
        assert difference <= {"png": 0, "jpeg": 1, "webp": 2}[format]


def test_a_jpegs_colours_have_their_full_size() -> None:
    from PIL import JpegImagePlugin

    assert JpegImagePlugin.get_sampling(Image.open(io.BytesIO(written("jpeg")))) == 0  # 4:4:4


@pytest.mark.parametrize("format", EVERY)
def test_without_a_record_there_are_pixels_only(format: ImageFormat) -> None:
    image = PICTURE.copy()
    image.info |= {"parameters": "mine", "exif": b"Exif\0\0mine", "icc_profile": b"mine", "comment": b"mine"}
    made = encode_picture(image, format, None).data
    assert read_settings(made) == FoundSettings()
    for word in (b"mine", b"flux2", b"AI", b"Exif", b"xpacket", b"tEXt", b"iTXt", b"eXIf"):
        assert word not in made
    with Image.open(io.BytesIO(made)) as file:
        assert not set(file.info) & {"exif", "xmp", "icc_profile", "comment", "parameters", "Software"}
    assert image.info["comment"] == b"mine", "the caller's picture is the caller's"


@pytest.mark.parametrize("format", EVERY)
def test_exif_says_that_a_model_made_it_and_which(format: ImageFormat) -> None:
    exif = Image.open(io.BytesIO(written(format))).getexif()
    assert exif[0x0131] == f"AI generated; flux2-studio {flux2_studio.__version__}"
    assert exif[0x0110] == "FLUX.2 [klein] Base 4B"
    assert 0x010E not in exif, "the prompt is in the settings, not in what a gallery shows as a caption"


def xmp(data: bytes) -> dict[str, str]:
    found = Image.open(io.BytesIO(data)).info["xmp"]
    packet = found.decode() if isinstance(found, bytes) else found
    root = ElementTree.fromstring(packet.replace("\ufeff", ""))
    description = root.find(".//{http://www.w3.org/1999/02/22-rdf-syntax-ns#}Description")
    assert description is not None
    return {entry.tag: entry.text or "" for entry in description}


@pytest.mark.parametrize("format", EVERY)
def test_xmp_says_so_in_iptcs_words(format: ImageFormat) -> None:
    iptc = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
    source = "http://cv.iptc.org/newscodes/digitalsourcetype/"
    found = xmp(written(format))
    assert found[f"{iptc}DigitalSourceType"] == f"{source}compositeWithTrainedAlgorithmicMedia"
    assert found[f"{iptc}AISystemUsed"] == "FLUX.2 [klein] Base 4B"
    assert found[f"{iptc}AISystemVersionUsed"] == f"sha256:{'12' * 32}"
    assert found["{http://ns.adobe.com/xap/1.0/}CreatorTool"] == f"flux2-studio {flux2_studio.__version__}"
    alone = xmp(written(format, replace(RECORD, references=(), checkpoint="")))
    assert alone[f"{iptc}DigitalSourceType"] == f"{source}trainedAlgorithmicMedia"
    assert f"{iptc}AISystemVersionUsed" not in alone


@pytest.mark.parametrize("format", EVERY)
def test_a_label_cannot_break_out(format: ImageFormat) -> None:
    label = "</x:xmpmeta> <b>&amp; {properties} ]]> 狐 \"'"
    found = xmp(written(format, replace(RECORD, label=label)))
    assert found["{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}AISystemUsed"] == label


def test_no_path_of_a_reference_is_in_the_file() -> None:
    for format in EVERY:
        content = written(format)
        assert b"secret" not in content and b"face" not in content


def test_no_lora_is_written_without_its_hash() -> None:
    with pytest.raises(ValueError, match="shorter"):
        written(record=replace(RECORD, loras=()))


@pytest.mark.parametrize("format", EVERY)
@pytest.mark.parametrize("prompt", ["nul \0 byte", "x\x1b[0m\r\n\u202e", "<img src=x onerror=alert(1)>", '{"a": [1}'])
def test_any_prompt_can_be_written(format: ImageFormat, prompt: str) -> None:
    made = encode_picture(PICTURE, format, with_prompt(prompt))
    assert made.notes == ()
    assert read_settings(made.data) == FoundSettings(record=with_prompt(prompt))


@pytest.mark.parametrize("prompt", ["狐" * 20_000, "🦊" * 20_000])
def test_the_longest_prompts_can_be_written_where_there_is_room(prompt: str) -> None:
    record = with_prompt(prompt)
    for format in ("png", "webp"):
        made = encode_picture(PICTURE, format, record)
        assert made.notes == ()
        assert read_settings(made.data) == FoundSettings(record=record)
    made = encode_picture(PICTURE, "jpeg", record)
    assert len(made.notes) == 1 and "PNG or WebP" in made.notes[0]
    assert read_settings(made.data) == FoundSettings()
    assert Image.open(io.BytesIO(made.data)).getexif()[0x0131].startswith("AI generated")
    assert xmp(made.data), "that a model made it is said all the same"


def test_a_jpeg_is_filled_to_the_brim() -> None:
    """A few bytes more than what is known to fit do not, and whatever is said to fit is really there."""
    fitted = []
    for letters in range(63_800, 64_700, 4):
        made = encode_picture(PICTURE, "jpeg", replace(RECORD, versions={"torch": "x" * letters}))
        with Image.open(io.BytesIO(made.data)) as file:
            comment = file.getexif().get_ifd(0x8769).get(0x9286, b"")
        assert (made.notes == ()) == (b"x" * letters in comment)
        fitted.append(made.notes == ())
    assert fitted == sorted(fitted, reverse=True) and fitted[0] and not fitted[-1]


@pytest.mark.parametrize(("format", "side"), [("jpeg", 65_504), ("webp", 16_384)])
def test_a_picture_too_long_for_a_format_is_refused_in_words(format: ImageFormat, side: int) -> None:
    long = Image.new("RGB", (side, 16))
    with pytest.raises(RequestError, match="save as PNG, or choose a smaller size"):
        encode_picture(long, format, None)
    assert encode_picture(long, "png", None).data.startswith(b"\x89PNG")
    most = Image.new("RGB", (16, metadata.MAX_FORMAT_SIDE_PIXELS[format]))
    assert Image.open(io.BytesIO(encode_picture(most, format, None).data)).size == most.size


def test_the_run_that_makes_a_picture_again() -> None:
    """The third of four that were drawn together: all four are asked for again."""
    again = metadata.request_to_reproduce(WITHOUT_PATHS)
    assert (again.seed, again.count) == (7, 4)
    assert again.seeds[WITHOUT_PATHS.place] == 9
    assert replace(again, seed=9, count=1) == WITHOUT_PATHS.request


# --- reading what others wrote ------------------------------------------------------------------------------------


def test_every_kind_of_text_entry_is_read() -> None:
    text = json.dumps(said()).encode()
    for chunk in (
        (b"tEXt", b"parameters\0" + text),
        (b"iTXt", b"parameters\0\0\0\0\0" + text),
        (b"zTXt", b"parameters\0\0" + zlib.compress(text)),
    ):
        assert read_settings(png(chunk)) == FoundSettings(record=WITHOUT_PATHS)


def test_optional_parts_may_be_missing() -> None:
    least = {"request": said()["request"], "checkpoint": {"name": "nano", "label": "nano"}}
    found = read_settings(parameters(json.dumps(least))).record
    assert found is not None and found.request.checkpoint == "nano"
    assert (found.references, found.loras, found.place, found.together, found.checkpoint) == ((), (), 0, 1, "")


@pytest.mark.parametrize(
    "content",
    [
        png(),
        parameters(""),
        commented(b"\0" * 8),
        commented(b"ASCII\0\0\0" + b" " * 200),
        commented(b"ASCII\0\0\0Our holiday by the sea"),
        commented(b"UNICODE\0" + "Unser Urlaub".encode("utf-16-be"), "WEBP"),
    ],
)
def test_a_picture_without_settings_has_no_problem(content: bytes) -> None:
    assert read_settings(content) == FoundSettings()


@pytest.mark.parametrize(
    "content",
    [
        parameters("a fox\nNegative prompt: blur\nSteps: 20, Sampler: Euler"),
        parameters('{"sui_image_params": {"prompt": "a fox"}}'),
        parameters('{"prompt": "a fox", "seed": 1}'),
        parameters("{}"),
        commented(b"UNICODE\0" + "a fox\nSteps: 20, Sampler: Euler".encode("utf-16-be")),
        commented(b"UNICODE\0" + "a fox\nSteps: 20, Sampler: Euler".encode("utf-16-be"), "WEBP"),
    ],
)
def test_settings_of_another_program_are_told_to_be_such(content: bytes) -> None:
    assert read_settings(content) == FoundSettings(problem=metadata.OTHER_PROGRAM)


def bomb(text: bytes) -> bytes:
    return b"parameters\0\0" + zlib.compress(text, 1)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no PNG, JPEG or WebP picture"),
        (b"not a picture", "no PNG, JPEG or WebP picture"),
        (b"GIF89a" + bytes(20), "no PNG, JPEG or WebP picture"),
        (parameters("{broken"), "no well-formed JSON"),
        (parameters('{"a": ' + "[" * 200_000), "nested too deeply"),
        (parameters('{"seed": ' + "9" * 100_000 + "}"), "no well-formed JSON"),
        (parameters('{"seed": NaN}'), "NaN"),
        (parameters('{"seed": -Infinity}'), "-Infinity"),
        (parameters('{"prompt": "' + "x" * 1_000_001 + '"}'), "more than 1,000,000 characters"),
        (png((b"zTXt", bomb(b" " * 50_000_000))), "damaged, or made to be"),
        (png((b"tEXt", b"parameters\0{}"), (b"zTXt", bomb(b" " * 50_000_000))), "damaged, or made to be"),
        (
            png((b"tEXt", b"parameters\0{}"), *([(b"zTXt", b"x\0\0" + zlib.compress(b" " * 1_000_000, 1))] * 70)),
            "damaged, or made to be",
        ),
        (parameters("{}")[:60], "or a damaged one"),
        (struct.pack(">8sI4s", b"\x89PNG\r\n\x1a\n", 0xFFFFFFFF, b"tEXt") + b"parameters\0{}", "damaged"),
        (written("jpeg")[:700], "damaged, or made to be"),
        (
            b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 65535, 65535, 8, 2, 0, 0, 0) + bytes(4),
            "or a damaged one",
        ),
        (commented(b"ASCII\0\0\0{broken"), "no well-formed JSON"),
        (commented(b"ASCII\0\0\0{broken", "WEBP"), "no well-formed JSON"),
    ],
)
def test_what_cannot_be_read_is_a_problem_in_words(content: bytes, problem: str) -> None:
    found = read_settings(content)
    assert found.record is None and found.problem is not None
    assert problem in found.problem and found.problem.endswith((".", "…"))


def test_a_bomb_of_pixels_is_not_opened() -> None:
    header = struct.pack(">IIBBBBB", 65535, 65535, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(it)) + kind + it + struct.pack(">I", zlib.crc32(kind + it))
        for kind, it in ((b"IHDR", header), (b"IDAT", b""))
    )
    assert read_settings(data) == FoundSettings(problem="The picture is too large to be looked at.")


SIXTY = {str(number): "x" for number in range(60)}


@pytest.mark.parametrize(
    ("forged", "problem"),
    [
        ({"more": 1}, "'more', which this version does not know"),
        ({"request": 5}, "as request"),
        ({"request": ["prompt"]}, "as request"),
        (request(prompt=["x"]), "as request"),
        (request(prompt={"x": {}}), "as request"),
        (request(prompt=5), "Write a prompt"),
        (request(prompt=" "), "Write a prompt"),
        (request(prompt="x" * 20_001), "shorten it"),
        (request(prompt="\ud800"), "lone surrogates"),
        (request(negative_prompt=None), "negative prompt"),
        (request(width=None), "as width"),
        (request(width=10**4000), "as width"),
        (request(width="x" * 100_000), "width must be a whole number"),
        (request(width=-1), "as width"),
        (request(height=1.5), "height must be"),
        (request(steps=True), "steps must be"),
        (request(steps=10**9), "as steps"),
        (request(seed=None), "lack the seed"),
        (request(seed=-1), "Choose a seed"),
        (request(guidance=None), "lack the seed, the guidance"),
        (request(guidance=True), "guidance must be a number"),
        (request(guidance=10**400), "guidance must be"),
        (request(guidance="4"), "guidance must be"),
        (request(format="exe"), "Save as one of"),
        (request(watermark="no"), "watermark must be"),
        (request(sudo=True), "no field 'sudo'"),
        (request(references="/etc/passwd"), "references in a place"),
        (request(checkpoint="dev"), "checkpoint in a place"),
        (request(count=16), "count in a place"),
        (request(upsampling="openrouter"), "upsampling in a place"),
        ({"checkpoint": "nano"}, "as checkpoint"),
        ({"checkpoint": {"label": "x"}}, "as name"),
        ({"checkpoint": {"name": "x" * 300, "label": "x"}}, "as name"),
        ({"checkpoint": {"name": "x\n", "label": "x"}}, "as name"),
        ({"checkpoint": {"name": "x", "label": 5}}, "as label"),
        ({"checkpoint": {"name": "x", "label": "x", "sha256": "ab"}}, "no SHA-256"),
        ({"checkpoint": {"name": "x", "label": "x", "sha256": 5}}, "no SHA-256"),
        ({"references": ["/etc/passwd"]}, "no SHA-256"),
        ({"references": ["../" * 21 + "a"]}, "no SHA-256"),
        ({"references": ["AB" * 32]}, "no SHA-256"),
        ({"references": ["ab" * 32 + "\n"]}, "no SHA-256"),
        ({"references": [["ab" * 32]]}, "no SHA-256"),
        ({"references": "ab" * 32}, "as references"),
        ({"references": ["ab" * 32] * 33}, "as references"),
        ({"loras": ["ink"]}, "as loras"),
        ({"loras": [{"name": "ink", "weight": 1}]}, "no SHA-256"),
        ({"loras": [{"name": "ink", "sha256": "cd" * 32, "x": 1}]}, "no request"),
        ({"loras": [{"name": "/etc/passwd", "weight": 1, "sha256": "cd" * 32}]}, "no LoRA's name"),
        ({"loras": [{"name": "../ink", "weight": 1, "sha256": "cd" * 32}]}, "no LoRA's name"),
        ({"loras": [{"name": "ink", "weight": 1e300, "sha256": "cd" * 32}]}, "weight of the LoRA"),
        ({"loras": [{"name": "ink", "weight": True, "sha256": "cd" * 32}]}, "weight of the LoRA"),
        ({"original_prompt": 5}, "original prompt"),
        ({"original_prompt": "\udc00"}, "original prompt"),
        ({"original_prompt": "x" * 20_001}, "original prompt"),
        ({"upsampled_by": "x\0"}, "as upsampled_by"),
        ({"place": 4, "together": 4}, "one more than"),
        ({"place": -1}, "as place"),
        ({"place": True}, "as place"),
        ({"together": 0, "place": 0}, "one more than"),
        ({"together": 17}, "as together"),
        ({"place": 10, "together": 16}, "Choose a seed"),
        ({"versions": ["torch"]}, "as versions"),
        ({"versions": {"torch": 2}}, "as versions"),
        ({"versions": {"torch": "2\x1b[0m"}}, "as versions"),
        ({"versions": {"torch": "x" * 201}}, "as versions"),
        ({"versions": SIXTY}, "as versions"),
        ({"computed": {"": "x"}}, "as computed"),
        ({"computed": SIXTY}, "as computed"),
    ],
)
def test_what_is_forged_is_a_problem_in_words(forged: dict[str, Any], problem: str) -> None:
    for content in (
        parameters(json.dumps(said() | forged)),
        encode_picture(PICTURE, "webp", None).data
        and commented(b"ASCII\0\0\0" + json.dumps(said() | forged).encode(), "WEBP"),
    ):
        found = read_settings(content)
        assert found.record is None and found.problem is not None
        assert problem in found.problem
        assert found.problem.isprintable() and len(found.problem) <= 300


def test_a_hostile_prompt_is_text_like_any_other() -> None:
    html = "<script>alert(1)</script>"
    found = read_settings(parameters(json.dumps(said() | request(prompt=html)))).record
    assert found is not None and found.request.prompt == html


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(part=st.sampled_from(sorted(metadata.SETTINGS_KEYS)), value=values)
def test_no_value_of_a_part_makes_reading_fail(part: str, value: Any) -> None:
    found = read_settings(parameters(json.dumps(said() | {part: value})))
    assert (found.record is None) != (found.problem is None)


@given(key=st.sampled_from(sorted(said()["request"])) | st.text(), value=values)
def test_no_value_of_the_request_makes_reading_fail(key: str, value: Any) -> None:
    found = read_settings(parameters(json.dumps(said() | request(**{key: value}))))
    assert (found.record is None) != (found.problem is None)


@given(text=st.binary(max_size=300))
def test_no_text_makes_reading_fail(text: bytes) -> None:
    for content in (parameters(text), png((b"iTXt", b"parameters\0" + text)), png((b"zTXt", b"parameters\0" + text))):
        assert read_settings(content).record is None
    for format in ("JPEG", "WEBP"):
        assert read_settings(commented(text, format)).record is None


@given(data=st.data(), format=st.sampled_from(EVERY))
def test_no_damage_makes_reading_fail(data: st.DataObject, format: ImageFormat) -> None:
    """Where the settings are read all the same, they are what they were, or pass for a studio's."""
    content = bytearray(written(format)[:3000])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    found = read_settings(bytes(content[: data.draw(st.integers(0, len(content)))]))
    assert found.record is None or found.problem is None
