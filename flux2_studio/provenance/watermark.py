"""The invisible watermark: a short message in a picture's colours, readable by the package invisible-watermark.

The layout is that of its method `dwtDctSvd` at the default scale. The picture is divided into blocks of 8 x 8 pixels,
each of which holds one bit of the message; the message repeats row by row from the top left. The bit is encoded in s,
the largest singular value of the block's 4 x 4 Haar averages of U (of YUV, BT.601): s mod 36 is below 18 for 0 and
above for 1. (The discrete cosine transform in the method's name is orthogonal, so it does not change singular values.)
A reader averages over all blocks of a bit. It must know the number of bits, and the picture must have its original size
and its left, right and top edges: cropping these, scaling or rotating destroys the message.

The package reads where it can be imported; we always write. Its own encoder clips values outside 0..255, which leaves
nothing in white areas; it swaps wavelet details and wraps where U overflows, which costs up to 20 dB; and it takes 0.5
s per million pixels. Ours

- moves s to the nearer of the two values that encode the bit, or to the other one where the colour range ends;
- keeps brightness, except where blue or green would leave 0..255: there it makes the pixel just as much darker or
  brighter as needed, which does not change U (the headroom of white areas);
- dithers when rounding, otherwise flat areas would move in whole steps only;
- reads the rounded result and corrects it.

The final result is read back, and counts as marked only if the message is found. benchmarks/watermark.py measures what
the watermark survives.

Known pitfall: the package needs OpenCV, which comes as opencv-python (needs libGL, often missing on servers) and as
opencv-python-headless; both install into the same folder, and the last one installed wins. Without the package we still
write, and read with `_bits`, which finds the same bits (tested against the package). Importing the package imports
torch, so it is imported late.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux2_studio.errors import StudioError

Float32Array = NDArray[np.float32]

METHOD = "dwtDctSvd"
SCALE = 36.0  # the decoder's
OTHER_VALUE_DISTANCE = SCALE * 7 / 8  # step to the other value that encodes a bit; seven eighths are enough
BLOCK_PIXELS = 8  # pixels per block side: two levels of halving, then blocks of 4
MIN_MARKED_SIDE_PIXELS = 256  # pixels per side; in smaller pictures each bit has too few blocks
# Only the top rows of larger pictures are read: the decoder needs 0.3 s per million pixels.
MAX_READ_PIXELS = 2048 * 2048
CORRECTIONS = 2  # after the first pass; more change little
MIN_MATCH_RATIO = 0.95  # share of the bits that must be read back
MAX_CHANCE = 1e-6  # a match less likely than this by chance counts as found

# How U + 1 changes green and blue at constant Y and V: the inverse of BT.601's RGB to YUV.
U_TO_GREEN, U_TO_BLUE = -0.395, 2.032
# The orthonormal discrete cosine transform of 4 values.
DCT_MATRIX = np.sqrt(0.5) * np.cos(np.pi / 8 * np.outer(np.arange(4), 2 * np.arange(4) + 1))
DCT_MATRIX[0] = 0.5
DITHER = np.array([[1, 5], [7, 3]], dtype=np.float32) / 8  # ordered, 2 x 2

SUPERSCRIPT_DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
# Shorter messages match by chance, longer ones have too few blocks per bit.
MIN_MESSAGE_BITS, MAX_MESSAGE_BITS = 32, 128


@dataclass(frozen=True, kw_only=True)
class WatermarkMessage:
    """A watermark's message: `bits`, 0 or 1 each, and a label for the user."""

    bits: tuple[int, ...]
    label: str

    @classmethod
    def parse(cls, text: str) -> WatermarkMessage:
        """Parse a user's message: 4 to 16 ASCII characters, or 0x and 8 to 32 hexadecimal digits.

        Leading zeros count. Readers may read it as `bytes` (8 bits per character) instead of bits. Raises `StudioError`
        for anything else, and for a message with so many equal bits that an even area would match it.
        """
        if text.startswith("0x"):
            digits = text.removeprefix("0x")
            allowed = set("0123456789abcdefABCDEF")
            bits = "".join(f"{int(it, 16):04b}" for it in digits) if set(digits) <= allowed else ""
        else:
            bits = "".join(f"{ord(it):08b}" for it in text) if text.isascii() and text.isprintable() else ""
        if not MIN_MESSAGE_BITS <= len(bits) <= MAX_MESSAGE_BITS:
            raise StudioError(
                "FLUX2_WATERMARK_MESSAGE must be 4 to 16 plain characters (a-z, A-Z, digits, signs), or 0x with 8 to "
                "32 hexadecimal digits: choose another message."
            )
        majority = max(bits.count("0"), bits.count("1"))
        if _binomial_tail(majority, len(bits)) <= MAX_CHANCE:
            raise StudioError(
                f"FLUX2_WATERMARK_MESSAGE is too even: {majority} of its {len(bits)} bits are the same, so that a "
                f"white wall would seem to say it. Choose a message of more different characters."
            )
        return cls(bits=tuple(map(int, bits)), label="your own message")


# Published in github.com/black-forest-labs/flux2, src/flux2/watermark.py, as 48 binary digits, chosen at random. What
# is embedded there are the digits of Python's `bin()`, which drops the two leading zeros: these 46 bits.
PUBLISHED_MESSAGE = WatermarkMessage(
    bits=tuple(map(int, f"{0b001010101111111010000111100111001111010100101110:b}")),
    label="Black Forest Labs' published message",
)


@dataclass(frozen=True, kw_only=True)
class WatermarkDetection:
    """Bits read from a picture, compared with `message`. matching_bits: how many agree."""

    message: WatermarkMessage
    matching_bits: int

    @property
    def match_ratio(self) -> float:
        """Share of the bits that agree: 1 for an intact mark, about 0.5 without one."""
        return self.matching_bits / len(self.message.bits)

    @property
    def chance_probability(self) -> float:
        """Probability that random bits agree at least this well: the binomial tail.

        Bits of unmarked pictures are not quite random: in an even area they are all the same, so
        `WatermarkMessage.parse` requires both kinds. Over varied pictures and messages, matches spread no wider than
        for random bits (measured standard deviation: 0.067 for 46 bits; 0.074 for random ones).
        """
        return _binomial_tail(self.matching_bits, len(self.message.bits))

    @property
    def found(self) -> bool:
        return self.chance_probability <= MAX_CHANCE

    def __str__(self) -> str:
        total = len(self.message.bits)
        agree = f"{self.matching_bits} of the {total} bits of {self.message.label} agree ({self.match_ratio:.0%})"
        if not self.found:
            return f"No watermark found: {agree}, which chance brings about too."
        return f"Watermark found: {agree}. By chance, one picture in {self.odds} does so well."

    @property
    def odds(self) -> str:
        """Number of pictures among which one matches this well by chance."""
        pictures = 1 / self.chance_probability
        if pictures < 1 / MAX_CHANCE:
            return f"{pictures:,.0f}"
        return f"10{str(math.floor(math.log10(pictures))).translate(SUPERSCRIPT_DIGITS)}"


@dataclass(frozen=True, kw_only=True)
class MarkedPicture:
    """A marked picture and what was read back; or the unchanged picture and the `reason`, for the user.

    box: the rectangle that holds the mark, as if it were a separate picture; None for the whole picture.
    """

    image: Image.Image
    box: tuple[int, int, int, int] | None = None
    detection: WatermarkDetection | None = None
    reason: str | None = None


def embed_watermark(image: Image.Image, message: WatermarkMessage) -> MarkedPicture:
    """Write `message` into `image` (RGB), and read it back to verify it.

    PSNR is nearly always 40 to 44 dB, and never below 38 in our tests. In photographs the mark survives JPEG at quality
    75.
    """
    if min(image.size) < MIN_MARKED_SIDE_PIXELS:
        width, height = image.size
        return MarkedPicture(
            image=image,
            reason=f"No watermark: at {width} x {height} the picture is too small to hold one that can be relied on. "
            f"Make it {MIN_MARKED_SIDE_PIXELS} pixels or more a side.",
        )
    marked = Image.fromarray(_write_bits(np.asarray(image), message.bits))
    detection = detect_watermark(marked, message)
    if detection is None or detection.match_ratio < MIN_MATCH_RATIO:
        matching = detection.matching_bits if detection else 0
        return MarkedPicture(
            image=image,
            reason=f"No watermark: only {matching} of {len(message.bits)} bits could be read back from these colours. "
            f"Another seed, or a background less garish, will hold one.",
        )
    return MarkedPicture(image=marked, detection=detection)


def embed_watermark_within(image: Image.Image, edit_mask: Image.Image, message: WatermarkMessage) -> MarkedPicture:
    """Like `embed_watermark`, but changes only pixels where `edit_mask` (L, the size of `image`) is not 0.

    The mark is in the smallest rectangle around them, which needs 256 pixels per side, and is read back there.
    """
    box = edit_mask.getbbox()
    assert box is not None, "something may change"
    part = image.crop(box)
    if min(part.size) < MIN_MARKED_SIDE_PIXELS:
        return MarkedPicture(
            image=image,
            reason=f"No watermark: what was edited ({part.width} x {part.height}) is too small to hold one that can be "
            f"relied on, and the rest stays as it was. {MIN_MARKED_SIDE_PIXELS} pixels or more a side can hold one.",
        )
    marked = embed_watermark(part, message)
    if marked.detection is None:
        return MarkedPicture(image=image, reason=marked.reason)
    part.paste(marked.image, mask=edit_mask.crop(box))
    detection = detect_watermark(part, message)
    if detection is None or detection.match_ratio < MIN_MATCH_RATIO:
        matching = detection.matching_bits if detection else 0
        return MarkedPicture(
            image=image,
            reason=f"No watermark: what was edited is too scattered to hold one; only {matching} of "
            f"{len(message.bits)} bits could be read back, and the rest of the picture stays as it was.",
        )
    full_image = image.copy()
    full_image.paste(part, box)
    return MarkedPicture(image=full_image, box=None if part.size == image.size else box, detection=detection)


def detect_watermark(image: Image.Image, message: WatermarkMessage) -> WatermarkDetection | None:
    """Compare the bits in `image` (any mode) with `message`.

    None for pictures with fewer than 256 x 256 pixels in total, which the package does not read.
    """
    width, height = image.size
    rows = min(height, max(MAX_READ_PIXELS // width, BLOCK_PIXELS))
    if width * rows < MIN_MARKED_SIDE_PIXELS**2:
        return None
    rgb = np.asarray(image.crop((0, 0, width, rows)).convert("RGB"))
    bits = _read_bits_by_package(rgb, len(message.bits))
    if bits is None:
        bits = _bits(rgb, len(message.bits))
    return WatermarkDetection(message=message, matching_bits=int(np.sum(bits == np.array(message.bits, dtype=bool))))


def _read_bits_by_package(rgb: NDArray[np.uint8], count: int) -> NDArray[np.bool_] | None:
    """The `count` bits that invisible-watermark reads in `rgb` [H, W, 3]; None if it cannot be imported."""
    try:
        import imwatermark
    except ImportError:  # also if OpenCV, which it needs, lacks a system library
        return None
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    bits: NDArray[np.bool_] = imwatermark.WatermarkDecoder("bits", count).decode(bgr, METHOD)
    return bits


def _bits(rgb: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """Read the same bits with numpy and PyWavelets only.

    The arithmetic is exactly the package's, because other rounding would change blocks whose value lies between two
    bits.
    """
    import pywt

    rows, columns = (length // 4 * 4 for length in rgb.shape[:2])
    averages, _ = pywt.dwt2(_u_channel(rgb)[:rows, :columns], "haar")
    rows, columns = rows // BLOCK_PIXELS, columns // BLOCK_PIXELS
    blocks = averages[: rows * 4, : columns * 4].reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(-1, 4, 4)
    strengths = np.linalg.svd(DCT_MATRIX @ blocks @ DCT_MATRIX.T, compute_uv=False)[:, 0]
    block_bits = (strengths % SCALE > SCALE / 2).astype(float)
    return np.array([block_bits[bit::count].mean() * 255 > 127 for bit in range(count)])


def _u_channel(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """U of YUV for [H, W, 3], rounded like OpenCV's integer arithmetic (BT.601, 14 fractional bits)."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    half = 1 << 13
    brightness = (4899 * red + 9617 * green + 1868 * blue + half) >> 14
    return (((blue - brightness) * 8061 + (128 << 14) + half) >> 14).clip(0, 255).astype(np.uint8)


def _binomial_tail(right: int, count: int) -> float:
    """Probability that `count` coin tosses give `right` heads or more."""
    return sum(math.comb(count, heads) for heads in range(right, count + 1)) / 2**count


def _write_bits(picture: NDArray[np.uint8], bits: tuple[int, ...]) -> NDArray[np.uint8]:
    """Mark a copy of [H, W, 3] RGB: every complete block encodes its bit."""
    rows, columns = (length // BLOCK_PIXELS for length in picture.shape[:2])
    complete_blocks = np.s_[: rows * BLOCK_PIXELS, : columns * BLOCK_PIXELS]
    marked = picture.copy()
    current = picture[complete_blocks].copy()
    red, green, blue = (current[..., channel].astype(np.float32) for channel in range(3))
    dither = np.tile(DITHER, (rows * BLOCK_PIXELS // 2, columns * BLOCK_PIXELS // 2))
    change = np.zeros_like(red)  # of U
    target_remainder = SCALE * (0.25 + 0.5 * np.resize(np.array(bits, dtype=np.float32), rows * columns))
    for correction in range(CORRECTIONS + 1):
        u = _u_channel(current)  # rounded exactly as the decoder rounds it
        strength, pattern = _largest_singular_values(_haar_blocks(u))
        if correction == 0:  # where blue is at its limit, moving away from it is cheaper: it needs no headroom
            average = _haar_blocks(current[..., 2]).mean(axis=(0, 1)) / 2
            bias = SCALE / 18 * ((average < 4).astype(np.float32) - (average > 251))
            target = np.maximum(np.round((strength + bias - target_remainder) / SCALE), 0) * SCALE + target_remainder
        step = target - strength
        if correction == 1:  # a bit is still wrong where the colour range ended: go the other way
            wrong_bit = np.abs(step) > SCALE / 4 - 0.5
            step = np.where(wrong_bit, np.sign(step) * -OTHER_VALUE_DISTANCE, step)
            target = np.where(wrong_bit, target + step, target)
        change += _expand_blocks(pattern * (step / 2), rows, columns)
        new_green, new_blue = green + U_TO_GREEN * change, blue + U_TO_BLUE * change
        overflow = np.maximum(np.maximum(new_green, new_blue) - 255, 0) + np.minimum(np.minimum(new_green, new_blue), 0)
        overflow -= dither
        for channel, values in enumerate((red, new_green, new_blue)):
            current[..., channel] = np.clip(np.floor(values - overflow), 0, 255)
    marked[complete_blocks] = current
    return marked


def _haar_blocks(plane: NDArray[np.uint8]) -> Float32Array:
    """[8 h, 8 w] -> [4, 4, h w]: Haar averages (sum of 2 x 2, halved) of each block, indexed by row, column, block."""
    halves = plane[0::2].astype(np.uint16) + plane[1::2]
    averages = (halves[:, 0::2] + halves[:, 1::2]).astype(np.float32) * np.float32(0.5)
    rows, columns = (length // 4 for length in averages.shape)
    return np.ascontiguousarray(averages.reshape(rows, 4, columns, 4).transpose(1, 3, 0, 2)).reshape(4, 4, -1)


def _largest_singular_values(squares: Float32Array) -> tuple[Float32Array, Float32Array]:
    """[4, 4, N] -> the largest singular values [N], and what to add to the blocks to raise each by 1 [4, 4, N].

    Power iteration: U is positive, so the vectors are too (Perron-Frobenius), and it converges quickly.
    """
    right = np.full_like(squares[0], 0.5)
    for _ in range(4):
        left = np.einsum("ijn,jn->in", squares, right)
        left /= np.sqrt(np.einsum("in,in->n", left, left)) + 1e-9
        right = np.einsum("ijn,in->jn", squares, left)
        strength = np.sqrt(np.einsum("jn,jn->n", right, right))
        right /= strength + 1e-9
    return strength, left[:, None] * right[None]


def _expand_blocks(averages: Float32Array, rows: int, columns: int) -> Float32Array:
    """[4, 4, rows columns], as from `_haar_blocks` -> [8 rows, 8 columns]; each value fills 2 x 2 pixels."""
    plane = averages.reshape(4, 4, rows, columns).transpose(2, 0, 3, 1).reshape(rows * 4, columns * 4)
    return plane.repeat(2, axis=0).repeat(2, axis=1)
