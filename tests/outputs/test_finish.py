"""A finished file carries what was asked for, in the right order, and what it does not carry is said."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2_studio.errors import CredentialsError, RequestError
from flux2_studio.provenance import metadata, watermark
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.finish import FinishedFile, Finisher
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE, WatermarkMessage
from flux2_studio.record import Record
from flux2_studio.request import ImageFormat, Request
from tests import certificates

FORMATS: tuple[ImageFormat, ...] = ("png", "jpeg", "webp")
OWN = WatermarkMessage.parse("studio 5")


@pytest.fixture(scope="module")
def finisher(tmp_path_factory: pytest.TempPathFactory) -> Finisher:
    return Finisher(PUBLISHED_MESSAGE, Signer(tmp_path_factory.mktemp("home") / "identity"))


def record(**fields: Any) -> Record:
    asked = Request(prompt="a secret lighthouse", **fields)
    request = replace(
        asked, negative_prompt="", checkpoint="nano", width=320, height=272, steps=4, guidance=1.0, seed=3
    )
    return Record(request=request, label="Nano")


def picture(width: int = 320, height: int = 272) -> Image.Image:
    """Smooth colours, with some detail."""
    values = np.random.default_rng(3).integers(40, 216, (9, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC)


def opened(file: FinishedFile) -> Image.Image:
    return Image.open(io.BytesIO(file.data))


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_carries_all_three_marks_and_they_agree(finisher: Finisher, format: ImageFormat) -> None:
    file = finisher.finish(picture(), record(format=format))
    assert file.notes == () and len(file.provenance) == 3
    with opened(file) as image:
        assert (image.format, image.size) == (format.upper(), (320, 272))
        found = watermark.detect_watermark(image.convert("RGB"), PUBLISHED_MESSAGE)
    assert found is not None and found.match_ratio >= 0.95
    read = metadata.read_settings(file.data)
    assert read.record == record(format=format)
    credentials = finisher.signer.read(file.data)
    assert credentials.own and credentials.intact, credentials.summary
    assert [action.name for action in credentials.actions] == ["c2pa.created", "c2pa.watermarked.unbound"]
    assert credentials.actions[0].agent.startswith("Nano in flux2-studio")
    assert b"lighthouse" in file.data, "in the settings"
    assert all(action.prompt == "" for action in credentials.actions), "but not in the credentials"


@pytest.mark.parametrize("format", FORMATS)
def test_without_marks_a_file_is_its_pixels(finisher: Finisher, format: ImageFormat) -> None:
    file = finisher.finish(picture(), record(format=format, watermark=False, metadata=False, sign=False))
    assert file.notes == () and file.provenance == ()
    assert metadata.read_settings(file.data) == metadata.FoundSettings()
    assert finisher.signer.read(file.data).state == "none"
    assert b"lighthouse" not in file.data and b"flux2" not in file.data.lower()
    with opened(file) as image:
        found = watermark.detect_watermark(image.convert("RGB"), PUBLISHED_MESSAGE)
        if format == "png":
            np.testing.assert_array_equal(np.asarray(image), np.asarray(picture()))
    assert found is not None and not found.found


@pytest.mark.parametrize("left", ["watermark", "metadata", "sign"])
def test_each_mark_can_be_left_out_for_itself(finisher: Finisher, left: str) -> None:
    file = finisher.finish(picture(), record(**{left: False}))
    with opened(file) as image:
        mark = watermark.detect_watermark(image, PUBLISHED_MESSAGE)
    assert mark is not None
    there = {
        "watermark": mark.found,
        "metadata": metadata.read_settings(file.data).record is not None,
        "sign": finisher.signer.read(file.data).present,
    }
    assert there == {"watermark": True, "metadata": True, "sign": True} | {left: False}
    assert len(file.provenance) == 2


def test_the_prompt_is_published_where_that_is_wanted(finisher: Finisher) -> None:
    file = finisher.finish(picture(), record(sign_prompt=True, metadata=False))
    assert finisher.signer.read(file.data).actions[0].prompt == "a secret lighthouse"


def test_a_picture_too_small_for_a_watermark_is_told_and_its_credentials_claim_none(finisher: Finisher) -> None:
    file = finisher.finish(picture(128, 128), record())
    assert len(file.notes) == 1 and "too small" in file.notes[0]
    assert [action.name for action in finisher.signer.read(file.data).actions] == ["c2pa.created"]
    assert not any("watermark" in text for text in file.provenance)


def test_a_mark_that_compression_destroyed_is_not_claimed(finisher: Finisher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "save", low_quality(Image.Image.save))
    file = finisher.finish(picture(), record(format="jpeg"))
    assert len(file.notes) == 1 and "outlived the compression. Save as PNG" in file.notes[0]
    assert [action.name for action in finisher.signer.read(file.data).actions] == ["c2pa.created"]


def low_quality(save: Any) -> Any:
    """`Image.save` of an encoder that spoils what it is given."""

    def spoiling(image: Image.Image, *where: Any, **how: Any) -> None:
        save(image, *where, **how | {"quality": 1, "subsampling": 2})

    return spoiling


def test_ones_own_message(finisher: Finisher) -> None:
    file = Finisher(OWN, finisher.signer).finish(picture(), record())
    with opened(file) as image:
        mine, theirs = watermark.detect_watermark(image, OWN), watermark.detect_watermark(image, PUBLISHED_MESSAGE)
    assert mine is not None and mine.match_ratio == 1 and theirs is not None and not theirs.found
    assert "64 of the 64 bits of your own message" in file.provenance[0]


def test_what_could_not_be_finished_is_told_before_the_work(tmp_path: Path) -> None:
    made = certificates.make(tmp_path)
    made.key.write_text("no key")
    finisher = Finisher(PUBLISHED_MESSAGE, Signer(tmp_path / "identity", made.certificate, made.key))
    with pytest.raises(CredentialsError):
        finisher.check(record().request)
    finisher.check(record(sign=False).request)
    with pytest.raises(RequestError, match="65,500"):
        finisher.check(replace(record(format="jpeg", sign=False).request, width=65_536, height=64))
