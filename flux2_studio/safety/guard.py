"""The safety checks of a run: before anything is computed, and before anything is shown or saved.

Checks return notes for the user, and raise `SafetyError` for what must be stopped:

    check_ready()                     first: can pictures be checked here, if the policy requires it?
    check_prompt(text)                the prompt, and again after prompt enhancement
    check_reference(number, image)    each reference, before it is encoded
    check_with_model(model, ...)      prompt and references, if a language model is available
    mosaic_if_flagged(image)          each preview: returns the picture to show in its place
    check_output(image)               each finished picture, before it is saved or shown

| policy | flagged | cannot be checked, because there is no classifier |
|---|---|---|
| on | `SafetyError`; a preview becomes a mosaic | `ClassifierError`: unchecked pictures are not generated |
| warn | a note; previews are not checked | a note |
| off | - | - |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from PIL import Image

from flux2_studio.errors import ClassifierError, SafetyError
from flux2_studio.safety.falconsai import Falconsai
from flux2_studio.safety.nudity import NudeNet
from flux2_studio.safety.policy import POLICY_DESCRIPTIONS, Policy, Verdict
from flux2_studio.safety.prompt_rules import apply_prompt_rules
from flux2_studio.safety.questions import YesNoModel, judge_with_model

MOSAIC_SQUARES = 16  # along the longer side of a hidden preview: only colours and layout remain
REWORD, ANOTHER = "Word it differently.", "Choose another picture."


class PictureClassifier(Protocol):
    def load(self) -> None: ...

    def __call__(self, image: Image.Image) -> Verdict: ...


class SafetyGuard:
    """The safety checks of one studio.

    find_weights: returns the folder of the larger classifier, None if it is not on this machine. classifier: replaces
    both built-in classifiers.
    """

    def __init__(
        self,
        policy: Policy,
        find_weights: Callable[[], Path | None] = lambda: None,
        classifier: PictureClassifier | None = None,
    ) -> None:
        self.policy = policy
        self._find_weights = find_weights
        self._chosen = classifier

    @property
    def policy_description(self) -> str:
        """A sentence for the page."""
        return POLICY_DESCRIPTIONS[self.policy]

    def check_ready(self) -> None:
        """Raise `ClassifierError` if pictures have to be checked and cannot be."""
        if self.policy == "on":
            self._classifier().load()

    def check_prompt(self, text: str) -> tuple[str, ...]:
        """Check a prompt with the rules. Raises `SafetyError`."""
        verdict = apply_prompt_rules(text)
        if verdict.under_every_policy:
            raise SafetyError(f"This prompt is refused, under every setting, because it {verdict.reason_text}.")
        if self.policy == "off":
            return ()
        return self._apply_policy(verdict, "The prompt", REWORD)

    def check_reference(self, number: int, image: Image.Image) -> tuple[str, ...]:
        """Check a reference. number: 1-based, as in the prompt. Raises `SafetyError` and `ClassifierError`."""
        return self._picture(image, _reference_name(number), ANOTHER)

    def check_with_model(
        self, yes_no_model: YesNoModel, prompt: str, references: Sequence[Image.Image] = ()
    ) -> tuple[str, ...]:
        """Ask the language model about the prompt and about each reference separately.

        It finds what rules and classifiers cannot. Raises `SafetyError`.
        """
        if self.policy == "off":
            return ()
        notes = self._apply_policy(judge_with_model(yes_no_model, prompt), "The prompt", REWORD)
        for number, image in enumerate(references, start=1):
            notes += self._apply_policy(judge_with_model(yes_no_model, "", [image]), _reference_name(number), ANOTHER)
        return notes

    def check_output(self, image: Image.Image, yes_no_model: YesNoModel | None = None) -> tuple[str, ...]:
        """Check a finished picture. yes_no_model: as for `check_with_model`.

        Raises `SafetyError` and `ClassifierError`: `image` must then be neither saved nor shown.
        """
        advice = "It was neither saved nor shown. Change the prompt, or try another seed."
        return self._picture(image, "A finished picture", advice, yes_no_model)

    def mosaic_if_flagged(self, image: Image.Image) -> Image.Image:
        """Return `image`, or a mosaic of it if the policy is "on" and it is flagged. Raises `ClassifierError`."""
        if self.policy != "on" or self._classifier()(image).allowed:
            return image
        scale = MOSAIC_SQUARES / max(image.size)
        small = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.NEAREST)

    def _picture(
        self, image: Image.Image, what: str, advice: str, yes_no_model: YesNoModel | None = None
    ) -> tuple[str, ...]:
        if self.policy == "off":
            return ()
        verdict, notes = Verdict(allowed=True), []
        try:
            verdict = self._classifier()(image)
        except ClassifierError as error:
            if self.policy == "on":
                raise
            notes = [f"{what} was not checked. {error}"]
        if verdict.allowed and yes_no_model is not None:
            verdict = judge_with_model(yes_no_model, "", [image])
        return (*notes, *self._apply_policy(verdict, what, advice))

    def _apply_policy(self, verdict: Verdict, what: str, advice: str) -> tuple[str, ...]:
        if verdict.allowed:
            return ()
        if self.policy == "on":
            raise SafetyError(f"{what} was stopped by the safety check, because it {verdict.reason_text}. {advice}")
        return (f"{what} was flagged by the safety check, because it {verdict.reason_text}.",)

    def _classifier(self) -> PictureClassifier:
        """The larger classifier if its weights are available, else NudeNet."""
        if self._chosen is None:
            folder = self._find_weights()
            self._chosen = NudeNet() if folder is None else Falconsai(folder)
        return self._chosen


def _reference_name(number: int) -> str:
    return f"Image {number}"
