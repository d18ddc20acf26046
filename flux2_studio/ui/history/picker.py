"""Pictures of History, chosen as references from within Edit and Multi-reference.

assets/picker.js shows them and presses the form's hidden button, which sends their ids; an id is never trusted.
"""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from flux2_studio.ui.gradio_compat.language import i18n
from flux2_studio.ui.gradio_compat.wiring import listen

PICKER_HTML = """<dialog id="picker" aria-labelledby="picker-title">
<button type="button" class="close" data-i18n aria-label="Close (Escape)">✕</button>
<h2 id="picker-title" data-i18n>From History</h2>
<input type="text" inputmode="search" data-i18n placeholder="Words of the prompt" aria-label="Words of the prompt"
autocomplete="off">
<div class="grid" data-i18n role="group" aria-label="Your pictures"></div>
<div class="foot"><p role="status"></p><button type="button" class="add" hidden></button></div>
</dialog>"""


def build_history_picker() -> gr.HTML:
    """The dialog."""
    return gr.HTML(PICKER_HTML, elem_id="picker-root", apply_default_css=False)


def build_picker_button(form: str) -> gr.Button:
    """What opens the dialog for the form of that name; returns the hidden button that sends what was chosen."""
    opens = gr.Button(i18n("From History"), size="sm", elem_classes="from-history")
    listen(opens.click, None, js=f"() => window.studioPicker.open('{form}')")
    return gr.Button("Pick", visible="hidden", elem_id=f"{form}-pick")


def picker_script_tag(assets: Path) -> str:
    """What the page's head needs, behind that of History."""
    return f"<script>\n{(assets / 'picker.js').read_text(encoding='utf-8')}</script>"
