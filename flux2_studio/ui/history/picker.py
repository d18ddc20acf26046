"""The dialog in Edit and Multi-reference that picks references from History.

assets/picker.js shows it and presses the form's hidden button, which sends the picked ids; ids are never trusted.
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
    """Build the dialog."""
    return gr.HTML(PICKER_HTML, elem_id="picker-root", apply_default_css=False)


def build_picker_button(form: str) -> gr.Button:
    """Build the button that opens the dialog for `form`; returns the hidden button that sends the picked ids."""
    open_button = gr.Button(i18n("From History"), size="sm", elem_classes="from-history")
    listen(open_button.click, None, js=f"() => window.studioPicker.open('{form}')")
    return gr.Button("Pick", visible="hidden", elem_id=f"{form}-pick")


def picker_script_tag(assets: Path) -> str:
    """The head script of the dialog; must come after that of History."""
    return f"<script>\n{(assets / 'picker.js').read_text(encoding='utf-8')}</script>"
