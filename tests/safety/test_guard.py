"""What a run hears from the guard, under each policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.errors import ClassifierError, SafetyError
from flux2_studio.safety.guard import MOSAIC_SQUARES, SafetyGuard
from flux2_studio.safety.policy import Policy, Verdict
from flux2_studio.safety.questions import GENERAL_QUESTION, SPECIFIC_QUESTIONS

FINE = Image.new("RGB", (64, 48), "white")
NAKED = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 128, 3), np.uint8))


class Classifier:
    """Flags the picture NAKED, or cannot be used at all."""

    def __init__(self, broken: bool = False) -> None:
        self.broken = broken
        self.asked = 0

    def load(self) -> None:
        if self.broken:
            raise ClassifierError("There is no model: install it.")

    def __call__(self, image: Image.Image) -> Verdict:
        self.load()
        self.asked += 1
        flagged = image is NAKED
        return Verdict(allowed=not flagged, reasons=("seems to show bare breasts",) if flagged else ())


def guard(policy: Policy, broken: bool = False) -> SafetyGuard:
    return SafetyGuard(policy, classifier=Classifier(broken))


def yes(system: str, message: str, images: Sequence[Image.Image]) -> float:
    return 0.9


class Answers:
    """A language model that says yes to what is asked of `about`, a picture or a word of the prompt, and no else."""

    def __init__(self, about: Image.Image | str) -> None:
        self.about = about
        self.asked: list[tuple[str, list[Image.Image]]] = []

    def __call__(self, system: str, message: str, images: Sequence[Image.Image]) -> float:
        self.asked.append((message, list(images)))
        figure = GENERAL_QUESTION in message or SPECIFIC_QUESTIONS["a public figure"] in message
        hit = self.about in message if isinstance(self.about, str) else any(it is self.about for it in images)
        return 0.9 if hit and figure else 0.1


def test_on() -> None:
    it = guard("on")
    it.check_ready()
    assert it.check_prompt("a fox in the snow") == ()
    assert it.check_reference(1, FINE) == ()
    assert it.check_output(FINE) == ()
    assert it.mosaic_if_flagged(FINE) is FINE
    with pytest.raises(SafetyError, match=r"^The prompt was stopped .*asks for pornography\. Word it differently\.$"):
        it.check_prompt("a pornographic photo")
    with pytest.raises(
        SafetyError, match=r"^Image 2 was stopped .*seems to show bare breasts\. Choose another picture"
    ):
        it.check_reference(2, NAKED)
    with pytest.raises(
        SafetyError, match=r"^A finished picture was stopped .*neither saved nor shown\. Change the pro"
    ):
        it.check_output(NAKED)
    assert "are refused" in it.policy_description


def test_a_flagged_preview_is_veiled() -> None:
    shown = guard("on").mosaic_if_flagged(NAKED)
    assert shown.size == NAKED.size
    squares = np.asarray(shown).reshape(12, 8, 16, 8, 3)
    assert (squares == squares[:, :1, :, :1]).all(), (
        f"nothing within the {MOSAIC_SQUARES} squares of the longer side is left"
    )
    assert len(np.unique(squares[:, 0, :, 0].reshape(-1, 3), axis=0)) > 50, "but the squares are the picture's"


def test_warn() -> None:
    it = guard("warn")
    it.check_ready()
    assert it.check_prompt("a pornographic photo") == (
        "The prompt was flagged by the safety check, because it asks for pornography.",
    )
    assert it.check_reference(1, NAKED) == (
        "Image 1 was flagged by the safety check, because it seems to show bare breasts.",
    )
    (told,) = it.check_output(NAKED)
    assert told.startswith("A finished picture was flagged")
    assert it.check_output(FINE) == ()
    assert it.mosaic_if_flagged(NAKED) is NAKED


def test_off_looks_at_nothing() -> None:
    classifier = Classifier()
    it = SafetyGuard("off", classifier=classifier)
    it.check_ready()
    assert (it.check_prompt("a pornographic photo"), it.check_reference(1, NAKED), it.check_output(NAKED, yes)) == (
        (),
        (),
        (),
    )
    assert it.check_with_model(yes, "a famous mouse", [NAKED]) == ()
    assert it.mosaic_if_flagged(NAKED) is NAKED
    assert classifier.asked == 0


@pytest.mark.parametrize("policy", ["on", "warn", "off"])
def test_sexual_content_with_minors_is_refused_under_every_policy(policy: Policy) -> None:
    with pytest.raises(
        SafetyError, match="refused, under every setting, because it combines sexual content with minors"
    ):
        guard(policy).check_prompt("nude child")


def test_on_fails_closed() -> None:
    it = guard("on", broken=True)
    for call in (
        it.check_ready,
        lambda: it.check_reference(1, FINE),
        lambda: it.check_output(FINE),
        lambda: it.mosaic_if_flagged(FINE),
    ):
        with pytest.raises(ClassifierError, match="There is no model: install it"):
            call()


def test_warn_tells_what_was_not_checked() -> None:
    it = guard("warn", broken=True)
    it.check_ready()
    assert it.check_reference(3, FINE) == ("Image 3 was not checked. There is no model: install it.",)
    assert it.check_output(NAKED) == ("A finished picture was not checked. There is no model: install it.",)


def test_a_language_model_is_asked_about_the_prompt() -> None:
    assert guard("on").check_with_model(Answers("nothing"), "a famous mouse") == ()
    with pytest.raises(SafetyError, match=r"^The prompt was stopped .*seems to show a public figure\. Word it diff"):
        guard("on").check_with_model(Answers("mouse"), "a famous mouse", [FINE])
    with pytest.raises(SafetyError, match="a protected character and seems to show a company's logo"):
        guard("on").check_with_model(yes, "a famous mouse")
    (told,) = guard("warn").check_with_model(Answers("mouse"), "a famous mouse", [FINE])
    assert told == "The prompt was flagged by the safety check, because it seems to show a public figure."


def test_a_language_model_is_asked_about_each_reference_by_itself() -> None:
    other = Image.new("RGB", (32, 32), "red")
    ask = Answers(other)
    (told,) = guard("warn").check_with_model(ask, "a fox", [FINE, other, FINE])
    assert told.startswith("Image 2 was flagged") and told.endswith("a public figure.")
    assert [len(images) for _, images in ask.asked] == [0, 1, 1, 1, 1, 1, 1], "a second time only of what was one"
    assert all("fox" not in message for message, images in ask.asked if images)
    with pytest.raises(SafetyError, match=r"^Image 2 was stopped .*Choose another picture"):
        guard("on").check_with_model(ask, "a fox", [FINE, other])


def test_a_language_model_is_asked_about_finished_pictures() -> None:
    assert guard("on").check_output(FINE, Answers(NAKED)) == ()
    with pytest.raises(SafetyError, match=r"^A finished picture was stopped .*public figure\. It was neither saved"):
        guard("on").check_output(FINE, Answers(FINE))
    ask = Answers(NAKED)
    (told,) = guard("warn").check_output(NAKED, ask)
    assert "bare breasts" in told and ask.asked == [], "what the classifier flags need not be asked about"
    unchecked, told = guard("warn", broken=True).check_output(FINE, Answers(FINE))
    assert "was not checked" in unchecked and "a public figure" in told
    with pytest.raises(ClassifierError):
        guard("on", broken=True).check_output(FINE, Answers(NAKED))


def test_the_larger_classifier_is_used_where_its_weights_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(ClassifierError, match="Falconsai/nsfw_image_detection"):
        SafetyGuard("on", lambda: tmp_path).check_ready()
    SafetyGuard("on", lambda: None).check_ready()  # the one that ships with nudenet


def test_a_copy_that_is_not_there_matters_only_where_pictures_are_looked_at() -> None:
    def find() -> Path:
        raise ClassifierError("FLUX2_NSFW_MODEL_PATH points to nothing.")

    assert SafetyGuard("off", find).check_output(FINE) == ()
    assert "points to nothing" in SafetyGuard("warn", find).check_output(FINE)[0]
    with pytest.raises(ClassifierError, match="points to nothing"):
        SafetyGuard("on", find).check_ready()
