"""Before and after: an edit over the picture that it was made from, with a slider between the two, in its place as long
as a button is held, or in turns with it. What the buttons do is in assets/compare.js."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.references import fit, load_reference
from flux2_studio.request import Request
from flux2_studio.ui.gradio_compat.language import i18n

EMPTY_AREA_COLOUR = (128, 128, 128)  # where the original had nothing

HOLD_HTML = """<button type="button" class="hold" data-i18n>Hold to see the original</button>
<button type="button" class="flicker" aria-pressed="false" data-i18n title="Shows the original and the result in \
turns; where less motion is asked for, one of them at each press">Flicker</button>"""
# The slider shows the original alone while it is to be seen.
HOLD_JS = """
const set = (held) => document.querySelector('#compare')?.classList.toggle('held', held);
window.studioCompare.hold(element.querySelector('.hold'), set);
window.studioCompare.flicker(element.querySelector('.flicker'), set);
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`original` is the picture that the shown results were made from, as large as they are; None for none."""

    accordion: gr.Accordion
    slider: gr.ImageSlider
    hold: gr.HTML
    original: gr.State


def build_comparison() -> Comparison:
    with gr.Accordion(i18n("Before and after"), open=True, visible=False, elem_id="comparison") as folded:
        slider = gr.ImageSlider(
            label=i18n("Before and after"),
            show_label=False,
            interactive=False,
            format="png",  # what stays the same must look the same
            type="filepath",
            buttons=["fullscreen"],
            container=False,
            elem_id="compare",
        )
        hold = gr.HTML(HOLD_HTML, html_template="${value}", js_on_load=HOLD_JS, elem_id="hold")
    return Comparison(accordion=folded, slider=slider, hold=hold, original=gr.State(None))


def hide_comparison(comparison: Comparison) -> dict[Any, Any]:
    return {comparison.accordion: gr.Accordion(visible=False), comparison.original: None}


def show_comparison(comparison: Comparison, before: Image.Image | None, after: Path) -> dict[Any, Any]:
    """The update for a run that made `after` from `original`; hidden where it was no edit."""
    if before is None:
        return hide_comparison(comparison)
    return {
        comparison.accordion: gr.Accordion(visible=True),
        comparison.slider: slider_update(before, after),
        comparison.original: before,
    }


def slider_update(before: Image.Image | None, after: Path | str) -> Any:
    """The slider between `original` and `after`; nothing new where there is nothing to compare with."""
    return gr.skip() if before is None else gr.ImageSlider((before, str(after)))


def is_edit(request: Request, references: int, *, masked: bool) -> bool:
    """Whether the first of so many references is what became the picture, and not one that went into it."""
    return references == 1 or (references > 1 and bool(masked or request.outpaint))


def compare_script_tag(assets: Path) -> str:
    """What the page's head needs for this."""
    return f"<script>\n{(assets / 'compare.js').read_text(encoding='utf-8')}</script>"


def load_original(request: Request, checkpoint: Checkpoint) -> Image.Image | None:
    """The picture that `request` (resolved) edits, as large as the result; None where there is none."""
    if not is_edit(request, len(request.references), masked=request.mask is not None):
        return None
    try:
        loaded = load_reference(request.references[0])
    except ReferenceImageError:  # deleted while the run went on: there is a result, and nothing to lay beside it
        return None
    picture = fit(loaded.image, checkpoint.max_pixels_per_reference(len(request.references)))
    assert request.width and request.height
    size = request.width, request.height
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, EMPTY_AREA_COLOUR)
    margins = request.outpaint
    if not margins:  # a size of its own: as much of it as can be, in the middle
        picture.thumbnail(size)
        place = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    else:
        place = margins.left, margins.top
    canvas.paste(picture, place)
    return canvas
