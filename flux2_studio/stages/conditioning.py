"""The stage that encodes what pictures are drawn from: prompts to contexts, references to latents."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from torch import Tensor

from flux2_studio.errors import ClassifierError
from flux2_studio.events import Event, Notice, Status
from flux2_studio.images.references import pad_to_multiple
from flux2_studio.models.hub.repositories import ProgressCallback
from flux2_studio.safety.questions import YesNoModel, make_yes_no_model
from flux2_studio.stages.run_context import RunContext, uses_cfg


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What every picture of a run is drawn from: contexts [1, L, C] and reference latents [1, 128, h, w]."""

    context: Tensor
    negative_context: Tensor | None
    references: Sequence[Tensor]


def find_yes_no_model(
    run: RunContext, progress: ProgressCallback | None = None
) -> tuple[YesNoModel | None, tuple[str, ...]]:
    """Return the language model that helps the safety check (None if there is none), and notes for the user.

    progress: if given, the model is loaded if necessary. Raises `ClassifierError` if the policy is "on" and the model
    cannot answer.
    """
    if run.guard.policy == "off" or (writer := run.session.acquire_vision_model(progress)) is None:
        return None, ()
    try:
        return make_yes_no_model(writer), ()
    except ClassifierError as error:
        if run.guard.policy == "on":
            raise
        return None, (str(error),)


def encode_conditioning(run: RunContext) -> Generator[Event, None, Conditioning]:
    """Prompts and references as the transformer takes them."""
    request, session = run.request, run.session
    guided = uses_cfg(request, session.checkpoint)
    prompts = [request.prompt, request.negative_prompt or ""] if guided else [request.prompt]
    yield Status(text="Reading the prompt")
    # Where strangers use the studio, the language model is worth loading to be asked.
    ask, told = yield from run.run_in_worker(
        lambda progress: find_yes_no_model(run, progress if run.guard.policy == "on" else None)
    )
    yield from run.outputs.new_notices(told)
    if ask is not None:
        pictures = [reference.image for reference in run.references]
        yield from run.outputs.new_notices(run.guard.check_with_model(ask, request.prompt, pictures))
    encoded = yield from run.run_in_worker(lambda progress: session.encode_prompts(prompts, progress))
    if request.negative_prompt and not guided:
        yield Notice(text="The negative prompt has no effect at guidance 1: choose a higher guidance to use it.")
    for name, cut in zip(("prompt", "negative prompt"), encoded.truncated_tokens, strict=False):
        if cut:
            yield Notice(
                text=f"The {name} is too long for {session.checkpoint.label}, which reads "
                f"{session.checkpoint.recipe.length} tokens: its last {cut} token{'s' if cut > 1 else ''} (about "
                f"{max(1, cut * 3 // 4)} word{'s' if cut > 2 else ''}) had to be left out."
            )
    latents = []
    for number, reference in enumerate(run.references, start=1):
        yield Status(text=f"Reading image {number}" if len(run.references) > 1 else "Reading the image")
        yield from run.outputs.new_notices(reference.notes)
        image = pad_to_multiple(run.region.original if run.region and number == 1 else reference.image)
        latents.append((yield from run.run_in_worker(lambda progress: session.encode_reference(image, progress))))  # noqa: B023
    return Conditioning(
        context=encoded.context[:1],
        negative_context=encoded.context[1:] if guided else None,
        references=latents,
    )
