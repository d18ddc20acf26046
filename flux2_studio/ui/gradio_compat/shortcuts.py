"""The list of keyboard shortcuts, which `?` opens, and the scripts that handle them."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

import gradio as gr

SHORTCUT_SCRIPTS = ("page.js", "references.js")

SHORTCUTS: tuple[tuple[str, tuple[tuple[tuple[str, ...], str], ...]], ...] = (
    (
        "Everywhere",
        (
            (("Ctrl", "Enter"), "Run the form that you are in"),
            (("Esc",), "Stop the run that you see"),
            (("Ctrl", "V"), "Edit a picture from the clipboard; or add it to the references, or inspect it"),
            (("?",), "Show this list"),
        ),
    ),
    (
        "In a prompt",
        (
            (("Ctrl", "↑"), "An older prompt that you ran in this form (on a Mac: Option + ↑)"),
            (("Ctrl", "↓"), "A newer one, and back to what you were writing"),
        ),
    ),
    (
        "In History, with a picture open",
        (
            (("←",), "The next newer picture"),
            (("→",), "The next older picture"),
            (("F",), "Favourite, or not any more"),
            (("Delete",), "Delete it; this can be undone"),
            (("Esc",), "Close it"),
        ),
    ),
)


def build_shortcut_help() -> gr.HTML:
    """Build the dialog; assets/page.js opens it."""
    tables = "".join(_table(title, rows) for title, rows in SHORTCUTS)
    return gr.HTML(
        '<dialog id="keys-help" aria-labelledby="keys-title">'
        '<button type="button" class="close" data-i18n aria-label="Close (Escape)">✕</button>'
        f'<h2 id="keys-title" data-i18n>Keys</h2>{tables}'
        "<p><span data-i18n>The prompts that you ran are kept in this browser alone, the last 50 of each form.</span> "
        '<button type="button" class="forget" data-i18n>Forget these prompts</button></p></dialog>',
        elem_id="keys-root",
        apply_default_css=False,
    )


def _table(title: str, rows: Sequence[tuple[Sequence[str], str]]) -> str:
    body = "".join(
        f"<tr><th scope='row'>{' + '.join(f'<kbd>{escape(key)}</kbd>' for key in keys)}</th>"
        f"<td data-i18n>{escape(text)}</td></tr>"
        for keys, text in rows
    )
    return f"<table><caption data-i18n>{escape(title)}</caption><tbody>{body}</tbody></table>"


def shortcut_script_tags(assets: Path) -> str:
    """The head scripts for the shortcuts."""
    return "".join(f"<script>\n{(assets / name).read_text(encoding='utf-8')}</script>" for name in SHORTCUT_SCRIPTS)
