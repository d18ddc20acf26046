"""What is said of a picture is true of it, whoever made it; and no file can make the saying fail."""

from __future__ import annotations

import io
import json
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from benchmarks.watermark import landscape
from flux2_studio.errors import RequestError
from flux2_studio.images.references import READABLE_FORMATS
from flux2_studio.provenance import watermark
from flux2_studio.provenance.c2pa.credentials import MAX_INSPECTED_BYTES, Signer
from flux2_studio.provenance.inspect import Inspection, credential_rows, inspect_picture, setting_rows
from flux2_studio.provenance.metadata import OTHER_PROGRAM, encode_picture
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage
from flux2_studio.record import Record
from flux2_studio.request import ImageFormat, LoraChoice, Request

OWN = WatermarkMessage.parse("studio 1")
MESSAGES = (OWN, PUBLISHED_MESSAGE)
REQUEST = Request(
    prompt="a fox\non <b>pink</b>",
    negative_prompt="",
    checkpoint="klein-4b",
    width=256,
    height=256,
    steps=4,
    guidance=1.0,
    seed=9,
    loras=(LoraChoice(name="styles/ink", weight=0.5),),
)
RECORD = Record(
    request=REQUEST,
    label="FLUX.2 [klein] 4B",
    checkpoint="12" * 32,
    references=("ab" * 32,),
    loras=("cd" * 32,),
    original_prompt="fox",
    upsampled_by="a model",
    place=1,
    together=2,
    versions={"torch": "2.13.0"},
    computed={"device": "cpu"},
)


@pytest.fixture(scope="module")
def signer(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("home") / "identity")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer(tmp_path_factory.mktemp("elsewhere") / "identity")


def finished(
    signer: Signer | None, message: WatermarkMessage | None = PUBLISHED_MESSAGE, record: Record | None = RECORD
) -> bytes:
    """A picture as the studio saves it: marked with `message`, with its settings, signed by `signer`."""
    image = landscape(0, 256)
    if message is not None:
        image = watermark.embed_watermark(image, message).image
    data = encode_picture(image, record.request.format if record else "png", record).data
    return signer.sign(data, "FLUX.2 [klein] 4B", prompt="a fox").data if signer else data


def changed(data: bytes) -> bytes:
    """The same picture, with a text entry added that no signature covers."""
    at = data.rindex(b"IEND")
    chunk = b"tEXt" + b"note\0added"
    return (
        data[: at - 4]
        + struct.pack(">I", len(chunk) - 4)
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + data[at - 4 :]
    )


def saved(format: str, size: tuple[int, int] = (300, 260), **options: object) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "teal").save(out, format, **options)
    return out.getvalue()


def test_a_picture_of_ones_own(signer: Signer, tmp_path: Path) -> None:
    path = tmp_path / "fox.png"
    path.write_bytes(finished(signer))
    seen = inspect_picture(path, signer, MESSAGES)
    assert (seen.name, seen.format, seen.width, seen.height) == ("fox.png", "PNG", 256, 256)
    assert seen.bytes == path.stat().st_size and len(seen.sha256) == 64
    assert seen.settings.record == RECORD and seen.problem is None
    assert seen.watermark is not None and seen.watermark.found and seen.watermark.message == PUBLISHED_MESSAGE
    assert seen.credentials.own
    signed, marked, intact = seen.findings
    assert "this installation wrote" in signed
    assert marked.startswith("Watermark found") and "not who used it" in marked
    assert intact == f"There are content credentials. {seen.credentials.summary}"


def test_bytes_and_a_path_are_the_same_to_it(signer: Signer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(finished(None))
    by_path = inspect_picture(tmp_path / "a.png", signer, MESSAGES)
    assert inspect_picture(finished(None), signer, MESSAGES) == replace(by_path, name="The file")


def test_the_message_that_fits_best_is_told(signer: Signer) -> None:
    for message in MESSAGES:
        seen = inspect_picture(finished(None, message), signer, MESSAGES).watermark
        assert seen is not None and seen.found and seen.message == message
    none = inspect_picture(finished(None, None), signer, MESSAGES)
    assert none.watermark is not None and not none.watermark.found
    assert any(finding.startswith("No watermark found") for finding in none.findings)
    assert any("ask for a watermark, and there is none" in finding for finding in none.findings)


def test_a_watermark_is_looked_for_in_the_pixels_as_they_are_stored(signer: Signer) -> None:
    """Turned by EXIF, or with its colours brought elsewhere, it would be lost."""
    from PIL import ImageCms

    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    out = io.BytesIO()
    watermark.embed_watermark(landscape(0, 256), PUBLISHED_MESSAGE).image.save(
        out, "PNG", exif=exif, icc_profile=profile
    )
    seen = inspect_picture(out.getvalue(), signer, MESSAGES).watermark
    assert seen is not None and seen.found


def test_settings_without_a_signature_are_a_claim(signer: Signer) -> None:
    first, *others = inspect_picture(finished(None), signer, MESSAGES).findings
    assert "only what the file claims" in first and "anybody can write them" in first
    assert any("ask for content credentials, and there are none" in finding for finding in others)


def test_a_strangers_signature_is_not_vouched_for(signer: Signer, stranger: Signer) -> None:
    first, *_ = inspect_picture(finished(stranger), signer, MESSAGES).findings
    assert "unchanged since “flux2-studio" in first and "nobody here confirms" in first


def test_a_changed_file_is_told_to_be_changed(signer: Signer) -> None:
    seen = inspect_picture(changed(finished(signer)), signer, MESSAGES)
    assert seen.credentials.state == "broken" and seen.settings.record == RECORD
    assert "the signature that should vouch for them does not hold" in seen.findings[0]
    assert "The picture was changed after it was signed." in seen.findings[-1]


def test_settings_of_another_picture_are_found_out(signer: Signer) -> None:
    other = replace(RECORD, request=replace(REQUEST, width=512, format="jpeg", sign=False, watermark=False))
    findings = inspect_picture(encode_picture(landscape(0, 256), "png", other).data, signer, MESSAGES).findings
    assert any("512 x 256 pixels, and this one has 256 x 256" in finding for finding in findings)
    assert any("saved as jpeg, and this is PNG" in finding for finding in findings)
    assert not any("ask for" in finding for finding in findings)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_nothing_is_held_against_a_picture_that_is_as_it_was_made(signer: Signer, format: ImageFormat) -> None:
    record = replace(RECORD, request=replace(REQUEST, format=format))
    seen = inspect_picture(finished(signer, record=record), signer, MESSAGES)
    assert len(seen.findings) == 3 and seen.watermark is not None and seen.watermark.found


def test_a_picture_without_anything(signer: Signer) -> None:
    seen = inspect_picture(finished(None, None, None), signer, MESSAGES)
    assert seen.settings.record is None and seen.settings.problem is None
    assert seen.findings[0] == "There are no settings in the file."
    assert seen.credentials.state == "none"


@pytest.mark.parametrize("format", READABLE_FORMATS)
def test_every_format_that_can_be_a_reference_can_be_looked_at(signer: Signer, format: str) -> None:
    seen = inspect_picture(saved(format), signer, MESSAGES)
    assert (seen.format.upper(), seen.width, seen.height) == (format, 300, 260)
    assert seen.watermark is not None and not seen.watermark.found


def test_an_animation_is_judged_by_its_first_frame(signer: Signer) -> None:
    frames = [
        watermark.embed_watermark(landscape(0, 256), PUBLISHED_MESSAGE).image,
        Image.new("RGB", (256, 256), "teal"),
    ]
    out = io.BytesIO()
    frames[0].save(out, "PNG", save_all=True, append_images=frames[1:])
    seen = inspect_picture(out.getvalue(), signer, MESSAGES).watermark
    assert seen is not None and seen.found


@pytest.mark.parametrize(
    ("data", "problem"),
    [(b"", "empty"), (b"rubbish", "not a picture"), (b"%!PS-Adobe-3.0 EPSF-3.0\n" + bytes(99), "not a picture")],
)
def test_what_is_no_picture_is_said_to_be_none(signer: Signer, data: bytes, problem: str) -> None:
    seen = inspect_picture(data, signer, MESSAGES)
    assert not seen.is_picture and seen.problem is not None and problem in seen.problem
    assert seen.findings == (seen.problem, seen.credentials.summary)


def test_a_file_too_large_is_not_read(signer: Signer, tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(finished(None))
        file.truncate(MAX_INSPECTED_BYTES + 1000)
    seen = inspect_picture(tmp_path / "huge.png", signer, MESSAGES)
    assert not seen.is_picture and seen.sha256 == "" and seen.bytes == MAX_INSPECTED_BYTES + 1000
    assert "larger than 200 MB" in seen.findings[0]
    assert seen.credentials.state == "unreadable"


def test_a_truncated_picture_is_one_all_the_same(signer: Signer) -> None:
    data = finished(None)
    seen = inspect_picture(data[: len(data) // 2], signer, MESSAGES)
    assert (seen.format, seen.width, seen.settings.record) == ("PNG", 256, RECORD)
    assert seen.watermark is None and seen.watermark_problem == "The pixels cannot be read."
    assert "damaged or incomplete" in seen.findings[0]


def header(width: int, height: int) -> bytes:
    ihdr = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(it)) + kind + it + struct.pack(">I", zlib.crc32(kind + it))
        for kind, it in ((b"IHDR", ihdr), (b"IDAT", zlib.compress(bytes(1000))))
    )


def test_a_bomb_is_not_set_off(signer: Signer) -> None:
    large = inspect_picture(header(10_000, 10_000), signer, MESSAGES)
    assert (large.width, large.height, large.watermark) == (10_000, 10_000, None)
    assert large.watermark_problem == "More than 89 megapixels are not read."
    huge = inspect_picture(header(60_000, 60_000), signer, MESSAGES)
    assert not huge.is_picture and huge.problem is not None and "megapixels" in huge.problem


@pytest.mark.parametrize("size", [(1, 1), (40, 40), (7, 20_000), (20_000, 7), (600_000, 8)])
def test_a_shape_without_room_for_a_watermark(signer: Signer, size: tuple[int, int]) -> None:
    seen = inspect_picture(saved("PNG", size), signer, MESSAGES)
    assert seen.watermark is None and seen.watermark_problem is not None
    assert f"{size[0]} x {size[1]}" in seen.watermark_problem
    assert any("cannot be told" in finding for finding in seen.findings)


@pytest.mark.parametrize("size", [(8, 8192), (8192, 8), (9, 10_000), (20_000, 12)])
def test_a_long_shape_is_read(signer: Signer, size: tuple[int, int]) -> None:
    assert inspect_picture(saved("PNG", size), signer, MESSAGES).watermark is not None


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_pixels_is_read(signer: Signer, mode: str) -> None:
    out = io.BytesIO()
    Image.new(mode, (256, 256)).save(out, "PNG")
    assert inspect_picture(out.getvalue(), signer, MESSAGES).watermark is not None


def test_the_watermark_is_read_without_opencv(signer: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("cv2", "imwatermark"):
        monkeypatch.setitem(sys.modules, library, None)  # as if it could not be imported
    seen = inspect_picture(finished(signer), signer, MESSAGES)
    assert seen.watermark is not None and seen.watermark.found and seen.watermark_problem is None


def test_paths_at_which_nothing_can_be_read(signer: Signer, tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.png", Path("a\0b"), Path("/dev/null")):
        with pytest.raises(RequestError, match=r"There is no file|cannot be opened"):
            inspect_picture(path, signer, MESSAGES)
    (tmp_path / "a\x1b[31m.png").write_bytes(b"x")
    assert inspect_picture(tmp_path / "a\x1b[31m.png", signer, MESSAGES).name == "a?[31m.png"


def test_everything_as_json(signer: Signer) -> None:
    for data in (finished(signer), b"rubbish", saved("GIF", (16, 16)), changed(finished(signer))):
        seen = inspect_picture(data, signer, MESSAGES)
        read = json.loads(json.dumps(seen.as_dict(), allow_nan=False))
        assert read == seen.as_dict() | {"credentials": read["credentials"]}
        assert read["findings"] == list(seen.findings)
        assert read["credentials"]["state"] == seen.credentials.state
    whole = inspect_picture(finished(signer), signer, MESSAGES).as_dict()
    assert whole["settings"]["request"]["prompt"] == REQUEST.prompt
    assert whole["watermark"]["found"] is True and whole["watermark"]["match"] == 1
    assert whole["file"]["width"] == 256


def test_the_table_of_the_settings() -> None:
    table = dict(setting_rows(RECORD))
    assert table["Prompt"] == REQUEST.prompt and table["Original prompt"] == "fox"
    assert table["Enhanced"] == "by a model"
    assert table["Checkpoint"] == "FLUX.2 [klein] 4B (klein-4b)"
    assert table["Seed"] == "9 (picture 2 of 2 drawn together)"
    assert table["LoRAs"] == "styles/ink (0.5)"
    assert table["References"] == f"image 1: {'ab' * 32}"
    assert table["Asked to carry"] == "watermark, settings, content credentials"
    assert "Negative prompt" not in table, "an empty one is not told"
    assert dict(setting_rows(replace(RECORD, place=0, together=1)))["Seed"] == "9"


def test_the_table_of_the_credentials(signer: Signer, stranger: Signer) -> None:
    reference = finished(stranger)
    sources = [signer.make_ingredient(1, reference)]
    table = credential_rows(signer.read(signer.sign(finished(None), "FLUX.2 [klein] 4B", sources, prompt="a fox").data))
    names = dict(table)
    assert names["Signed by"].endswith("(this installation)")
    assert names["Program"].startswith("flux2-studio ")
    assert [text for name, text in table if name == "Action"][1].startswith(
        "Edited, partly made by an AI model, FLUX.2"
    )
    assert names["Prompt, published"] == "a fox"
    assert names["Image 1"].startswith("the picture that was edited; with credentials of its own, by flux2-studio")
    elsewhere = dict(credential_rows(signer.read(changed(reference))))
    assert elsewhere["Signed by"].endswith("(confirmed by nobody here)")
    assert "changed after it was signed" in elsewhere["Problem"]
    assert credential_rows(signer.read(finished(None))) == []


def test_settings_of_another_program(signer: Signer) -> None:
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "a fox\nSteps: 20")
    assert inspect_picture(saved("PNG", pnginfo=info), signer, MESSAGES).findings[0] == OTHER_PROGRAM


WHOLE: dict[str, bytes] = {}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), format=st.sampled_from(READABLE_FORMATS))
def test_no_damage_makes_looking_fail(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, format: str
) -> None:
    content = bytearray(WHOLE.setdefault(format, saved(format, (260, 256))))
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, min(400, len(content) - 1)))] = data.draw(st.integers(0, 255))
    seen = inspect_picture(bytes(content), Signer(tmp_path_factory.getbasetemp() / "none"), [PUBLISHED_MESSAGE])
    assert isinstance(seen, Inspection)
    assert seen.findings and all(finding.strip() for finding in seen.findings)
    json.dumps(seen.as_dict(), allow_nan=False)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200))
def test_no_rubbish_makes_looking_fail(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    seen = inspect_picture(content, Signer(tmp_path_factory.getbasetemp() / "none"), [PUBLISHED_MESSAGE])
    assert seen.findings


def test_pixels_are_never_changed_by_reading(signer: Signer) -> None:
    """A picture read twice says the same twice, and what was given stays what it was."""
    data = finished(signer)
    before = np.frombuffer(data, np.uint8).copy()
    assert inspect_picture(data, signer, MESSAGES) == inspect_picture(data, signer, MESSAGES)
    np.testing.assert_array_equal(before, np.frombuffer(data, np.uint8))
