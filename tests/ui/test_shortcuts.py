"""The list of keys and the scripts that hear them, without a browser."""

from __future__ import annotations

from html import escape
from pathlib import Path

from flux2_studio.ui.gradio_compat import shortcuts

ASSETS = Path(__file__).resolve().parent.parent.parent / "assets"


def test_the_dialog_names_every_key() -> None:
    told = shortcuts.build_shortcut_help().value
    for title, rows in shortcuts.SHORTCUTS:
        assert f"<caption data-i18n>{escape(title)}</caption>" in told
        for pressed, text in rows:
            assert escape(text) in told
            assert all(f"<kbd>{escape(key)}</kbd>" in told for key in pressed)


def test_each_script_is_whole_in_the_head() -> None:
    """A script element ends at the first closing tag, wherever that stands."""
    head = shortcuts.shortcut_script_tags(ASSETS)
    assert head.count("<script>") == head.count("</script>") == len(shortcuts.SHORTCUT_SCRIPTS)
