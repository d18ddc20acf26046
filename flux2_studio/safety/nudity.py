"""Exposed body parts in a picture, found by NudeNet's small detector (a YOLOv8n of 12 MB) on the CPU.

Only the model is used, the file 320n.onnx inside the installed package `nudenet`: none of its code is imported, so
neither is OpenCV, which that code needs. What is fed to the model and how its answer is read is what NudeNet 3.4.2
does with an RGB array (its own file reader swaps red and blue; the model was trained on RGB).

The detector is easily fooled by drawings: in 48 of 900 icons (emoji in 3D) it sees bare skin with a score of 0.35 and
up, mostly buttocks in what is round and of one colour. So a part that is seen alone needs a higher score than one of a
body of which more is seen, which lets 1,400 such icons pass, and what is about to be flagged is looked at again at
another size: a colour wheel, buttocks with 0.83, has 0.35 there.

What it cannot do: tell art or medicine from anything else, tell a person's age, see people of a few dozen pixels (the
whole picture is looked at in 320 x 320), or see what is sexual without bare skin.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux2_studio.errors import ClassifierError
from flux2_studio.safety.policy import Verdict

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

DETECTOR_PIXELS = 320  # pixels, at which the model was trained
SECOND_PASS_PIXELS = 448  # pixels of the second look
MIN_SECOND_PASS_SCORE = (
    0.4  # the least score of the second look: shapes that fooled the first fall below it, faces do not
)
MIN_BODY_PART_SCORE = 0.3  # from which another part of a body counts as one
MIN_CANDIDATE_SCORE, MIN_DETECTION_SCORE, MAX_BOX_IOU = (
    0.2,
    0.25,
    0.45,
)  # NudeNet's own: scores to look at and to keep, and the IoU of duplicates


@dataclass(frozen=True, kw_only=True)
class ClassThreshold:
    """From which score a class is flagged: where it is seen alone, and where another part of a body is seen too."""

    description: str
    alone: float
    with_person: float


CLASS_THRESHOLDS: Mapping[str, ClassThreshold] = {
    # The clearest sign there is. Links of a chain and a striped square reached 0.47 alone.
    "FEMALE_GENITALIA_EXPOSED": ClassThreshold(description="genitals", alone=0.55, with_person=0.4),
    "MALE_GENITALIA_EXPOSED": ClassThreshold(description="genitals", alone=0.55, with_person=0.4),
    "ANUS_EXPOSED": ClassThreshold(description="an anus", alone=0.55, with_person=0.4),
    # Smiling faces and fists of drawings reached 0.45 alone.
    "FEMALE_BREAST_EXPOSED": ClassThreshold(description="bare breasts", alone=0.55, with_person=0.45),
    # What the detector sees in hearts, circles, pastries and ears, at up to 0.83.
    "BUTTOCKS_EXPOSED": ClassThreshold(description="bare buttocks", alone=0.8, with_person=0.5),
}
"""Bare male breasts, bellies, feet and armpits, and everything covered, are not flagged: beaches are harmless."""


@dataclass(frozen=True, kw_only=True)
class BodyPartDetection:
    """One thing seen: `box` is x, y, width, height in pixels of the picture."""

    label: str
    score: float
    box: tuple[int, int, int, int]


class NudeNet:
    """The detector in `model`, by default the installed package's. It is loaded when it is first asked."""

    def __init__(self, model: Path | None = None) -> None:
        self._model = model

    def load(self) -> None:
        """Raises `ClassifierError` where the detector cannot be used here."""
        _ = self._session

    def __call__(self, image: Image.Image) -> Verdict:
        """What is to be seen in an RGB picture. Raises `ClassifierError`."""
        seen = self.detect(image)
        return (
            judge_detections(seen)
            if judge_detections(seen).allowed
            else judge_detections(seen, self.detect(image, SECOND_PASS_PIXELS))
        )

    def detect(self, image: Image.Image, side: int = DETECTOR_PIXELS) -> list[BodyPartDetection]:
        """All that is seen in an RGB picture that is scaled to `side`, a multiple of 32. Raises `ClassifierError`."""
        session, labels = self._session
        try:
            (answer,) = session.run(None, {session.get_inputs()[0].name: to_model_input(np.asarray(image), side)})
        except Exception as error:  # onnxruntime has a class of its own for each of its failures
            raise ClassifierError("The picture classifier of NudeNet failed: install nudenet again.") from error
        return parse_detections(answer[0], image.size, side, labels)

    @cached_property
    def _session(self) -> tuple[InferenceSession, list[str]]:
        try:
            import onnxruntime
        except ImportError as error:
            raise ClassifierError("Pictures cannot be checked without onnxruntime: pip install onnxruntime.") from error
        path = self._model or _packaged()
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the cores alone
        options.log_severity_level = 3
        try:
            session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            names = ast.literal_eval(session.get_modelmeta().custom_metadata_map["names"])
            labels = [names[index] for index in range(len(names))]
        except Exception as error:
            raise ClassifierError(f"{path.name} of nudenet cannot be read: install nudenet again.") from error
        if missing := CLASS_THRESHOLDS.keys() - set(labels):
            raise ClassifierError(
                f"{path.name} of nudenet does not know {', '.join(sorted(missing))}: install the version of nudenet "
                f"that requirements.txt names."
            )
        return session, labels


def judge_detections(
    detections: Sequence[BodyPartDetection], second_pass: Sequence[BodyPartDetection] | None = None
) -> Verdict:
    """The verdict on what was `detections`, by `CLASS_THRESHOLDS`; of that only what a second look saw `second_pass`,
    if there was one."""
    scores = _best(detections)
    bodily = {label for label, score in scores.items() if score >= MIN_BODY_PART_SCORE}
    flagged = [
        limit.description
        for label, limit in CLASS_THRESHOLDS.items()
        if scores.get(label, 0.0) >= (limit.with_person if bodily - {label} else limit.alone)
    ]
    if second_pass is not None:
        confirmed = {
            CLASS_THRESHOLDS[it.label].description
            for it in second_pass
            if it.label in CLASS_THRESHOLDS and it.score >= MIN_SECOND_PASS_SCORE
        }
        flagged = [words for words in flagged if words in confirmed]
    shown = " and ".join(dict.fromkeys(flagged))
    return Verdict(allowed=not flagged, reasons=(f"seems to show {shown}",) if flagged else (), scores=scores)


def to_model_input(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """[H, W, 3] -> [1, 3, side, side] in 0..1: padded to a square with black at the right or below, then scaled.

    Bilinear in the fixed-point arithmetic of OpenCV's resize, to the last bit: of two scalings that a person cannot
    tell apart the detector makes scores that differ by several hundredths.
    """
    square = max(pixels.shape[:2])
    position = (np.arange(side) + 0.5) * (square / side) - 0.5
    before = np.floor(position).astype(np.int64)
    weight = np.rint((position - before) * 2048).astype(np.int32)[:, None]  # of the pixel after
    # One pixel of black border stands for the padding; a position outside the square takes the pixel at its edge.
    padded = np.pad(pixels, ((0, 1), (0, 1), (0, 0)))
    rows, columns = (np.minimum(np.clip([before, before + 1], 0, square - 1), length) for length in pixels.shape[:2])

    def along(row: NDArray[np.int64]) -> NDArray[np.int32]:
        left, right = (padded[np.ix_(row, column)].astype(np.int32) for column in columns)
        return left * (2048 - weight) + right * weight

    above, below = (along(row) >> 4 for row in rows)
    down = weight[:, :, None]
    scaled = ((above * (2048 - down) >> 16) + (below * down >> 16) + 2) >> 2
    return (scaled.transpose(2, 0, 1)[None] * np.float32(1 / 255)).astype(np.float32)


def parse_detections(
    answer: NDArray[np.float32], size: tuple[int, int], side: int, labels: Sequence[str]
) -> list[BodyPartDetection]:
    """What the model's `answer` [4 + classes, N] (centre, width, height, scores) says of a picture of `size`.

    Of boxes that overlap the surest is kept, whatever its class; the surest comes first.
    """
    scores = answer[4:].max(0)
    likely = scores >= MIN_CANDIDATE_SCORE
    scores, classes = scores[likely], answer[4:, likely].argmax(0)
    x, y, width, height = answer[:4, likely] * max(size) / side
    left, top = (np.clip(at - length / 2, 0, most) for at, length, most in ((x, width, size[0]), (y, height, size[1])))
    width, height = np.minimum(width, size[0] - left), np.minimum(height, size[1] - top)
    found: list[BodyPartDetection] = []
    waiting = [index for index in np.argsort(-scores, kind="stable") if scores[index] > MIN_DETECTION_SCORE]
    while waiting:
        best, *waiting = waiting
        box = (int(left[best]), int(top[best]), int(width[best]), int(height[best]))
        found.append(BodyPartDetection(label=labels[classes[best]], score=float(scores[best]), box=box))
        across = np.minimum(left + width, left[best] + width[best]) - np.maximum(left, left[best])
        along = np.minimum(top + height, top[best] + height[best]) - np.maximum(top, top[best])
        shared = np.maximum(across, 0) * np.maximum(along, 0)
        overlap = shared / np.maximum(width * height + width[best] * height[best] - shared, 1e-9)
        waiting = [index for index in waiting if overlap[index] <= MAX_BOX_IOU]
    return found


def _best(detections: Sequence[BodyPartDetection]) -> dict[str, float]:
    """The highest score of each class, the surest first."""
    best: dict[str, float] = {}
    for detection in sorted(detections, key=lambda it: -it.score):
        best.setdefault(detection.label, detection.score)
    return best


def _packaged() -> Path:
    """The model in the installed package, which is found without importing it."""
    spec = importlib.util.find_spec("nudenet")
    places = spec.submodule_search_locations if spec else None
    path = Path(places[0]) / "320n.onnx" if places else None
    if path is None or not path.is_file():
        raise ClassifierError(
            "Pictures cannot be checked without nudenet's model: pip install --no-deps nudenet, or put "
            "Falconsai/nsfw_image_detection where FLUX2_NSFW_MODEL_PATH says."
        )
    return path
