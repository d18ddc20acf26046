"""The invisible watermark: a short message in a picture's colours, which the package invisible-watermark can read.

The layout is that of its method `dwtDctSvd` at its default scale. The picture is cut into squares of 8 x 8 pixels; in
each, from the top left, row by row, stands one bit of the message, again and again. It is told by the largest singular
value s of the square's 4 x 4 Haar averages of U (of YUV, BT.601): s mod 36 is below 18 for 0 and above for 1. (The
discrete cosine transform, which the method is also named after, is orthogonal: singular values stay as they are.) A
reader averages over the squares of a bit. So it must know how many bits there are; and the picture must have its own
size again, and its left, right and upper edge: cropped there, scaled or turned it says nothing any more.

The package reads, where it can be imported; we write. Its own encoder lets values that leave 0..255 be cut off, so that
nothing is left in white areas; it swaps wavelet details and wraps where U overflows, which costs up to 20 dB; and it
takes 0.5 s per million pixels. Ours

- goes to the nearer of the two values that stand for the bit, and to the other where colours end;
- keeps brightness, except where blue or green would leave 0..255: there the pixel is made as much darker or brighter
  as is needed, which does not change U (the headroom of white areas);
- dithers when rounding, or flat areas would take whole steps only;
- looks at what came of it, and corrects that.

The result is then read back, and is called marked only when the message is found.
benchmarks/watermark.py measures what it outlives.

Known pitfall: the package needs OpenCV, which comes as opencv-python (wants libGL, which servers often lack) and as
opencv-python-headless; both write the same folder, and the one installed last is used. Nothing is lost where it cannot
be imported: we write without it, and then read with `_bits`, which finds the same bits (tested against the package).
Importing the package imports torch, so it is imported late.
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
OTHER_VALUE_DISTANCE = (
    SCALE * 7 / 8
)  # to the other value that stands for a bit, but for an eighth: that way is long enough
BLOCK_PIXELS = 8  # pixels of a square: two levels of halving, then blocks of 4
MIN_MARKED_SIDE_PIXELS = 256  # pixels a side: below, a bit stands in too few squares to be relied on
MAX_READ_PIXELS = (
    2048 * 2048
)  # pixels: of larger pictures the rows above are read, for the decoder needs 0.3 s per million
CORRECTIONS = 2  # after the first try; more of them change little
MIN_MATCH_RATIO = 0.95  # share of the bits that must be read back
MAX_CHANCE = 1e-6  # a match that chance brings about less often than this counts as found

# What U + 1 adds to green and blue while brightness Y and V stay: the inverse of BT.601's RGB to YUV.
U_TO_GREEN, U_TO_BLUE = -0.395, 2.032
# The orthonormal discrete cosine transform of 4 values.
DCT_MATRIX = np.sqrt(0.5) * np.cos(np.pi / 8 * np.outer(np.arange(4), 2 * np.arange(4) + 1))
DCT_MATRIX[0] = 0.5
DITHER = np.array([[1, 5], [7, 3]], dtype=np.float32) / 8  # ordered, 2 x 2

SUPERSCRIPT_DIGITS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
MIN_MESSAGE_BITS, MAX_MESSAGE_BITS = (
    32,
    128,
)  # bits of a message: fewer are found by chance, more stand in too few squares


@dataclass(frozen=True, kw_only=True)
class WatermarkMessage:
    """What a watermark says: `bits`, 0 or 1 each, and what to call them."""

    bits: tuple[int, ...]
    label: str

    @classmethod
    def parse(cls, text: str) -> WatermarkMessage:
        """One's own message: 4 to 16 characters of ASCII, or 0x and 8 to 32 hexadecimal digits.

        Leading zeros count. Readers may take it as `bytes` (8 bits to a character) instead of bits. Raises
        `StudioError` for anything else, and for a message so one-sided that an even area would match it.
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
        most = max(bits.count("0"), bits.count("1"))
        if _binomial_tail(most, len(bits)) <= MAX_CHANCE:
            raise StudioError(
                f"FLUX2_WATERMARK_MESSAGE is too even: {most} of its {len(bits)} bits are the same, so that a white "
                f"wall would seem to say it. Choose a message of more different characters."
            )
        return cls(bits=tuple(map(int, bits)), label="your own message")


# Published in github.com/black-forest-labs/flux2, src/flux2/watermark.py, as 48 binary digits, chosen at random. What
# is embedded there are the digits of Python's `bin()`, which drops the two zeros in front: 46 bits, and these are they.
PUBLISHED_MESSAGE = WatermarkMessage(
    bits=tuple(map(int, f"{0b001010101111111010000111100111001111010100101110:b}")),
    label="Black Forest Labs' published message",
)


@dataclass(frozen=True, kw_only=True)
class WatermarkDetection:
    """What was read in a picture, compared with `message`. matching_bits: how many of its bits agree."""

    message: WatermarkMessage
    matching_bits: int

    @property
    def match_ratio(self) -> float:
        """Share of the bits that agree: 1 for a mark that is whole, about 0.5 where there is none."""
        return self.matching_bits / len(self.message.bits)

    @property
    def chance_probability(self) -> float:
        """How likely so many bits or more agree by chance, were every bit a coin's toss: the binomial tail.

        Pictures without a mark do not quite toss coins: in an even area all bits come out the same, for which
        `WatermarkMessage.parse` sees to it that a message has both kinds. Over varied pictures and messages, matches
        spread no wider than the coins' do (measured: standard deviation 0.067 for 46 bits, by coins 0.074).
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
        """Of how many pictures one does so well by chance."""
        pictures = 1 / self.chance_probability
        if pictures < 1 / MAX_CHANCE:
            return f"{pictures:,.0f}"
        return f"10{str(math.floor(math.log10(pictures))).translate(SUPERSCRIPT_DIGITS)}"


@dataclass(frozen=True, kw_only=True)
class MarkedPicture:
    """A marked picture and what was read back; or the picture as it was, and `reason`, for the user to read.

    box: where in the picture the mark stands, as if that were a picture of its own; None for the whole.
    """

    image: Image.Image
    box: tuple[int, int, int, int] | None = None
    detection: WatermarkDetection | None = None
    reason: str | None = None


def embed_watermark(image: Image.Image, message: WatermarkMessage) -> MarkedPicture:
    """Write `message` into `image` (RGB), and read it back before calling it done.

    Nearly always that costs 40 to 44 dB of PSNR, and never less than 38 in anything we tried. In photographs it
    outlives JPEG at quality 75.
    """
    if min(image.size) < MIN_MARKED_SIDE_PIXELS:
        width, height = image.size
        return MarkedPicture(
            image=image,
            reason=f"No watermark: at {width} x {height} the picture is too small to hold one that can be relied on. "
            f"Make it {MIN_MARKED_SIDE_PIXELS} pixels or more a side.",
        )
    marked = Image.fromarray(_write(np.asarray(image), message.bits))
    detection = detect_watermark(marked, message)
    if detection is None or detection.match_ratio < MIN_MATCH_RATIO:
        right = detection.matching_bits if detection else 0
        return MarkedPicture(
            image=image,
            reason=f"No watermark: only {right} of {len(message.bits)} bits could be read back from these colours. "
            f"Another seed, or a background less garish, will hold one.",
        )
    return MarkedPicture(image=marked, detection=detection)


def embed_watermark_within(image: Image.Image, edit_mask: Image.Image, message: WatermarkMessage) -> MarkedPicture:
    """As `embed_watermark`, but only where `edit_mask` (L, of the size of `image`) is not 0: every other pixel stays as
    it is.

    The mark stands in the smallest rectangle around that, which needs 256 pixels a side, and is read back there.
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
        right = detection.matching_bits if detection else 0
        return MarkedPicture(
            image=image,
            reason=f"No watermark: what was edited is too scattered to hold one; only {right} of {len(message.bits)} "
            f"bits could be read back, and the rest of the picture stays as it was.",
        )
    whole = image.copy()
    whole.paste(part, box)
    return MarkedPicture(image=whole, box=None if part.size == image.size else box, detection=detection)


def detect_watermark(image: Image.Image, message: WatermarkMessage) -> WatermarkDetection | None:
    """Compare what a reader finds in `image` (any mode) with `message`.

    None for a picture of fewer than 256 x 256 pixels in all, which the package does not read.
    """
    width, height = image.size
    rows = min(height, max(MAX_READ_PIXELS // width, BLOCK_PIXELS))
    if width * rows < MIN_MARKED_SIDE_PIXELS**2:
        return None
    rgb = np.asarray(image.crop((0, 0, width, rows)).convert("RGB"))
    bits = _bits_by_package(rgb, len(message.bits))
    if bits is None:
        bits = _bits(rgb, len(message.bits))
    return WatermarkDetection(message=message, matching_bits=int(np.sum(bits == np.array(message.bits, dtype=bool))))


def _bits_by_package(rgb: NDArray[np.uint8], count: int) -> NDArray[np.bool_] | None:
    """The `count` bits that invisible-watermark reads in `rgb` [H, W, 3]; None where it cannot be imported."""
    try:
        import imwatermark
    except ImportError:  # OpenCV, which it needs, wants a library that this machine lacks
        return None
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    bits: NDArray[np.bool_] = imwatermark.WatermarkDecoder("bits", count).decode(bgr, METHOD)
    return bits


def _bits(rgb: NDArray[np.uint8], count: int) -> NDArray[np.bool_]:
    """The same bits, read by numpy and PyWavelets alone.

    The arithmetic is the package's: a square whose value stands just between two bits would else be read differently.
    """
    import pywt

    rows, columns = (length // 4 * 4 for length in rgb.shape[:2])
    averages, _ = pywt.dwt2(_u_channel(rgb)[:rows, :columns], "haar")
    rows, columns = rows // BLOCK_PIXELS, columns // BLOCK_PIXELS
    blocks = averages[: rows * 4, : columns * 4].reshape(rows, 4, columns, 4).swapaxes(1, 2).reshape(-1, 4, 4)
    strengths = np.linalg.svd(DCT_MATRIX @ blocks @ DCT_MATRIX.T, compute_uv=False)[:, 0]
    says = (strengths % SCALE > SCALE / 2).astype(float)
    return np.array([says[bit::count].mean() * 255 > 127 for bit in range(count)])


def _u_channel(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """U of YUV for [H, W, 3], rounded as OpenCV's integer arithmetic does (BT.601, 14 bits behind the point)."""
    red, green, blue = (rgb[..., channel].astype(np.int32) for channel in range(3))
    half = 1 << 13
    brightness = (4899 * red + 9617 * green + 1868 * blue + half) >> 14
    return (((blue - brightness) * 8061 + (128 << 14) + half) >> 14).clip(0, 255).astype(np.uint8)


def _binomial_tail(right: int, count: int) -> float:
    """How likely `count` tosses of a coin bring `matching_bits` heads or more."""
    return sum(math.comb(count, heads) for heads in range(right, count + 1)) / 2**count


def _write(picture: NDArray[np.uint8], bits: tuple[int, ...]) -> NDArray[np.uint8]:
    """[H, W, 3] RGB -> a copy in which each whole square says its bit."""
    rows, columns = (length // BLOCK_PIXELS for length in picture.shape[:2])
    whole = np.s_[: rows * BLOCK_PIXELS, : columns * BLOCK_PIXELS]
    marked = picture.copy()
    now = picture[whole].copy()
    red, green, blue = (now[..., channel].astype(np.float32) for channel in range(3))
    dither = np.tile(DITHER, (rows * BLOCK_PIXELS // 2, columns * BLOCK_PIXELS // 2))
    change = np.zeros_like(red)  # of U
    within = SCALE * (0.25 + 0.5 * np.resize(np.array(bits, dtype=np.float32), rows * columns))
    for correction in range(CORRECTIONS + 1):
        u = _u_channel(now)  # rounded exactly as the decoder rounds it
        strength, pattern = _largest_singular_values(_haar_blocks(u))
        if correction == 0:  # where blue is at its end, the way off it is the cheaper one: it needs no headroom
            average = _haar_blocks(now[..., 2]).mean(axis=(0, 1)) / 2
            lean = SCALE / 18 * ((average < 4).astype(np.float32) - (average > 251))
            aim = np.maximum(np.round((strength + lean - within) / SCALE), 0) * SCALE + within
        step = aim - strength
        if correction == 1:  # what still says the wrong bit ran into the end of the colours: go the other way
            wrong = np.abs(step) > SCALE / 4 - 0.5
            step = np.where(wrong, np.sign(step) * -OTHER_VALUE_DISTANCE, step)
            aim = np.where(wrong, aim + step, aim)
        change += _expand_blocks(pattern * (step / 2), rows, columns)
        new_green, new_blue = green + U_TO_GREEN * change, blue + U_TO_BLUE * change
        beyond = np.maximum(np.maximum(new_green, new_blue) - 255, 0) + np.minimum(np.minimum(new_green, new_blue), 0)
        beyond -= dither
        for channel, values in enumerate((red, new_green, new_blue)):
            now[..., channel] = np.clip(np.floor(values - beyond), 0, 255)
    marked[whole] = now
    return marked


def _haar_blocks(plane: NDArray[np.uint8]) -> Float32Array:
    """[8 h, 8 w] -> [4, 4, h w]: the Haar averages (sum of 2 x 2, halved) of each square; row, column, square."""
    halves = plane[0::2].astype(np.uint16) + plane[1::2]
    averages = (halves[:, 0::2] + halves[:, 1::2]).astype(np.float32) * np.float32(0.5)
    rows, columns = (length // 4 for length in averages.shape)
    return np.ascontiguousarray(averages.reshape(rows, 4, columns, 4).transpose(1, 3, 0, 2)).reshape(4, 4, -1)


def _largest_singular_values(squares: Float32Array) -> tuple[Float32Array, Float32Array]:
    """[4, 4, N] -> the largest singular values [N], and [4, 4, N], what to add to raise each by 1.

    By power iteration: U is positive, so the vectors are too (Perron and Frobenius), and it settles quickly.
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
    """[4, 4, rows columns], laid out as by `_haar_blocks` -> [8 rows, 8 columns], each value in all of its 2 x 2
    pixels."""
    plane = averages.reshape(4, 4, rows, columns).transpose(2, 0, 3, 1).reshape(rows * 4, columns * 4)
    return plane.repeat(2, axis=0).repeat(2, axis=1)
