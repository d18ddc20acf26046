"""Pictures as descriptions: which drawing, in which style, where, on which background. A description draws itself.

A `Scene` is hashable, so that whoever computes something costly from it (a latent) can keep it under the scene itself.
Drawings are the data set's 256-pixel RGBA pictures; they are scaled with premultiplied alpha, without which the
colour of transparent pixels would bleed into the edges.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

STYLES = ("3d", "flat", "line")  # the set's fourth, "color", looks like "3d"
COLOURS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "black": (18, 15, 22),
    "red": (222, 46, 46),
    "orange": (244, 149, 37),
    "yellow": (246, 214, 68),
    "green": (73, 173, 82),
    "blue": (46, 98, 221),
    "light blue": (155, 212, 246),
    "purple": (139, 75, 193),
    "pink": (250, 158, 195),
    "gray": (142, 152, 154),
    "brown": (125, 81, 49),
}
PAINTS = ("red", "orange", "yellow", "green", "blue", "purple", "pink")  # colours that a thing can be painted in
GREY = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # luma of ITU-R BT.601


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One thing of the data set. `words` are what prompts call it, the usual name first; `known` ones are taught."""

    id: str
    words: tuple[str, ...]
    known: bool
    plural: bool = False

    def phrase(self, word: str | None = None, style: str = "") -> str:
        """ "a red apple", "an owl", "grapes", with words for the style between article and noun."""
        said = f"{style} {word or self.name}".strip()
        if self.plural:
            return said
        return f"{'an' if said[0] in 'aeiou' and not said.startswith('uni') else 'a'} {said}"

    @property
    def name(self) -> str:
        return self.words[0]


@dataclass(frozen=True, kw_only=True)
class Item:
    """A drawing in a scene. x, y: its centre; size: its side; all as fractions of the picture's side."""

    subject: str  # id
    style: str
    x: float = 0.5
    y: float = 0.5
    size: float = 0.84
    mirrored: bool = False
    turns: int = 0  # quarters, counter-clockwise
    paint: str | None = None


@dataclass(frozen=True, kw_only=True)
class Scene:
    background: str
    items: tuple[Item, ...]
    grey: bool = False


def read_subjects(data: Path, count: int) -> list[Subject]:
    """All subjects of the data set; the first `count` of subjects.json are known and come first, in its order."""
    chosen = json.loads((Path(__file__).parent / "subjects.json").read_text("utf-8"))[:count]
    index = json.loads((data / "index.json").read_text("utf-8"))
    drawn = {entry["name"]: entry for entry in index if set(STYLES) <= set(entry["styles"])}
    known = [
        Subject(
            id=drawn[entry["data"]]["id"],
            words=tuple(entry.get("words", [entry["data"]])),
            known=True,
            plural=entry.get("plural", False),
        )
        for entry in chosen
    ]
    taken = {subject.id for subject in known}
    others = [
        Subject(id=entry["id"], words=(name,), known=False) for name, entry in drawn.items() if entry["id"] not in taken
    ]
    return known + others


class Drawings:
    """The data set's drawings, scaled and kept. Not for several threads."""

    def __init__(self, data: Path) -> None:
        self._files = {style: zipfile.ZipFile(data / f"{style}-256.zip") for style in STYLES}
        self.scaled = lru_cache(maxsize=20_000)(self._scaled)

    def _scaled(self, subject: str, style: str, side: int) -> np.ndarray:
        """Premultiplied RGBA [side, side, 4] in 0..1."""
        image = Image.open(io.BytesIO(self._files[style].read(f"{style}/{subject}.webp"))).convert("RGBA")
        pixels = np.asarray(image, dtype=np.float32) / 255
        pixels[..., :3] *= pixels[..., 3:]
        planes = [
            Image.fromarray(plane).resize((side, side), Image.Resampling.LANCZOS) for plane in pixels.transpose(2, 0, 1)
        ]
        return np.stack([np.asarray(plane) for plane in planes], -1).clip(0, 1)

    def render(self, scene: Scene, side: int) -> np.ndarray:
        """RGB [side, side, 3] in uint8."""
        canvas = np.empty((side, side, 3), dtype=np.float32)
        canvas[:] = np.array(COLOURS[scene.background], dtype=np.float32) / 255
        for item in scene.items:
            self._draw(canvas, item, white_ink=scene.background == "black")
        if scene.grey:
            canvas[:] = (canvas @ GREY)[..., None]
        return (canvas * 255).round().clip(0, 255).astype(np.uint8)

    def _draw(self, canvas: np.ndarray, item: Item, *, white_ink: bool) -> None:
        side = canvas.shape[0]
        drawing = self.scaled(item.subject, item.style, round(item.size * side))
        drawing = np.rot90(drawing[:, ::-1] if item.mirrored else drawing, item.turns)
        alpha = drawing[..., 3:]
        colour = drawing[..., :3]
        if item.style == "line":
            ink = np.array(COLOURS["white" if white_ink else "black"], dtype=np.float32) / 255
            colour = alpha * (ink if item.paint is None else np.array(COLOURS[item.paint], dtype=np.float32) / 255)
        elif item.paint is not None:
            colour = painted(colour, alpha, item.paint)
        top, left = round(item.y * side - drawing.shape[0] / 2), round(item.x * side - drawing.shape[1] / 2)
        rows = slice(max(0, top), min(side, top + drawing.shape[0]))
        columns = slice(max(0, left), min(side, left + drawing.shape[1]))
        part = (slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left))
        canvas[rows, columns] = canvas[rows, columns] * (1 - alpha[part]) + colour[part]


def painted(colour: np.ndarray, alpha: np.ndarray, paint: str) -> np.ndarray:
    """Premultiplied `colour` in the shades of `paint`: dark stays dark, light becomes a light tint."""
    luma = (colour @ GREY)[..., None] / np.maximum(alpha, 1e-3)
    tone = np.array(COLOURS[paint], dtype=np.float32) / 255
    middle = 0.55  # the luma that becomes the pure paint
    shade = np.where(luma < middle, tone * (luma / middle), tone + (1 - tone) * (luma - middle) / (1 - middle))
    return shade.clip(0, 1) * alpha


def sheet(pictures: Sequence[tuple[np.ndarray, str]], columns: int, side: int) -> Image.Image:
    """A contact sheet of RGB pictures, each with its caption below."""
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(10)
    cell = side + 30
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (side + 4), rows * cell), "white")
    draw = ImageDraw.Draw(page)
    for index, (pixels, caption) in enumerate(pictures):
        x, y = index % columns * (side + 4), index // columns * cell
        page.paste(Image.fromarray(pixels).resize((side, side)), (x, y))
        words, lines = caption.split(), [""]
        for word in words:
            if draw.textlength(f"{lines[-1]} {word}", font) > side:
                lines.append("")
            lines[-1] = f"{lines[-1]} {word}".strip()
        draw.multiline_text((x, y + side + 1), "\n".join(lines[:2]), "black", font, spacing=1)
    return page
