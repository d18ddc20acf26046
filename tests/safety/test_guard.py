"""What a run hears from the guard, under each policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.errors import ClassifierError, SafetyError
from flux2_studio.safety.guard import MOSAIC, Guard
from flux2_studio.safety.policy import Policy, Verdict
from flux2_studio.safety.questions import ANY, EACH

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


def guard(policy: Policy, broken: bool = False) -> Guard:
    return Guard(policy, classifier=Classifier(broken))


def yes(system: str, message: str, images: Sequence[Image.Image]) -> float:
    return 0.9


class Answers:
    """A language model that says yes to what is asked of `about`, a picture or a word of the prompt, and no else."""

    def __init__(self, about: Image.Image | str) -> None:
        self.about = about
        self.asked: list[tuple[str, list[Image.Image]]] = []

    def __call__(self, system: str, message: str, images: Sequence[Image.Image]) -> float:
        self.asked.append((message, list(images)))
        figure = ANY in message or EACH["a public figure"] in message
        hit = self.about in message if isinstance(self.about, str) else any(it is self.about for it in images)
        return 0.9 if hit and figure else 0.1


def test_on() -> None:
    it = guard("on")
    it.ready()
    assert it.prompt("a fox in the snow") == ()
    assert it.reference(1, FINE) == ()
    assert it.output(FINE) == ()
    assert it.preview(FINE) is FINE
    with pytest.raises(SafetyError, match=r"^The prompt was stopped .*asks for pornography\. Word it differently\.$"):
        it.prompt("a pornographic photo")
    with pytest.raises(
        SafetyError, match=r"^Image 2 was stopped .*seems to show bare breasts\. Choose another picture"
    ):
        it.reference(2, NAKED)
    with pytest.raises(
        SafetyError, match=r"^A finished picture was stopped .*neither saved nor shown\. Change the pro"
    ):
        it.output(NAKED)
    assert "are refused" in it.meaning


def test_a_flagged_preview_is_veiled() -> None:
    shown = guard("on").preview(NAKED)
    assert shown.size == NAKED.size
    squares = np.asarray(shown).reshape(12, 8, 16, 8, 3)
    assert (squares == squares[:, :1, :, :1]).all(), f"nothing within the {MOSAIC} squares of the longer side is left"
    assert len(np.unique(squares[:, 0, :, 0].reshape(-1, 3), axis=0)) > 50, "but the squares are the picture's"


def test_warn() -> None:
    it = guard("warn")
    it.ready()
    assert it.prompt("a pornographic photo") == (
        "The prompt was flagged by the safety check, because it asks for pornography.",
    )
    assert it.reference(1, NAKED) == (
        "Image 1 was flagged by the safety check, because it seems to show bare breasts.",
    )
    (told,) = it.output(NAKED)
    assert told.startswith("A finished picture was flagged")
    assert it.output(FINE) == ()
    assert it.preview(NAKED) is NAKED


def test_off_looks_at_nothing() -> None:
    classifier = Classifier()
    it = Guard("off", classifier=classifier)
    it.ready()
    assert (it.prompt("a pornographic photo"), it.reference(1, NAKED), it.output(NAKED, yes)) == ((), (), ())
    assert it.asked(yes, "a famous mouse", [NAKED]) == ()
    assert it.preview(NAKED) is NAKED
    assert classifier.asked == 0


@pytest.mark.parametrize("policy", ["on", "warn", "off"])
def test_sexual_content_with_minors_is_refused_under_every_policy(policy: Policy) -> None:
    with pytest.raises(
        SafetyError, match="refused, under every setting, because it combines sexual content with minors"
    ):
        guard(policy).prompt("nude child")


def test_on_fails_closed() -> None:
    it = guard("on", broken=True)
    for call in (it.ready, lambda: it.reference(1, FINE), lambda: it.output(FINE), lambda: it.preview(FINE)):
        with pytest.raises(ClassifierError, match="There is no model: install it"):
            call()


def test_warn_tells_what_was_not_checked() -> None:
    it = guard("warn", broken=True)
    it.ready()
    assert it.reference(3, FINE) == ("Image 3 was not checked. There is no model: install it.",)
    assert it.output(NAKED) == ("A finished picture was not checked. There is no model: install it.",)


def test_a_language_model_is_asked_about_the_prompt() -> None:
    assert guard("on").asked(Answers("nothing"), "a famous mouse") == ()
    with pytest.raises(SafetyError, match=r"^The prompt was stopped .*seems to show a public figure\. Word it diff"):
        guard("on").asked(Answers("mouse"), "a famous mouse", [FINE])
    with pytest.raises(SafetyError, match="a protected character and seems to show a company's logo"):
        guard("on").asked(yes, "a famous mouse")
    (told,) = guard("warn").asked(Answers("mouse"), "a famous mouse", [FINE])
    assert told == "The prompt was flagged by the safety check, because it seems to show a public figure."


def test_a_language_model_is_asked_about_each_reference_by_itself() -> None:
    other = Image.new("RGB", (32, 32), "red")
    ask = Answers(other)
    (told,) = guard("warn").asked(ask, "a fox", [FINE, other, FINE])
    assert told.startswith("Image 2 was flagged") and told.endswith("a public figure.")
    assert [len(images) for _, images in ask.asked] == [0, 1, 1, 1, 1, 1, 1], "a second time only of what was one"
    assert all("fox" not in message for message, images in ask.asked if images)
    with pytest.raises(SafetyError, match=r"^Image 2 was stopped .*Choose another picture"):
        guard("on").asked(ask, "a fox", [FINE, other])


def test_a_language_model_is_asked_about_finished_pictures() -> None:
    assert guard("on").output(FINE, Answers(NAKED)) == ()
    with pytest.raises(SafetyError, match=r"^A finished picture was stopped .*public figure\. It was neither saved"):
        guard("on").output(FINE, Answers(FINE))
    ask = Answers(NAKED)
    (told,) = guard("warn").output(NAKED, ask)
    assert "bare breasts" in told and ask.asked == [], "what the classifier flags need not be asked about"
    unchecked, told = guard("warn", broken=True).output(FINE, Answers(FINE))
    assert "was not checked" in unchecked and "a public figure" in told
    with pytest.raises(ClassifierError):
        guard("on", broken=True).output(FINE, Answers(NAKED))


def test_the_larger_classifier_is_used_where_its_weights_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", "utf-8")
    with pytest.raises(ClassifierError, match="Falconsai/nsfw_image_detection"):
        Guard("on", lambda: tmp_path).ready()
    Guard("on", lambda: None).ready()  # the one that ships with nudenet


def test_a_copy_that_is_not_there_matters_only_where_pictures_are_looked_at() -> None:
    def find() -> Path:
        raise ClassifierError("FLUX2_NSFW_MODEL_PATH points to nothing.")

    assert Guard("off", find).output(FINE) == ()
    assert "points to nothing" in Guard("warn", find).output(FINE)[0]
    with pytest.raises(ClassifierError, match="points to nothing"):
        Guard("on", find).ready()
