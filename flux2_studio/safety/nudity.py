"""Exposed body parts in a picture, found by NudeNet's small detector (a YOLOv8n of 12 MB) on the CPU.

Only the model is used, the file 320n.onnx in the installed package `nudenet`: none of its code is imported, and so
neither is OpenCV, which that code needs. Preprocessing and decoding follow NudeNet 3.4.2 for an RGB array (its own file
reader swaps red and blue; the model was trained on RGB).

Drawings easily fool the detector: in 48 of 900 icons (emoji in 3D) it sees bare skin with a score of 0.35 or more,
mostly buttocks in round shapes of one colour. So a part on its own needs a higher score than one with other body parts,
which lets 1,400 such icons pass; and before a picture is flagged it is checked again at another size: a colour wheel
with a score of 0.83 for buttocks has 0.35 there.

Limits: it cannot tell art or medicine from anything else, tell a person's age, see people of a few dozen pixels (the
whole picture is scaled to 320 x 320), or see sexual content without bare skin.
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

DETECTOR_PIXELS = 320  # input side at which the model was trained
SECOND_PASS_PIXELS = 448  # input side of the second pass
MIN_SECOND_PASS_SCORE = 0.4  # shapes that fooled the first pass fall below it, faces do not
MIN_BODY_PART_SCORE = 0.3  # from which another body part counts as seen
# NudeNet's own: minimum scores of candidates and of detections, and the IoU of duplicates.
MIN_CANDIDATE_SCORE, MIN_DETECTION_SCORE, MAX_BOX_IOU = 0.2, 0.25, 0.45


@dataclass(frozen=True, kw_only=True)
class ClassThreshold:
    """Scores from which a class is flagged: seen alone, and seen with another body part."""

    description: str
    alone: float
    with_person: float


CLASS_THRESHOLDS: Mapping[str, ClassThreshold] = {
    # The clearest sign. Chain links and a striped square reached 0.47 alone.
    "FEMALE_GENITALIA_EXPOSED": ClassThreshold(description="genitals", alone=0.55, with_person=0.4),
    "MALE_GENITALIA_EXPOSED": ClassThreshold(description="genitals", alone=0.55, with_person=0.4),
    "ANUS_EXPOSED": ClassThreshold(description="an anus", alone=0.55, with_person=0.4),
    # Drawn smiling faces and fists reached 0.45 alone.
    "FEMALE_BREAST_EXPOSED": ClassThreshold(description="bare breasts", alone=0.55, with_person=0.45),
    # Hearts, circles, pastries and ears reached up to 0.83.
    "BUTTOCKS_EXPOSED": ClassThreshold(description="bare buttocks", alone=0.8, with_person=0.5),
}
"""Bare male breasts, bellies, feet and armpits, and covered parts are not flagged: beaches are harmless."""


@dataclass(frozen=True, kw_only=True)
class BodyPartDetection:
    """One detection. `box`: x, y, width, height in pixels of the picture."""

    label: str
    score: float
    box: tuple[int, int, int, int]


class NudeNet:
    """The detector in the file `model`, by default the installed package's. Loaded at first use."""

    def __init__(self, model: Path | None = None) -> None:
        self._model = model

    def load(self) -> None:
        """Load the model. Raises `ClassifierError` if it cannot be used here."""
        _ = self._session

    def __call__(self, image: Image.Image) -> Verdict:
        """Judge an RGB picture. Raises `ClassifierError`."""
        detections = self.detect(image)
        return (
            judge_detections(detections)
            if judge_detections(detections).allowed
            else judge_detections(detections, self.detect(image, SECOND_PASS_PIXELS))
        )

    def detect(self, image: Image.Image, side: int = DETECTOR_PIXELS) -> list[BodyPartDetection]:
        """Detect body parts in an RGB picture scaled to `side`, a multiple of 32. Raises `ClassifierError`."""
        session, labels = self._session
        try:
            (output,) = session.run(None, {session.get_inputs()[0].name: to_model_input(np.asarray(image), side)})
        except Exception as error:  # onnxruntime has a separate class for each failure
            raise ClassifierError("The picture classifier of NudeNet failed: install nudenet again.") from error
        return parse_detections(output[0], image.size, side, labels)

    @cached_property
    def _session(self) -> tuple[InferenceSession, list[str]]:
        try:
            import onnxruntime
        except ImportError as error:
            raise ClassifierError("Pictures cannot be checked without onnxruntime: pip install onnxruntime.") from error
        path = self._model or _packaged_model()
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads must not use the cores
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
    """The verdict on `detections`, by `CLASS_THRESHOLDS`.

    second_pass: detections at another size, which must confirm each flag; None if there was no second pass.
    """
    scores = _best_scores(detections)
    body_parts = {label for label, score in scores.items() if score >= MIN_BODY_PART_SCORE}
    flagged = [
        threshold.description
        for label, threshold in CLASS_THRESHOLDS.items()
        if scores.get(label, 0.0) >= (threshold.with_person if body_parts - {label} else threshold.alone)
    ]
    if second_pass is not None:
        confirmed = {
            CLASS_THRESHOLDS[it.label].description
            for it in second_pass
            if it.label in CLASS_THRESHOLDS and it.score >= MIN_SECOND_PASS_SCORE
        }
        flagged = [description for description in flagged if description in confirmed]
    parts = " and ".join(dict.fromkeys(flagged))
    return Verdict(allowed=not flagged, reasons=(f"seems to show {parts}",) if flagged else (), scores=scores)


def to_model_input(pixels: NDArray[np.uint8], side: int) -> NDArray[np.float32]:
    """[H, W, 3] -> [1, 3, side, side] in 0..1: padded to a square with black at the right or bottom, then scaled.

    Bilinear in the fixed-point arithmetic of OpenCV's resize, bit for bit: scalings that look the same to a person give
    scores that differ by several hundredths.
    """
    square = max(pixels.shape[:2])
    position = (np.arange(side) + 0.5) * (square / side) - 0.5
    before = np.floor(position).astype(np.int64)
    weight = np.rint((position - before) * 2048).astype(np.int32)[:, None]  # of the pixel after
    # One black border pixel represents the padding; positions outside the square are clamped to its edge.
    padded = np.pad(pixels, ((0, 1), (0, 1), (0, 0)))
    rows, columns = (np.minimum(np.clip([before, before + 1], 0, square - 1), length) for length in pixels.shape[:2])

    def interpolate(row: NDArray[np.int64]) -> NDArray[np.int32]:
        left, right = (padded[np.ix_(row, column)].astype(np.int32) for column in columns)
        return left * (2048 - weight) + right * weight

    above, below = (interpolate(row) >> 4 for row in rows)
    down = weight[:, :, None]
    scaled = ((above * (2048 - down) >> 16) + (below * down >> 16) + 2) >> 2
    return (scaled.transpose(2, 0, 1)[None] * np.float32(1 / 255)).astype(np.float32)


def parse_detections(
    answer: NDArray[np.float32], size: tuple[int, int], side: int, labels: Sequence[str]
) -> list[BodyPartDetection]:
    """Decode the model's `answer` [4 + classes, N] (centre, width, height, scores) for a picture of `size`.

    Non-maximum suppression across classes; the highest score comes first.
    """
    scores = answer[4:].max(0)
    likely = scores >= MIN_CANDIDATE_SCORE
    scores, classes = scores[likely], answer[4:, likely].argmax(0)
    x, y, width, height = answer[:4, likely] * max(size) / side
    left, top = (
        np.clip(centre - length / 2, 0, limit) for centre, length, limit in ((x, width, size[0]), (y, height, size[1]))
    )
    width, height = np.minimum(width, size[0] - left), np.minimum(height, size[1] - top)
    found: list[BodyPartDetection] = []
    remaining = [index for index in np.argsort(-scores, kind="stable") if scores[index] > MIN_DETECTION_SCORE]
    while remaining:
        best, *remaining = remaining
        box = (int(left[best]), int(top[best]), int(width[best]), int(height[best]))
        found.append(BodyPartDetection(label=labels[classes[best]], score=float(scores[best]), box=box))
        overlap_x = np.minimum(left + width, left[best] + width[best]) - np.maximum(left, left[best])
        overlap_y = np.minimum(top + height, top[best] + height[best]) - np.maximum(top, top[best])
        intersection = np.maximum(overlap_x, 0) * np.maximum(overlap_y, 0)
        iou = intersection / np.maximum(width * height + width[best] * height[best] - intersection, 1e-9)
        remaining = [index for index in remaining if iou[index] <= MAX_BOX_IOU]
    return found


def _best_scores(detections: Sequence[BodyPartDetection]) -> dict[str, float]:
    """The highest score of each class, in descending order."""
    best: dict[str, float] = {}
    for detection in sorted(detections, key=lambda it: -it.score):
        best.setdefault(detection.label, detection.score)
    return best


def _packaged_model() -> Path:
    """The model file in the installed package, found without importing it."""
    spec = importlib.util.find_spec("nudenet")
    locations = spec.submodule_search_locations if spec else None
    path = Path(locations[0]) / "320n.onnx" if locations else None
    if path is None or not path.is_file():
        raise ClassifierError(
            "Pictures cannot be checked without nudenet's model: pip install --no-deps nudenet, or put "
            "Falconsai/nsfw_image_detection where FLUX2_NSFW_MODEL_PATH says."
        )
    return path
