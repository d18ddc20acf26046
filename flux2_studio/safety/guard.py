"""The checks as a run makes them: before anything is computed, and before anything is shown or saved.

Each method gives what the user should be told, and raises `SafetyError` for what must not go on:

    ready()                     first: can pictures be checked here, if they have to be?
    prompt(text)                the prompt, and again what a language model made of it
    reference(number, image)    each reference, before it is encoded
    asked(ask, ...)             prompt and references, where a language model is there to be asked about them
    preview(image)              each preview: the picture that may be shown in its place
    output(image)               each finished picture, before it is saved or shown

| policy | what is flagged | what cannot be checked, for want of a classifier |
|---|---|---|
| on | `SafetyError`; a preview becomes a mosaic | `ClassifierError`: nothing is drawn that cannot be checked |
| warn | is told; previews are not looked at | is told |
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

MOSAIC_SQUARES = 16  # squares along the longer side of a veiled preview: colours and layout remain, nothing else
REWORD, ANOTHER = "Word it differently.", "Choose another picture."


class PictureClassifier(Protocol):
    def load(self) -> None: ...

    def __call__(self, image: Image.Image) -> Verdict: ...


class SafetyGuard:
    """The safety check of one studio.

    find_weights: where the larger classifier's folder is, None if it is not on this machine.
    classifier: another one than these two.
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
        """What the page says of it."""
        return POLICY_DESCRIPTIONS[self.policy]

    def check_ready(self) -> None:
        """Raises `ClassifierError` where pictures have to be checked and cannot be."""
        if self.policy == "on":
            self._classifier().load()

    def check_prompt(self, text: str) -> tuple[str, ...]:
        """Raises `SafetyError`."""
        verdict = apply_prompt_rules(text)
        if verdict.under_every_policy:
            raise SafetyError(f"This prompt is refused, under every setting, because it {verdict.reason_text}.")
        if self.policy == "off":
            return ()
        return self._apply_policy(verdict, "The prompt", REWORD)

    def check_reference(self, number: int, image: Image.Image) -> tuple[str, ...]:
        """number: 1-based, as the prompt calls it. Raises `SafetyError` and `ClassifierError`."""
        return self._picture(image, _named(number), ANOTHER)

    def check_with_model(
        self, yes_no_model: YesNoModel, prompt: str, references: Sequence[Image.Image] = ()
    ) -> tuple[str, ...]:
        """What rules and classifiers cannot know of them, of each by itself. yes_no_model: a language model that is
        there.

        Raises `SafetyError`.
        """
        if self.policy == "off":
            return ()
        told = self._apply_policy(judge_with_model(yes_no_model, prompt), "The prompt", REWORD)
        for number, image in enumerate(references, start=1):
            told += self._apply_policy(judge_with_model(yes_no_model, "", [image]), _named(number), ANOTHER)
        return told

    def check_output(self, image: Image.Image, yes_no_model: YesNoModel | None = None) -> tuple[str, ...]:
        """yes_no_model: as for `check_with_model`. Raises `SafetyError` and `ClassifierError`: `image` must then go
        nowhere."""
        advice = "It was neither saved nor shown. Change the prompt, or try another seed."
        return self._picture(image, "A finished picture", advice, yes_no_model)

    def mosaic_if_flagged(self, image: Image.Image) -> Image.Image:
        """`image`, or a mosaic of it where the policy is on and it is flagged. Raises `ClassifierError`."""
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
        verdict, told = Verdict(allowed=True), []
        try:
            verdict = self._classifier()(image)
        except ClassifierError as error:
            if self.policy == "on":
                raise
            told = [f"{what} was not checked. {error}"]
        if verdict.allowed and yes_no_model is not None:
            verdict = judge_with_model(yes_no_model, "", [image])
        return (*told, *self._apply_policy(verdict, what, advice))

    def _apply_policy(self, verdict: Verdict, what: str, advice: str) -> tuple[str, ...]:
        if verdict.allowed:
            return ()
        if self.policy == "on":
            raise SafetyError(f"{what} was stopped by the safety check, because it {verdict.reason_text}. {advice}")
        return (f"{what} was flagged by the safety check, because it {verdict.reason_text}.",)

    def _classifier(self) -> PictureClassifier:
        """The larger one where its weights are."""
        if self._chosen is None:
            folder = self._find_weights()
            self._chosen = NudeNet() if folder is None else Falconsai(folder)
        return self._chosen


def _named(number: int) -> str:
    return f"Image {number}"
