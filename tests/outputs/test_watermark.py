"""The watermark holds what it promises, and the judge is the library's own decoder."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from imwatermark import WatermarkDecoder, WatermarkEncoder
from PIL import Image

from benchmarks.watermark import encoded, flat, icons, landscape, photographs, psnr
from flux2_studio.errors import StudioError
from flux2_studio.provenance.watermark import (
    PUBLISHED_MESSAGE,
    WatermarkDetection,
    WatermarkMessage,
    _bits,
    _u_channel,
    detect_watermark,
    embed_watermark,
)

GREY = [it.convert("L").convert("RGB") for it in photographs()]
PHOTOGRAPHS = [*photographs(), *GREY, landscape(0, 256), landscape(1, 512)]
WHITE = Image.new("RGB", (256, 256), "white")
ICON = WHITE.copy()
ICON.paste((200, 40, 30), (60, 60, 190, 200))
noise = np.random.default_rng(0)
GARISH = [
    Image.fromarray(noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)),
    Image.fromarray(noise.integers(0, 2, (256, 256, 3), dtype=np.uint8) * 255),
]
ODD = [landscape(2, 512).crop((0, 0, 301, 259)), ICON.resize((263, 450))]


def read(image: Image.Image, message: WatermarkMessage) -> float:
    """Share of the message's bits that the library reads: its decoder, as anyone would call it."""
    bits = WatermarkDecoder("bits", len(message.bits)).decode(np.array(image)[:, :, ::-1].copy(), "dwtDctSvd")
    return float(np.mean(bits == np.array(message.bits)))


def share(right: int, message: WatermarkMessage = PUBLISHED_MESSAGE) -> WatermarkDetection:
    return WatermarkDetection(message=message, matching_bits=right)


def test_published_message_has_46_bits() -> None:
    assert len(PUBLISHED_MESSAGE.bits) == 46, "two of the 48 digits are leading zeros, which bin() drops"
    assert "".join(map(str, PUBLISHED_MESSAGE.bits)) == "1010101111111010000111100111001111010100101110"


@pytest.mark.parametrize(
    "pictures",
    [PHOTOGRAPHS, icons(256), [WHITE, ICON], flat(256), GARISH, ODD],
    ids=["photographs", "icons", "white", "flat", "garish", "odd sizes"],
)
def test_every_picture_can_be_marked(pictures: list[Image.Image]) -> None:
    for picture in pictures:
        before = picture.tobytes()
        marked = embed_watermark(picture, PUBLISHED_MESSAGE)
        assert marked.reason is None and marked.detection is not None
        assert (marked.image.size, marked.image.mode) == (picture.size, "RGB")
        assert marked.detection.found
        assert read(marked.image, PUBLISHED_MESSAGE) == marked.detection.match_ratio >= 0.95
        assert psnr(picture, marked.image) >= 38
        assert picture.tobytes() == before


def test_photographs_keep_it_through_jpeg() -> None:
    for picture in PHOTOGRAPHS:
        kept = read(encoded(embed_watermark(picture, PUBLISHED_MESSAGE).image, "JPEG", 75), PUBLISHED_MESSAGE)
        assert kept >= 0.9


def test_why_the_library_does_not_write() -> None:
    """If its encoder ever gets white areas right, ours can go."""
    encoder = WatermarkEncoder()
    encoder.set_watermark("bits", list(PUBLISHED_MESSAGE.bits))
    written = Image.fromarray(encoder.encode(np.array(WHITE), "dwtDctSvd"))
    assert read(written, PUBLISHED_MESSAGE) < 0.6


def test_unmarked_pictures_say_nothing() -> None:
    for picture in [*PHOTOGRAPHS, *icons(256), *flat(256), *GARISH]:
        detection = detect_watermark(picture, PUBLISHED_MESSAGE)
        assert detection is not None and not detection.found
        assert "No watermark found" in str(detection)


def test_another_message_is_not_found() -> None:
    marked = embed_watermark(PHOTOGRAPHS[0], PUBLISHED_MESSAGE).image
    detection = detect_watermark(marked, WatermarkMessage.parse("studio-7"))
    assert detection is not None and not detection.found


@pytest.mark.parametrize("size", [(255, 300), (300, 255), (128, 128), (8, 4000)])
def test_small_pictures_are_left_alone_and_it_is_said(size: tuple[int, int]) -> None:
    picture = Image.new("RGB", size)
    marked = embed_watermark(picture, PUBLISHED_MESSAGE)
    assert marked.image is picture and marked.detection is None
    assert marked.reason is not None and f"{size[0]} x {size[1]}" in marked.reason and "256" in marked.reason


def test_too_few_pixels_are_not_read() -> None:
    assert detect_watermark(Image.new("RGB", (255, 256)), PUBLISHED_MESSAGE) is None
    assert detect_watermark(Image.new("RGB", (128, 512)), PUBLISHED_MESSAGE) is not None


class Decoder:
    """In the library's place: reads only zeros, and remembers how large the pictures were."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, kind: str, length: int) -> Decoder:
        assert kind == "bits"
        self.length = length
        return self

    def decode(self, picture: np.ndarray[Any, Any], method: str) -> np.ndarray[Any, Any]:
        assert method == "dwtDctSvd"
        self.shapes.append(picture.shape)
        return np.zeros(self.length, dtype=bool)


@pytest.fixture
def decoder(monkeypatch: pytest.MonkeyPatch) -> Decoder:
    decoder = Decoder()
    monkeypatch.setitem(sys.modules, "imwatermark", SimpleNamespace(WatermarkDecoder=decoder))
    return decoder


def test_what_cannot_be_read_back_is_not_called_marked(decoder: Decoder) -> None:
    marked = embed_watermark(ICON, PUBLISHED_MESSAGE)
    assert len(decoder.shapes) == 1
    assert marked.image is ICON and marked.detection is None
    assert marked.reason is not None and "only 18 of 46 bits" in marked.reason


def test_of_huge_pictures_the_upper_rows_are_read(decoder: Decoder) -> None:
    detect_watermark(Image.new("RGB", (4096, 3000)), PUBLISHED_MESSAGE)
    detect_watermark(Image.new("L", (2048, 2048)), PUBLISHED_MESSAGE)
    assert decoder.shapes == [(1024, 4096, 3), (2048, 2048, 3)]


def test_without_opencv_pictures_are_marked_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        for library in ("cv2", "imwatermark"):
            without.setitem(sys.modules, library, None)
        marked = embed_watermark(PHOTOGRAPHS[0], PUBLISHED_MESSAGE)
        assert marked.detection is not None and marked.detection.found
    decoder = WatermarkDecoder("bits", len(PUBLISHED_MESSAGE.bits))
    bits = decoder.decode(cv2.cvtColor(np.array(marked.image), cv2.COLOR_RGB2BGR), "dwtDctSvd")
    assert np.mean(bits == np.array(PUBLISHED_MESSAGE.bits)) >= 0.95


def test_u_is_rounded_as_opencv_does() -> None:
    green, blue = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for red in range(256):
        every = np.stack([np.full_like(green, red), green, blue], -1)
        assert np.array_equal(_u_channel(every), cv2.cvtColor(every, cv2.COLOR_RGB2YUV)[..., 1])


FLAT = [Image.new("RGB", (256, 256), colour) for colour in ("white", "black", "#7f7f7f", "#123456", "yellow", "blue")]


@pytest.mark.parametrize("count", [32, 46, 128])
@pytest.mark.parametrize("picture", [*PHOTOGRAPHS, ICON, *FLAT, *GARISH, *ODD])
def test_our_reader_finds_the_same_bits_as_the_package(picture: Image.Image, count: int) -> None:
    for image in (picture, embed_watermark(picture, PUBLISHED_MESSAGE).image):
        rgb = np.asarray(image)
        decoder = WatermarkDecoder("bits", count)
        assert np.array_equal(_bits(rgb, count), decoder.decode(cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR), "dwtDctSvd"))


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "P", "L"])
def test_any_mode_can_be_read(mode: str) -> None:
    assert detect_watermark(ICON.convert(mode), PUBLISHED_MESSAGE) is not None
    if mode == "RGBA":
        detection = detect_watermark(embed_watermark(ICON, PUBLISHED_MESSAGE).image.convert(mode), PUBLISHED_MESSAGE)
        assert detection is not None and detection.match_ratio == 1


def test_cut_off_below_it_is_still_read() -> None:
    marked = embed_watermark(landscape(3, 512), PUBLISHED_MESSAGE).image
    detection = detect_watermark(marked.crop((0, 0, 512, 300)), PUBLISHED_MESSAGE)
    assert detection is not None and detection.match_ratio == 1


def test_chance_is_the_binomial_tail() -> None:
    assert share(46).chance_probability == 2**-46
    assert share(45).chance_probability == 47 * 2**-46
    assert share(0).chance_probability == 1
    assert share(23).chance_probability == pytest.approx(0.5586, abs=1e-4)  # (1 + C(46, 23) / 2^46) / 2
    assert share(39).found and not share(38).found, "one in a million lies between"


def test_detection_in_words() -> None:
    assert str(share(46)) == (
        "Watermark found: 46 of the 46 bits of Black Forest Labs' published message agree (100%). "
        "By chance, one picture in 10¹³ does so well."
    )
    assert str(share(28)).startswith("No watermark found: 28 of the 46 bits")
    assert str(share(28)).endswith("which chance brings about too.") and share(28).odds == "11"


@pytest.mark.parametrize("text", ["studio-7", "0x0123456789abcdef", "Made by a model."])
def test_own_message(text: str) -> None:
    message = WatermarkMessage.parse(text)
    for picture in [PHOTOGRAPHS[0], ICON]:
        marked = embed_watermark(picture, message)
        assert marked.detection is not None and marked.detection.found
        assert read(marked.image, message) >= 0.95
        assert not read(marked.image, PUBLISHED_MESSAGE) > 0.8


def test_own_message_is_bytes_to_the_library() -> None:
    marked = embed_watermark(PHOTOGRAPHS[0], WatermarkMessage.parse("studio-7")).image
    decoder = WatermarkDecoder("bytes", 64)
    assert decoder.decode(cv2.cvtColor(np.array(marked), cv2.COLOR_RGB2BGR), "dwtDctSvd") == b"studio-7"


def test_hexadecimal_keeps_leading_zeros() -> None:
    assert WatermarkMessage.parse("0x00ff00FF").bits == (0,) * 8 + (1,) * 8 + (0,) * 8 + (1,) * 8


@pytest.mark.parametrize(
    "text", ["", "abc", "seventeen letters", "stüdio", "ab\ncd", "0x", "0x1234567", "0x12 34 56 78", "0x" + "5" * 33]
)
def test_messages_of_no_use(text: str) -> None:
    with pytest.raises(StudioError, match="FLUX2_WATERMARK_MESSAGE must be 4 to 16"):
        WatermarkMessage.parse(text)


@pytest.mark.parametrize("text", ["0x00000000", "0xffffffff", "0x00000000000000ff", "@@@@@@@@"])
def test_messages_that_a_white_wall_says(text: str) -> None:
    with pytest.raises(StudioError, match="too even"):
        WatermarkMessage.parse(text)
