"""The real detector on real pictures, and what is made of its answers.

There are no explicit pictures here: what would be flagged is tested with detections, one of them published by NudeNet.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from nudenet import NudeDetector
from PIL import Image, ImageOps

from flux2_studio.errors import ClassifierError
from flux2_studio.safety.nudity import (
    CLASS_THRESHOLDS,
    SECOND_PASS_PIXELS,
    BodyPartDetection,
    NudeNet,
    judge_detections,
    parse_detections,
)
from flux2_studio.settings import ASSETS

_SPEC = importlib.util.find_spec("skimage")
assert _SPEC and _SPEC.origin
PHOTOGRAPHS = Path(_SPEC.origin).parent / "data"


def photograph(name: str) -> Image.Image:
    return Image.open(PHOTOGRAPHS / name).convert("RGB")


def crowd() -> Image.Image:
    """Four faces, one of them cut off by the border."""
    canvas = Image.new("RGB", (640, 600), "grey")
    face = photograph("astronaut.png").crop((130, 0, 330, 220))
    for at, side in (((20, 20), 280), ((330, 0), 300), ((-70, 310), 270), ((300, 310), 290)):
        canvas.paste(face.resize((side, side)), at)
    return canvas


@pytest.fixture(scope="module")
def ours() -> NudeNet:
    return NudeNet()


@pytest.fixture(scope="module")
def theirs() -> NudeDetector:
    return NudeDetector()


PICTURES = {
    "a face": lambda: photograph("astronaut.png"),
    "a man": lambda: photograph("camera.png"),
    "a cat, wide": lambda: photograph("chelsea.png"),
    "wide and low": lambda: photograph("astronaut.png").crop((90, 0, 410, 250)),
    "tall": lambda: photograph("astronaut.png").crop((120, 0, 330, 512)),
    "small": lambda: photograph("astronaut.png").crop((160, 10, 290, 200)).resize((130, 190)),
    "large": lambda: photograph("astronaut.png").resize((1536, 1536)),
    "mirrored": lambda: ImageOps.mirror(photograph("astronaut.png")),
    "the moon": lambda: photograph("moon.png"),
    "a colour wheel": lambda: photograph("color.png"),
    "many": crowd,
}


@pytest.mark.parametrize("name", PICTURES)
def test_the_same_as_nudenets_own_code(name: str, ours: NudeNet, theirs: NudeDetector) -> None:
    image = PICTURES[name]()
    expected = [(it["class"], it["score"], tuple(it["box"])) for it in theirs.detect(np.asarray(image))]
    found = [(it.label, it.score, it.box) for it in ours.detect(image)]
    assert [(label, box) for label, _, box in found] == [(label, box) for label, _, box in expected]
    assert [score for _, score, _ in found] == pytest.approx([score for _, score, _ in expected], abs=1e-6)


def test_the_pictures_above_have_something_to_find(ours: NudeNet) -> None:
    assert [it.label for it in ours.detect(photograph("astronaut.png"))] == ["FACE_FEMALE"]
    assert len(ours.detect(crowd())) >= 3


@pytest.mark.parametrize(
    "path",
    [
        *(PHOTOGRAPHS / name for name in ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "color.png")),
        *(PHOTOGRAPHS / name for name in ("moon.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg", "coins.png")),
        *sorted((ASSETS / "examples").glob("*.png")),
    ],
    ids=lambda path: path.name,
)
def test_harmless_pictures_pass(path: Path, ours: NudeNet) -> None:
    verdict = ours(Image.open(path).convert("RGB"))
    assert verdict.allowed, verdict.scores


def test_a_colour_wheel_passes_by_the_second_look_only(ours: NudeNet) -> None:
    wheel = photograph("color.png")
    assert not judge_detections(ours.detect(wheel)).allowed
    assert judge_detections(ours.detect(wheel), ours.detect(wheel, SECOND_PASS_PIXELS)).allowed


def seen(*detections: tuple[str, float]) -> list[BodyPartDetection]:
    return [BodyPartDetection(label=label, score=score, box=(0, 0, 9, 9)) for label, score in detections]


PUBLISHED = seen(  # the answer that NudeNet's README shows
    ("BELLY_EXPOSED", 0.8511635065078735),
    ("FACE_FEMALE", 0.8033977150917053),
    ("FEMALE_BREAST_EXPOSED", 0.7963727712631226),
    ("FEMALE_BREAST_EXPOSED", 0.7709134817123413),
    ("ARMPITS_EXPOSED", 0.7005534172058105),
    ("FEMALE_GENITALIA_EXPOSED", 0.6804671287536621),
)


def test_what_is_flagged_is_told_in_words() -> None:
    verdict = judge_detections(PUBLISHED)
    assert not verdict.allowed
    assert verdict.reasons == ("seems to show genitals and bare breasts",)
    assert verdict.scores["FEMALE_BREAST_EXPOSED"] == pytest.approx(0.796, abs=1e-3), "the higher of the two"


@pytest.mark.parametrize("label", CLASS_THRESHOLDS)
def test_limits(label: str) -> None:
    limit = CLASS_THRESHOLDS[label]
    assert limit.with_person < limit.alone
    assert not judge_detections(seen((label, limit.alone))).allowed
    assert judge_detections(seen((label, limit.alone - 0.01))).allowed
    for other in ("FACE_MALE", "FEET_COVERED", next(it for it in CLASS_THRESHOLDS if it != label)):
        assert not judge_detections(seen((label, limit.with_person), (other, 0.31))).allowed
        assert judge_detections(seen((label, limit.with_person - 0.01), (other, 0.31))).allowed
        assert judge_detections(seen((label, limit.with_person), (other, 0.29))).allowed, "too unsure of the other part"


def test_skin_that_beaches_show_passes() -> None:
    harmless = ("MALE_BREAST_EXPOSED", "BELLY_EXPOSED", "FEET_EXPOSED", "ARMPITS_EXPOSED", "FEMALE_BREAST_COVERED")
    assert judge_detections(seen(*((label, 0.99) for label in harmless))).allowed


def test_the_second_look_confirms_or_clears() -> None:
    assert not judge_detections(PUBLISHED, PUBLISHED).allowed
    assert not judge_detections(PUBLISHED, seen(("MALE_GENITALIA_EXPOSED", 0.41))).allowed, "the sex does not matter"
    assert judge_detections(PUBLISHED, seen(("MALE_GENITALIA_EXPOSED", 0.39), ("FACE_FEMALE", 0.9))).allowed
    assert judge_detections(PUBLISHED, []).allowed
    partly = judge_detections(PUBLISHED, seen(("FEMALE_BREAST_EXPOSED", 0.6)))
    assert partly.reasons == ("seems to show bare breasts",)


def test_of_boxes_that_overlap_the_surest_stays() -> None:
    answer = np.zeros((6, 4), np.float32)  # two classes, four boxes
    answer[:4] = np.array([[100, 100, 50, 50], [102, 100, 50, 50], [200, 100, 50, 50], [20, 20, 80, 80]]).T
    answer[4:] = np.array([[0.5, 0.1], [0.2, 0.6], [0.3, 0.0], [0.24, 0.1]]).T
    found = parse_detections(answer, (640, 320), 320, ["A", "B"])
    assert [(it.label, round(it.score, 2)) for it in found] == [("B", 0.6), ("A", 0.3)]
    assert found[0].box == (154, 150, 100, 100), "in the picture's own pixels"


@pytest.mark.parametrize("content", [None, b"", b"no model at all"])
def test_a_model_that_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "320n.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ClassifierError, match=r"320n\.onnx of nudenet cannot be read: install nudenet again"):
        NudeNet(path).load()
