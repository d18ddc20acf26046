"""Before and after: an edit over the picture that it was made from, with a slider between the two, or in its place as
long as a button is held."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import ReferenceImageError
from flux2_studio.references import fit, load_reference
from flux2_studio.request import Request
from flux2_studio.ui.language import t

GREY = (128, 128, 128)  # where the original had nothing

HOLD = '<button type="button" class="hold" data-i18n>Hold to see the original</button>'
# By touch, mouse, or space and Enter: the slider shows the original alone as long as it is held.
HOLDING = """
const button = element.querySelector('.hold');
const hold = (held) => document.querySelector('#compare')?.classList.toggle('held', held);
button.addEventListener('pointerdown', (event) => { button.setPointerCapture(event.pointerId); hold(true); });
for (const end of ['pointerup', 'pointercancel', 'blur']) button.addEventListener(end, () => hold(false));
button.addEventListener('keydown', (event) => { if (event.key === ' ' || event.key === 'Enter') hold(true); });
button.addEventListener('keyup', () => hold(false));
button.addEventListener('contextmenu', (event) => event.preventDefault());
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`before` is the picture that the shown results were made from, as large as they are; None for none."""

    folded: gr.Accordion
    slider: gr.ImageSlider
    hold: gr.HTML
    before: gr.State


def layout() -> Comparison:
    with gr.Accordion(t("Before and after"), open=True, visible=False, elem_id="comparison") as folded:
        slider = gr.ImageSlider(
            label=t("Before and after"),
            show_label=False,
            interactive=False,
            format="png",  # what stays the same must look the same
            type="filepath",
            buttons=["fullscreen"],
            container=False,
            elem_id="compare",
        )
        hold = gr.HTML(HOLD, html_template="${value}", js_on_load=HOLDING, elem_id="hold")
    return Comparison(folded=folded, slider=slider, hold=hold, before=gr.State(None))


def hidden(comparison: Comparison) -> dict[Any, Any]:
    return {comparison.folded: gr.Accordion(visible=False), comparison.before: None}


def shown(comparison: Comparison, before: Image.Image | None, after: Path) -> dict[Any, Any]:
    """The update for a run that made `after` from `before`; hidden where it was no edit."""
    if before is None:
        return hidden(comparison)
    return {
        comparison.folded: gr.Accordion(visible=True),
        comparison.slider: picked(before, after),
        comparison.before: before,
    }


def picked(before: Image.Image | None, after: Path | str) -> Any:
    """The slider between `before` and `after`; nothing new where there is nothing to compare with."""
    return gr.skip() if before is None else gr.ImageSlider((before, str(after)))


def original(request: Request, checkpoint: Checkpoint) -> Image.Image | None:
    """The picture that `request` (resolved) edits, as large as the result; None where there is none."""
    one = len(request.references) == 1
    if not request.references or not (one or request.mask or request.outpaint):
        return None
    try:
        loaded = load_reference(request.references[0])
    except ReferenceImageError:  # deleted while the run went on: there is a result, and nothing to lay beside it
        return None
    picture = fit(loaded.image, checkpoint.reference_cap(len(request.references)))
    assert request.width and request.height
    size = request.width, request.height
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, GREY)
    margins = request.outpaint
    if not margins:  # a size of its own: as much of it as can be, in the middle
        picture.thumbnail(size)
        place = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    else:
        place = margins.left, margins.top
    canvas.paste(picture, place)
    return canvas
