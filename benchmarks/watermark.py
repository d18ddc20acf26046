"""How well the watermark holds: reads it back from marked pictures after what happens to pictures, and times it.

    python -m benchmarks.watermark [--seeds 4] [FOLDER ...]

Prints a table, the worst and the median picture of each group, and writes benchmarks/results/watermark.json. The
photographs are those that gradio brings along; the others are made here, so that every machine measures the same. The
pictures in FOLDER make another group. All reading is done by the library's own decoder.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import ROOT, machine, summary, write
from flux2_studio.provenance.watermark import (
    MIN_MARKED_SIDE_PIXELS,
    PUBLISHED_MESSAGE,
    WatermarkMessage,
    detect_watermark,
    embed_watermark,
)

PACKAGES = ("invisible-watermark", "opencv-python", "opencv-python-headless", "numpy", "pillow")
Pictures = list[Image.Image]


def photographs() -> Pictures:
    """The photographs in gradio's package that are large enough."""
    spec = find_spec("gradio")
    assert spec and spec.origin
    folder = Path(spec.origin).parent / "media_assets" / "images"
    found = [opened(path) for path in sorted(folder.glob("*.jp*g"))]
    return [image for image in found if min(image.size) >= MIN_MARKED_SIDE_PIXELS]


def landscape(seed: int, side: int) -> Image.Image:
    """Somewhat like a photograph: coloured clouds (noise of amplitude 1/f), a gradient, hard edges, a bright spot."""
    generator = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]) + 1 / side
    noise = [np.fft.irfft2(np.fft.rfft2(generator.normal(size=(side, side))) / frequency) for _ in range(3)]
    clouds = np.stack([layer / layer.std() for layer in noise], axis=-1) @ generator.normal(0.6, 0.4, (3, 3))
    down, right = np.mgrid[0 : 1 : side * 1j, 0 : 1 : side * 1j]
    values = 120 + 32 * clouds + 60 * (down[..., None] - 0.5) * generator.normal(size=3)
    for _ in range(6):
        middle, normal = generator.random(2), generator.normal(size=2)
        beyond = (down - middle[0]) * normal[0] + (right - middle[1]) * normal[1] > 0.2
        values[beyond] += generator.normal(0, 30, 3)
    spot = np.hypot(down - generator.random(), right - generator.random()) < 0.15
    values[spot] += 180
    return Image.fromarray(np.clip(values, 0, 255).round().astype(np.uint8))


def icons(side: int) -> Pictures:
    """nano's example pictures scaled to `side`, on the even backgrounds that they have, and on saturated white."""
    pictures = []
    for path in sorted((ROOT / "assets" / "examples").glob("*.png")):
        values = np.array(opened(path))
        behind = np.abs(values.astype(np.int16) - values[0, 0]).max(axis=-1) < 16
        for background in (values[behind], 255):
            values[behind] = background
            pictures.append(Image.fromarray(values).resize((side, side), Image.Resampling.LANCZOS))
    return pictures


def flat(side: int) -> Pictures:
    """Nothing but one colour: the corners and edge middles of the colour cube, and grey."""
    return [
        Image.new("RGB", (side, side), (red, green, blue))
        for red in (0, 128, 255)
        for green in (0, 128, 255)
        for blue in (0, 128, 255)
    ]


def opened(file: Path | BytesIO) -> Image.Image:
    with Image.open(file) as image:
        return image.convert("RGB")


def encoded(image: Image.Image, kind: str, quality: int) -> Image.Image:
    """`image` after being saved lossily and opened again."""
    file = BytesIO()
    image.save(file, format=kind, quality=quality)
    return opened(file)


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Decibels, of 8-bit values."""
    error = float(np.mean((np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2))
    return float(10 * np.log10(255**2 / error)) if error else float("inf")


def rescaled(image: Image.Image) -> Image.Image:
    """Three quarters of the size and back again."""
    width, height = image.size
    return image.resize((width * 3 // 4, height * 3 // 4), Image.Resampling.LANCZOS).resize(image.size)


HAPPENINGS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "lossless": lambda it: it,
    "JPEG 95": lambda it: encoded(it, "JPEG", 95),
    "JPEG 75": lambda it: encoded(it, "JPEG", 75),
    "JPEG 50": lambda it: encoded(it, "JPEG", 50),
    "WebP 80": lambda it: encoded(it, "WEBP", 80),
    "75 % and back": rescaled,
    "lower third off": lambda it: it.crop((0, 0, it.width, it.height * 2 // 3)),
    "16 px off left": lambda it: it.crop((16, 0, it.width, it.height)),
}


def measure(pictures: Sequence[Image.Image], message: WatermarkMessage) -> dict[str, Any]:
    """Match after each happening (worst, median; none where all are too small then to be read), PSNR, and the highest
    match among the pictures without a mark."""
    matches: dict[str, list[float]] = {name: [] for name in HAPPENINGS}
    unmarked: list[float] = []
    decibels, refused = [], 0
    for picture in pictures:
        unmarked += match(picture, message)
        marked = embed_watermark(picture, message)
        refused += marked.detection is None
        decibels.append(psnr(picture, marked.image))
        for name, happen in HAPPENINGS.items():
            matches[name] += match(happen(marked.image), message)
    return {
        "pictures": len(pictures),
        "refused": refused,
        "unmarked, highest": max(unmarked),
        "PSNR, lowest": min(decibels),
        "PSNR, median": statistics.median(decibels),
        "match": {name: [min(them), statistics.median(them)] if them else None for name, them in matches.items()},
    }


def match(image: Image.Image, message: WatermarkMessage) -> list[float]:
    """One share of the bits, or none for a picture too small to be read."""
    found = detect_watermark(image, message)
    return [found.match_ratio] if found else []


def timed(rounds: int) -> dict[str, float]:
    picture = landscape(0, 1024)
    seconds = []
    for number in range(rounds + 1):
        began = time.perf_counter()
        embed_watermark(picture, PUBLISHED_MESSAGE)
        if number:  # the first imports OpenCV
            seconds.append(time.perf_counter() - began)
    return summary(seconds)


def groups(seeds: int, folders: Sequence[Path]) -> Iterator[tuple[str, Pictures]]:
    yield "photographs", photographs()
    yield "photographs in grey", [it.convert("L").convert("RGB") for it in photographs()]
    for side in (256, 512, 1024):
        yield f"landscapes {side}", [landscape(seed, side) for seed in range(seeds)]
    for side in (256, 512):
        yield f"icons {side}", icons(side)
    yield "one colour 256", flat(256)
    for folder in folders:
        found = [opened(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in (".png", ".jpg", ".jpeg")]
        yield folder.name, [image for image in found if min(image.size) >= MIN_MARKED_SIDE_PIXELS]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the invisible watermark.")
    parser.add_argument("folders", metavar="FOLDER", nargs="*", type=Path, help="more pictures to measure")
    parser.add_argument("--seeds", type=int, default=4, help="made pictures of each kind and size (default: 4)")
    parser.add_argument("--rounds", type=int, default=10, help="timed embeddings of 1024 x 1024 (default: 10)")
    options = parser.parse_args()

    names = list(HAPPENINGS)
    print("share of the 46 bits read back, worst / median picture")
    print(f"{'':22}{'n':>4}{'PSNR dB':>13}", *(f"{name:>16}" for name in names), f"{'unmarked':>10}")
    report: dict[str, Any] = {"machine": machine("cpu", PACKAGES), "groups": {}}
    for name, pictures in groups(options.seeds, options.folders):
        result = report["groups"][name] = measure(pictures, PUBLISHED_MESSAGE)
        cells = [f"{it[0]:.2f} / {it[1]:.2f}" if it else "-" for it in result["match"].values()]
        decibels = f"{result['PSNR, lowest']:.1f} / {result['PSNR, median']:.1f}"
        print(f"{name:22}{result['pictures']:>4}{decibels:>13}", *(f"{cell:>16}" for cell in cells), end=" ")
        print(f"{result['unmarked, highest']:>10.2f}", "" if not result["refused"] else f"{result['refused']} refused")
    times = report["seconds, 1024 x 1024, verified"] = timed(options.rounds)
    print(f"embedding 1024 x 1024, verified: {times['median'] * 1000:.0f} ms, p90 {times['p90'] * 1000:.0f} ms")
    print(write(report, "watermark.json"))


if __name__ == "__main__":
    main()
