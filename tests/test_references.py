"""Whatever file a user offers as a reference becomes a picture or a sentence; ordinary ones exactly as in diffusers."""

from __future__ import annotations

import hashlib
import io
import os
import random
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageFilter

from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.references import (
    READABLE_FORMATS,
    LoadedReference,
    fit,
    fit_note,
    fit_size,
    load_reference,
    pad_to_multiple,
    reference_size,
)

# What Pillow murmurs about damaged files, before we say it in words.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Corrupt EXIF", "ignore:Truncated", "ignore:Metadata", "ignore:Image size"
)

CAP = 1024 * 1024


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A picture with detail at every scale, so that any difference in resampling or cropping shows."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    gradient = np.linspace(0, 255, width)[None, :, None] + np.linspace(0, 255, height)[:, None, None]
    return Image.fromarray(((noise / 4) + gradient * 0.35).astype(np.uint8)).filter(ImageFilter.GaussianBlur(0.6))


def quadrants(mode: str = "RGB") -> Image.Image:
    """80 x 64: red, green / blue, white."""
    image = Image.new("RGB", (80, 64), "red")
    image.paste((0, 255, 0), (40, 0, 80, 32))
    image.paste((0, 0, 255), (0, 32, 40, 64))
    image.paste((255, 255, 255), (40, 32, 80, 64))
    return image.convert(mode)


def corners(image: Image.Image) -> list[tuple[int, ...]]:
    right, bottom = image.width - 8, image.height - 8
    return [image.getpixel(xy) for xy in ((8, 8), (right, 8), (8, bottom), (right, bottom))]  # type: ignore[misc]


RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def load(tmp_path: Path, image: Image.Image, name: str = "picture.png", **options: object) -> LoadedReference:
    path = tmp_path / name
    image.save(path, **options)  # type: ignore[arg-type]
    loaded = load_reference(path)
    assert loaded.image.mode == "RGB"
    return loaded


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *extra: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [(b"IHDR", header), *extra, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


# --- ordinary pictures: exactly diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size",
    [(64, 64), (65, 79), (100, 75), (640, 480), (1024, 1024), (1025, 1024), (1333, 2000), (1999, 333), (2600, 330)],
)
def test_fit_equals_diffusers_pixel_for_pixel(size: tuple[int, int]) -> None:
    from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor

    image = photo(*size)
    # The lines of Flux2KleinPipeline.__call__ that prepare a condition image.
    processor = Flux2ImageProcessor(vae_scale_factor=16)
    theirs = processor.check_image_input(image)
    if theirs.width * theirs.height > CAP:
        theirs = processor._resize_to_target_area(theirs, CAP)
    height, width = theirs.height // 16 * 16, theirs.width // 16 * 16
    pixels = processor.preprocess(theirs, height=height, width=width, resize_mode="crop")

    whole = fit(image, CAP)
    assert whole.size == fit_size(size, CAP)
    # What theirs loses at the edges is kept here: the same scale, and their crop out of the middle of it.
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    ours = whole.crop((left, top, left + width, top + height))
    if whole.size == (width, height):
        assert pad_to_multiple(whole) is whole, "at multiples of 16 the engine reads what theirs does"
    np.testing.assert_array_equal(np.asarray(ours), ((pixels[0].permute(1, 2, 0).numpy() + 1) * 127.5).round())


def test_an_ordinary_file_is_loaded_as_pillow_reads_it(tmp_path: Path) -> None:
    image = photo(100, 80)
    for name, options in (("a.png", {}), ("a.bmp", {}), ("a.tif", {}), ("a.webp", {"lossless": True})):
        loaded = load(tmp_path, image, name, **options)
        assert loaded.image.tobytes() == image.tobytes()
        assert loaded.notes == ()
    loaded = load(tmp_path, image, "a.jpg", quality=90)
    assert loaded.image.tobytes() == Image.open(tmp_path / "a.jpg").tobytes()
    assert loaded.sha256 == hashlib.sha256((tmp_path / "a.jpg").read_bytes()).hexdigest()


def test_every_format_that_we_promise_is_read(tmp_path: Path) -> None:
    for format_ in READABLE_FORMATS:
        (tmp_path / "any").write_bytes(b"")
        quadrants().save(tmp_path / "any", format=format_, **({"quality": 95} if format_ in ("AVIF", "WEBP") else {}))
        got = corners(load_reference(tmp_path / "any").image)
        assert np.abs(np.array(got) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 12, format_


# --- sizes --------------------------------------------------------------------------------------------------------


def test_a_large_picture_is_scaled_to_the_cap_and_the_user_is_told() -> None:
    assert fit_size((4000, 3000), CAP) == (1182, 886)
    assert fit_note(1, (4000, 3000), (1182, 886)) == "Image 1 was scaled from 4000 x 3000 to 1182 x 886."
    assert fit_note(3, (992, 736), (992, 736)) is None


@pytest.mark.parametrize("size", [(157, 211), (64, 65), (95, 130), (128, 96)])
def test_padding_repeats_the_last_pixels_and_moves_nothing(size: tuple[int, int]) -> None:
    image = photo(*size)
    whole = pad_to_multiple(image)
    assert whole.width % 16 == whole.height % 16 == 0
    assert whole.crop((0, 0, *size)).tobytes() == image.tobytes()
    pixels = np.asarray(whole)
    assert (pixels[:, size[0] :] == pixels[:, size[0] - 1 : size[0]]).all()
    assert (pixels[size[1] :] == pixels[size[1] - 1 : size[1]]).all()


def test_any_legal_size_under_any_cap_gives_a_legal_size() -> None:
    rng = random.Random(1)
    for _ in range(5000):
        short = rng.randint(64, 3000)
        width, height = short, rng.randint(short, 8 * short)
        if rng.random() < 0.5:
            width, height = height, width
        cap = rng.choice([64 * 64, 128 * 128, 100_000, CAP, 2024 * 2024])
        got = fit_size((width, height), cap)
        assert all(side >= 64 for side in got), (width, height, cap, got)
        assert got[0] * got[1] <= max(cap, 512 * 64)
        assert got[0] <= width and got[1] <= height


def test_a_long_narrow_picture_keeps_its_whole_length_under_a_small_cap() -> None:
    image = fit(quadrants().resize((1600, 200), Image.Resampling.NEAREST), 128 * 128)
    assert image.size == (512, 64)
    assert corners(image) == [RED, GREEN, BLUE, WHITE]


@pytest.mark.parametrize(
    ("size", "said"),
    [
        ((63, 64), "too small (63 x 64): each side needs at least 64"),
        ((640, 40), "too small"),
        ((641, 80), "too long and narrow (641 x 80): crop it to 8:1"),
        ((80, 641), "too long and narrow"),
    ],
)
def test_sizes_that_cannot_serve(tmp_path: Path, size: tuple[int, int], said: str) -> None:
    with pytest.raises(ReferenceImageError) as error:
        load(tmp_path, Image.new("RGB", size), "small.png")
    assert said in str(error.value) and "small.png" in str(error.value)


def test_exactly_64_pixels_and_exactly_8_to_1_will_do(tmp_path: Path) -> None:
    assert load(tmp_path, Image.new("RGB", (512, 64))).image.size == (512, 64)


# --- orientation, transparency, colours ---------------------------------------------------------------------------

UPRIGHT = {  # EXIF orientation -> where the stored red, green, blue, white corners come to lie
    1: [RED, GREEN, BLUE, WHITE],
    2: [GREEN, RED, WHITE, BLUE],
    3: [WHITE, BLUE, GREEN, RED],
    4: [BLUE, WHITE, RED, GREEN],
    5: [RED, BLUE, GREEN, WHITE],
    6: [BLUE, RED, WHITE, GREEN],
    7: [WHITE, GREEN, BLUE, RED],
    8: [GREEN, WHITE, RED, BLUE],
}


@pytest.mark.parametrize("orientation", UPRIGHT)
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.jpg", "a.webp"])
def test_exif_orientation_is_applied_once(tmp_path: Path, name: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if name == "a.webp" else {"quality": 100, "subsampling": 0} if name == "a.jpg" else {}
    loaded = load(tmp_path, quadrants(), name, exif=exif, **options)
    assert loaded.image.size == ((64, 80) if orientation >= 5 else (80, 64))
    assert np.abs(np.array(corners(loaded.image)) - np.array(UPRIGHT[orientation])).max() <= 2
    assert not loaded.image.info


def test_a_damaged_exif_block_does_not_cost_the_picture(tmp_path: Path) -> None:
    for junk in (b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12" * 9):
        loaded = load(tmp_path, quadrants(), "a.jpg", exif=junk, quality=100, subsampling=0)
        assert loaded.image.size == (80, 64)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparency_is_flattened_on_white(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))  # invisible black on the left
    image.paste((0, 0, 0, 255), (32, 0, 64, 32))
    image.paste((0, 0, 0, 128), (32, 32, 64, 64))
    stored = image.convert(mode)
    stored.putalpha(image.getchannel("A"))  # converting to PA makes everything opaque
    got = corners(load(tmp_path, stored, "a.tif").image)
    assert got == [WHITE, (0, 0, 0), WHITE, (127, 127, 127)]


def test_a_palette_with_alpha_and_one_without(tmp_path: Path) -> None:
    image = quadrants().quantize(4)
    assert corners(load(tmp_path, image).image) == [RED, GREEN, BLUE, WHITE]
    blue = image.getpixel((8, 60))
    assert corners(load(tmp_path, image, transparency=blue).image) == [RED, GREEN, WHITE, WHITE]
    alphas = bytes(128 if index == blue else 255 for index in range(4))
    assert corners(load(tmp_path, image, transparency=alphas).image) == [RED, GREEN, (127, 127, 255), WHITE]
    assert corners(load(tmp_path, image, "a.gif", transparency=blue).image) == [RED, GREEN, WHITE, WHITE]


def test_one_transparent_colour_in_rgb_and_grey(tmp_path: Path) -> None:
    assert corners(load(tmp_path, quadrants(), transparency=BLUE).image) == [RED, GREEN, WHITE, WHITE]
    grey = Image.new("L", (64, 64), 30)
    grey.paste(90, (32, 0, 64, 64))
    assert corners(load(tmp_path, grey, transparency=30).image)[:2] == [WHITE, (90, 90, 90)]
    bilevel = Image.new("1", (64, 64), 0)
    assert corners(load(tmp_path, bilevel, transparency=0).image)[0] == WHITE


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64).reshape(64, 64).round().astype(np.uint16)
    want = np.repeat((ramp / 257).round().astype(np.uint8)[..., None], 3, axis=2)
    for name in ("a.png", "a.tif"):
        got = np.asarray(load(tmp_path, Image.fromarray(ramp), name).image)
        np.testing.assert_array_equal(got, want)
    big_endian = Image.frombytes("I;16B", (64, 64), ramp.astype(">u2").tobytes())
    np.testing.assert_array_equal(np.asarray(load(tmp_path, big_endian, "b.tif").image), want)
    thirty_two = Image.fromarray(ramp.astype(np.int32))
    np.testing.assert_array_equal(np.asarray(load(tmp_path, thirty_two, "c.tif").image), want)


def test_sixteen_bit_png_in_colour_and_with_a_transparent_colour(tmp_path: Path) -> None:
    def stored(colours: Sequence[tuple[int, ...]]) -> bytes:
        return b"".join(b"\0" + b"".join(struct.pack(f">{len(c)}H", *c) for c in colours) for _ in range(64))

    left, right = (0xFF12, 0x8034, 0x0056), (0x1234, 0x5678, 0x9ABC)
    rows = stored([left] * 32 + [right] * 32)
    path = tmp_path / "deep.png"
    path.write_bytes(png(64, 64, 16, 2, rows))
    assert corners(load_reference(path).image)[:2] == [(0xFF, 0x80, 0x00), (0x12, 0x56, 0x9A)]
    path.write_bytes(png(64, 64, 16, 2, rows, (b"tRNS", struct.pack(">3H", *left))))
    assert corners(load_reference(path).image)[:2] == [WHITE, (0x12, 0x56, 0x9A)]
    rows = stored([(700,)] * 32 + [(50_000,)] * 32)
    path.write_bytes(png(64, 64, 16, 0, rows, (b"tRNS", struct.pack(">H", 700))))
    assert corners(load_reference(path).image)[:2] == [WHITE, (195, 195, 195)]


def test_floats_are_read_as_0_to_1_or_as_their_brightest_pixel_says(tmp_path: Path) -> None:
    ramp = np.linspace(-0.25, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    want = (ramp.clip(0) * 255).round()
    for white in (1, 255, 65535):
        got = np.asarray(load(tmp_path, Image.fromarray(ramp * white), "a.tif").image)[..., 0]
        assert np.abs(got - want).max() <= 1
    with pytest.raises(ReferenceImageError, match="damaged"):
        load(tmp_path, Image.fromarray(np.full((64, 64), np.nan, np.float32)), "nan.tif")


def test_bilevel_and_grey(tmp_path: Path) -> None:
    half = Image.new("1", (64, 64), 0)
    half.paste(1, (32, 0, 64, 64))
    assert corners(load(tmp_path, half).image)[:2] == [(0, 0, 0), WHITE]
    assert corners(load(tmp_path, Image.new("L", (64, 64), 77)).image)[0] == (77, 77, 77)


def test_cmyk(tmp_path: Path) -> None:
    for name, options in (("a.tif", {}), ("a.jpg", {"quality": 100, "subsampling": 0})):
        got = corners(load(tmp_path, quadrants("CMYK"), name, **options).image)
        assert np.abs(np.array(got) - np.array([RED, GREEN, BLUE, WHITE])).max() <= 3


def test_lab_in_a_tiff(tmp_path: Path) -> None:
    # L* = 138 / 255 * 100 = 54.1, neutral: Y = ((54.1 + 16) / 116) ** 3 = 0.2208, which sRGB writes as 129
    assert corners(load(tmp_path, Image.new("LAB", (64, 64), (138, 128, 128)), "lab.tif").image)[0] == (129, 129, 129)


# --- colour profiles ----------------------------------------------------------------------------------------------


def linear_profile() -> bytes:
    """sRGB's own profile with its three curves replaced by a straight line: linear light."""
    data = bytearray(
        ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes().replace(b"s\0R\0G\0B", b"l\0i\0n\0e")
    )
    for index in range(struct.unpack_from(">I", data, 128)[0]):
        tag, offset, _ = struct.unpack_from(">4sII", data, 132 + 12 * index)
        if tag in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sIHHi", data, offset, b"para", 0, 0, 0, 1 << 16)  # y = x ** 1.0
    return bytes(data)


def test_an_embedded_profile_is_converted_to_srgb(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), (55, 55, 55))
    for name, options in (("a.png", {}), ("a.jpg", {"quality": 100}), ("a.tif", {})):
        loaded = load(tmp_path, image, name, icc_profile=linear_profile(), **options)
        # 55 / 255 in linear light is 0.2157, which sRGB writes as 1.055 * 0.2157 ** (1 / 2.4) - 0.055 = 0.502
        assert np.abs(np.array(corners(loaded.image)) - 128).max() <= 1
        assert loaded.notes == () and "icc_profile" not in loaded.image.info


def test_a_profile_and_transparency_together(tmp_path: Path) -> None:
    image = Image.new("RGBA", (64, 64), (55, 55, 55, 255))
    image.paste((0, 0, 0, 0), (32, 0, 64, 64))
    got = corners(load(tmp_path, image, icc_profile=linear_profile()).image)
    assert got[1] == WHITE and abs(got[0][0] - 128) <= 1
    palette = quadrants().quantize(4)
    blue = palette.getpixel((8, 60))
    got = corners(load(tmp_path, palette, icc_profile=linear_profile(), transparency=blue).image)
    assert got == [RED, GREEN, WHITE, WHITE]


def test_srgb_itself_changes_nothing(tmp_path: Path) -> None:
    image = photo(64, 64)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert load(tmp_path, image, icc_profile=profile).image.tobytes() == image.tobytes()


@pytest.mark.parametrize("profile", [b"nonsense", linear_profile()[:200], b"\0" * 3000])
def test_a_broken_profile_is_ignored_and_said(tmp_path: Path, profile: bytes) -> None:
    loaded = load(tmp_path, quadrants(), icc_profile=profile)
    assert corners(loaded.image) == [RED, GREEN, BLUE, WHITE]
    assert len(loaded.notes) == 1 and "colour profile in picture.png" in loaded.notes[0]


def test_a_profile_for_other_channels_is_ignored_and_said(tmp_path: Path) -> None:
    loaded = load(tmp_path, Image.new("L", (64, 64), 55), icc_profile=linear_profile())
    assert corners(loaded.image)[0] == (55, 55, 55)
    assert len(loaded.notes) == 1


# --- several frames -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.gif", "a.webp", "a.png", "a.tif", "a.avif"])
def test_of_several_frames_the_first_is_used_and_said(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "lime", "blue")]
    loaded = load(tmp_path, frames[0], name, save_all=True, append_images=frames[1:])
    assert np.abs(np.array(corners(loaded.image)[0]) - RED).max() <= 6
    assert loaded.notes == (f"{name} holds several pictures or frames: the first one is used.",)


def test_a_phones_mpo_needs_no_note(tmp_path: Path) -> None:
    loaded = load(
        tmp_path, quadrants(), "a.jpg", format="MPO", save_all=True, append_images=[Image.new("RGB", (64, 64))]
    )
    assert loaded.image.size == (80, 64) and loaded.notes == ()


# --- hostile files ------------------------------------------------------------------------------------------------


def refused(path: Path) -> str:
    with pytest.raises(ReferenceImageError) as error:
        load_reference(path)
    message = str(error.value)
    assert "/" not in message and "Traceback" not in message
    return message


def test_no_file_a_folder_a_pipe_and_an_empty_file(tmp_path: Path) -> None:
    assert "There is no picture gone.png" in refused(tmp_path / "gone.png")
    (tmp_path / "album").mkdir()
    assert "album is a folder" in refused(tmp_path / "album")
    os.mkfifo(tmp_path / "pipe.png")
    assert "There is no picture pipe.png" in refused(tmp_path / "pipe.png")  # and it does not wait for a writer
    (tmp_path / "empty.png").touch()
    assert "empty.png is empty" in refused(tmp_path / "empty.png")
    assert "There is no picture a?b.png" in refused(Path("a\0b.png"))


def test_the_name_is_shown_short_and_printable(tmp_path: Path) -> None:
    message = refused(tmp_path / ("line\nbreak\x1b[31m" + "x" * 150 + ".png"))
    assert "\n" not in message and "\x1b" not in message and len(message) < 140 and ".png" in message


@pytest.mark.parametrize(
    "content",
    [
        b"just some text",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\nshowpage\n",
        b"%PDF-1.7\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100,
        b"P6 64 64 255 " + b"\0" * 64 * 64 * 3,
    ],
)
def test_what_is_no_picture_for_us(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.png").write_bytes(content)
    assert "x.png is not a picture that can be read here: save it as PNG, JPEG" in refused(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.avif"])
def test_truncated_files(tmp_path: Path, name: str) -> None:
    whole = tmp_path / name
    photo(256, 200).save(whole)
    content = whole.read_bytes()
    for kept in (0.1, 0.5, 0.9):
        whole.write_bytes(content[: int(len(content) * kept)])
        assert any(word in refused(whole) for word in ("damaged or incomplete", "not a picture"))


def test_no_damage_escapes_as_another_error(tmp_path: Path) -> None:
    """Bytes changed at random in every format: a picture or our own error, never anything else."""
    rng = random.Random(0)
    path = tmp_path / "fuzzed"
    refusals = 0
    for format_ in READABLE_FORMATS:
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112] = 6
        options = {} if format_ in ("BMP", "GIF") else {"exif": exif, "icc_profile": linear_profile()}
        quadrants().save(buffer, format=format_, **options)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 12)):
                content[rng.randrange(min(len(content), 400 if rng.random() < 0.7 else len(content)))] = rng.randrange(
                    256
                )
            path.write_bytes(content)
            try:
                assert load_reference(path).image.mode == "RGB"
            except ReferenceImageError:
                refusals += 1
    assert refusals > 50


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    for side in (10_001, 14_000, 40_000):  # over our own limit, over Pillow's warning, over Pillow's error
        path.write_bytes(png(side, side, 8, 2, b""))  # there is nothing to decode: it is refused for its header
        assert refused(path) == "bomb.png has more than 89 megapixels: scale it down first."
    frame = struct.pack("<HHHHB", 0, 0, 60_000, 60_000, 0)  # a GIF whose frame is larger than its canvas
    (tmp_path / "bomb.gif").write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + b"\0" * 6 + b"," + frame + b"\x02\x01\x44\0;"
    )
    assert "bomb.gif" in refused(tmp_path / "bomb.gif")


def test_a_file_of_too_many_bytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    with path.open("wb") as file:
        file.truncate(200 * 10**6 + 1)  # sparse: takes no space
    assert "huge.png is larger than 200 MB" in refused(path)


def test_a_compressed_text_bomb_in_a_png(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_bytes(
        png(64, 64, 8, 0, b"\0" * 65 * 64, (b"zTXt", b"a\0\0" + zlib.compress(b"x" * 64_000_000, 1)))
    )
    assert "text.png" in refused(tmp_path / "text.png")


def test_the_size_of_a_reference_needs_no_decoding(tmp_path: Path) -> None:
    whole = tmp_path / "whole.png"
    Image.effect_noise((320, 160), 50).save(whole)
    cut = tmp_path / "cut.png"
    cut.write_bytes(whole.read_bytes()[:200])  # the header is there, the picture is not
    assert reference_size(whole) == reference_size(cut) == (320, 160)
    with pytest.raises(ReferenceImageError, match="damaged"):
        load_reference(cut)
    for name, data in (("empty.png", b""), ("text.png", b"no picture")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ReferenceImageError):
            reference_size(tmp_path / name)
