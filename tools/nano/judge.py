"""Did the picture come out as asked? A yes-or-no check for each thing that a prompt can ask, and which kind asks what.

Bounds were set from the data (the palette, the range of a pixel), before any model's picture was judged. That they
are neither too strict nor too lax is shown by judging the true pictures, which must pass, and wrong ones, which must
not: see evaluate.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from tools.nano.classifier import Classifier, Seen
from tools.nano.scenes import COLOURS, GREY, PAINTS, Drawings, Item, Scene, Subject
from tools.nano.tasks import Sample

BACKGROUND_BOUND = 36.0  # RGB distance: half of that between the palette's two nearest colours, orange and yellow
KEPT_BOUND = 32.0  # mean difference of an object's pixels: an eighth of their range
GREY_BOUND = 16.0  # mean chroma (largest channel - smallest) of a picture without colours: a sixteenth of the range
RIVALS = 19  # other drawings among which a drawing must be the likeliest one; by chance: 1 in 20

# What must hold for a sample of each kind. "top-1" is told but not asked for: 148 subjects have doubles (two bears).
CHECKS: dict[str, tuple[str, ...]] = {
    "single": ("top-1", "subject", "style", "background"),
    "painted": ("subject", "style", "background", "paint"),
    "pair": ("places", "style", "background"),
    "background": ("background", "subject", "kept"),
    "remove": ("background", "subject", "kept"),
    "style": ("style", "subject", "background"),
    "grey": ("colourless", "subject", "background"),
    "paint": ("paint", "subject", "background"),
    "replace": ("subject", "gone", "style", "background"),
    "mirror": ("changed", "subject", "background"),
    "turn": ("changed", "subject", "background"),
    "zoom": ("changed", "subject", "background"),
    "add": ("places", "style", "background"),
    "onto": ("background", "subject", "kept"),
    "beside": ("places", "style", "background"),
    "like": ("style", "subject", "background"),
    "row": ("places", "style", "background"),
}
TOLD_ONLY = ("top-1",)
MOVED = ("mirror", "turn", "zoom")  # the classifier has seen nothing mirrored, turned or larger than the picture


@dataclass(frozen=True, kw_only=True)
class View:
    """A picture beside what it should be. `parts` are the classifier's word on each of several things."""

    sample: Sample
    picture: np.ndarray  # RGB [side, side, 3] in uint8
    truth: np.ndarray
    seen: Seen
    parts: tuple[Seen, ...]

    @property
    def item(self) -> Item:
        return self.sample.target.items[0]


class Judge:
    """Judges pictures of `side` pixels. `subjects`: all that may be drawn, for rivals."""

    def __init__(self, drawings: Drawings, classifier: Classifier, subjects: Sequence[Subject], side: int) -> None:
        self._drawings = drawings
        self._classifier = classifier
        self._subjects = [subject.id for subject in subjects]
        self._side = side
        self._checks: dict[str, Callable[[View], bool]] = {
            "top-1": lambda view: view.seen.subjects[0] == view.item.subject,
            "subject": self.subject,
            "style": style,
            "background": background,
            "paint": self.paint,
            "places": places,
            "kept": self.kept,
            "colourless": lambda view: float(chroma(view.picture).mean()) <= GREY_BOUND,
            "gone": lambda view: view.seen.subjects[0] != view.sample.references[0].items[0].subject,
            "changed": self.changed,
        }

    def draw(self, scene: Scene) -> np.ndarray:
        """The true picture of `scene`, RGB [side, side, 3] in uint8."""
        return self._drawings.render(scene, self._side)

    def verdicts(self, samples: Sequence[Sample], pictures: Sequence[np.ndarray]) -> list[dict[str, bool]]:
        """For each sample's picture its kind's checks by name, and "all": whether it did everything it was asked."""
        seen = self._classifier.look(pictures)
        cut_out = [
            [cut(picture, item) for item in sample.target.items] if len(sample.target.items) > 1 else []
            for sample, picture in zip(samples, pictures, strict=True)
        ]
        parts = iter(self._classifier.look([part for several in cut_out for part in several]))
        verdicts = []
        for index, (sample, picture) in enumerate(zip(samples, pictures, strict=True)):
            view = View(
                sample=sample,
                picture=picture,
                truth=self.draw(sample.target),
                seen=seen[index],
                parts=tuple(next(parts) for _ in cut_out[index]),
            )
            verdict = {name: bool(self._checks[name](view)) for name in CHECKS[sample.kind]}
            verdict["all"] = all(value for name, value in verdict.items() if name not in TOLD_ONLY)
            verdicts.append(verdict)
        return verdicts

    def subject(self, view: View) -> bool:
        """Whether the asked thing is among the classifier's first five.

        Where the classifier does not know the drawing, or not in this position: whether it is nearer to the truth
        than to any of `RIVALS` other drawings in the same place, style and colours.
        """
        if view.item.subject in self._classifier.subjects and view.sample.kind not in MOVED:
            return view.item.subject in view.seen.subjects[:5]
        others = [subject for subject in self._subjects if subject != view.item.subject]
        rivals = random.Random(view.item.subject).sample(others, min(RIVALS, len(others)))
        own = difference(view.picture, view.truth)
        scene = view.sample.target
        return all(
            difference(view.picture, self.draw(replace(scene, items=(replace(view.item, subject=rival),)))) > own
            for rival in rivals
        )

    def kept(self, view: View) -> bool:
        """Whether the object's pixels are nearly those of the truth."""
        return difference(view.picture, view.truth, self.mask(view.sample.target)) <= KEPT_BOUND

    def changed(self, view: View) -> bool:
        """Whether the picture is no nearer to the reference than to the truth."""
        reference = self.draw(view.sample.references[0])
        return difference(view.picture, view.truth) <= difference(view.picture, reference)

    def paint(self, view: View) -> bool:
        """Whether the object's hue is nearest to the asked paint's, and half as strong as in the truth at least."""
        where = self.mask(view.sample.target)
        picture, truth = half(view.picture)[where], half(view.truth)[where]
        if chroma(picture).mean() < chroma(truth).mean() / 2:
            return False
        found = hue(picture)
        nearest = min(PAINTS, key=lambda name: abs(_turn(found - hue(np.array([COLOURS[name]])))))
        return nearest == view.item.paint

    def mask(self, scene: Scene) -> np.ndarray:
        """Where the scene's things cover its background at least by half: booleans [side / 2, side / 2]."""
        white, blue = (half(self.draw(replace(scene, background=name))) for name in ("white", "blue"))
        bare = [np.array(COLOURS[name], dtype=np.float32) for name in ("white", "blue")]
        if scene.grey:
            bare = [np.repeat(colour @ GREY, 3) for colour in bare]
        return np.linalg.norm(white - blue, axis=-1) <= 0.5 * float(np.linalg.norm(bare[0] - bare[1]))


def style(view: View) -> bool:
    """Whether every thing is drawn in the asked style."""
    return all(seen.style == view.item.style for seen in view.parts or (view.seen,))


def places(view: View) -> bool:
    """Whether each of several things is among the first five of its own place."""
    return all(
        item.subject in seen.subjects[:5] for item, seen in zip(view.sample.target.items, view.parts, strict=True)
    )


def background(view: View) -> bool:
    """Whether the border's median colour is the asked one's: within the bound, and nearest to it of all the palette.

    In grey pictures several colours of the palette are alike, so there it is the bound alone.
    """
    found = border_colour(view.picture)
    palette = {name: np.array(colour, dtype=np.float32) for name, colour in COLOURS.items()}
    asked = palette[view.sample.target.background]
    if view.sample.target.grey:
        return float(np.linalg.norm(found - asked @ GREY)) <= BACKGROUND_BOUND
    nearest = min(palette, key=lambda name: float(np.linalg.norm(found - palette[name])))
    near = float(np.linalg.norm(found - asked)) <= BACKGROUND_BOUND
    return near and nearest == view.sample.target.background


def border_colour(picture: np.ndarray) -> np.ndarray:
    """The median colour [3] of the outermost pixels, a 32nd of the side wide."""
    width = max(1, picture.shape[0] // 32)
    ring = np.ones(picture.shape[:2], dtype=bool)
    ring[width:-width, width:-width] = False
    return np.median(picture[ring], axis=0)


def cut(picture: np.ndarray, item: Item) -> np.ndarray:
    """The square in which `item` should stand, with a little air."""
    side = picture.shape[0]
    length = min(side, round(item.size * 1.06 * side))
    left, top = (round(min(max(0.0, place * side - length / 2), side - length)) for place in (item.x, item.y))
    return np.ascontiguousarray(picture[top : top + length, left : left + length])


def half(picture: np.ndarray) -> np.ndarray:
    """The picture at half its side, in float32: an edge that is off by one pixel should hardly count."""
    return np.asarray(Image.fromarray(picture).reduce(2), dtype=np.float32)


def difference(one: np.ndarray, other: np.ndarray, where: np.ndarray | None = None) -> float:
    """Mean absolute difference of two RGB pictures at half their side, 0..255; `where`: a mask of that size."""
    apart = np.abs(half(one) - half(other))
    return float((apart if where is None else apart[where]).mean())


def chroma(pixels: np.ndarray) -> np.ndarray:
    """How far pixels [..., 3] are from grey, 0..255."""
    values = pixels.astype(np.float32)
    return values.max(-1) - values.min(-1)


def hue(pixels: np.ndarray) -> float:
    """The mean hue of pixels [N, 3] as an angle, 0..1, each pixel counting as much as it has colour."""
    red, green, blue = pixels.astype(np.float64).mean(0)
    # On the plane across the grey axis a pixel is a vector whose length is its colourfulness; they simply add up.
    return float(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue) / (2 * np.pi) % 1)


def _turn(angle: float) -> float:
    """An angle of 0..1 turns brought to -0.5..0.5."""
    return (angle + 0.5) % 1 - 0.5
