"""Before and after: compares an edit with its original, with a slider, while a button is held, or alternating.

assets/compare.js handles the buttons.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import ReferenceImageError
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.request import Request
from flux2_studio.ui.gradio_compat.language import i18n

EMPTY_AREA_COLOUR = (128, 128, 128)  # beyond the original

HOLD_HTML = """<button type="button" class="hold" data-i18n>Hold to see the original</button>
<button type="button" class="flicker" aria-pressed="false" data-i18n title="Shows the original and the result in \
turns; where less motion is asked for, one of them at each press">Flicker</button>"""
# While the button is held, the slider shows only the original.
HOLD_JS = """
const set = (held) => document.querySelector('#compare')?.classList.toggle('held', held);
window.studioCompare.hold(element.querySelector('.hold'), set);
window.studioCompare.flicker(element.querySelector('.flicker'), set);
"""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """`original`: the picture that the shown results were made from, at their size; None if there is none."""

    accordion: gr.Accordion
    slider: gr.ImageSlider
    hold: gr.HTML
    original: gr.State


def build_comparison() -> Comparison:
    with gr.Accordion(i18n("Before and after"), open=True, visible=False, elem_id="comparison") as accordion:
        slider = gr.ImageSlider(
            label=i18n("Before and after"),
            show_label=False,
            interactive=False,
            format="png",  # lossless: unchanged areas must look unchanged
            type="filepath",
            buttons=["fullscreen"],
            container=False,
            elem_id="compare",
        )
        hold = gr.HTML(HOLD_HTML, html_template="${value}", js_on_load=HOLD_JS, elem_id="hold")
    return Comparison(accordion=accordion, slider=slider, hold=hold, original=gr.State(None))


def hide_comparison(comparison: Comparison) -> dict[Any, Any]:
    return {comparison.accordion: gr.Accordion(visible=False), comparison.original: None}


def show_comparison(comparison: Comparison, before: Image.Image | None, after: Path) -> dict[Any, Any]:
    """The update for a run that made `after` from `before`; hides the comparison if `before` is None."""
    if before is None:
        return hide_comparison(comparison)
    return {
        comparison.accordion: gr.Accordion(visible=True),
        comparison.slider: slider_update(before, after),
        comparison.original: before,
    }


def slider_update(before: Image.Image | None, after: Path | str) -> Any:
    """The slider between `before` and `after`; no update if `before` is None."""
    return gr.skip() if before is None else gr.ImageSlider((before, str(after)))


def is_edit(request: Request, references: int, *, masked: bool) -> bool:
    """Whether the first of `references` references is the picture that was edited, not just a model input."""
    return references == 1 or (references > 1 and bool(masked or request.outpaint))


def compare_script_tag(assets: Path) -> str:
    """The head script of the comparison."""
    return f"<script>\n{(assets / 'compare.js').read_text(encoding='utf-8')}</script>"


def load_original(request: Request, checkpoint: Checkpoint, pictures: PictureCache) -> Image.Image | None:
    """The picture that `request` (resolved) edits, at the size of the result; None if there is none."""
    if not is_edit(request, len(request.references), masked=request.mask is not None):
        return None
    try:
        cap = checkpoint.max_pixels_per_reference(len(request.references))
        picture = pictures.fitted(request.references[0], cap).image
    except ReferenceImageError:  # deleted during the run: the result cannot be compared
        return None
    assert request.width and request.height
    size = request.width, request.height
    if picture.size == size:
        return picture
    canvas = Image.new("RGB", size, EMPTY_AREA_COLOUR)
    margins = request.outpaint
    if not margins:  # a different size: scale it down to fit, centred
        picture = picture.copy()
        picture.thumbnail(size)
        place = (size[0] - picture.width) // 2, (size[1] - picture.height) // 2
    else:
        place = margins.left, margins.top
    canvas.paste(picture, place)
    return canvas
