"""The History tab: all pictures of a visitor, and their way back into a form.

assets/history.js draws it from the data of `routes.py`. To fill a form in Python, the script clicks one of the hidden
buttons, which send the picture's id; ids are never trusted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.errors import StudioError
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.storage.history import History
from flux2_studio.ui.forms.reference_names import names_in
from flux2_studio.ui.forms.reference_panel import gallery_paths, reference_outputs, set_references
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.inspect_tab import SCROLL_TO_TABS_JS, plan_restoration, restoration_outputs, restoration_update

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

NOT_IN_HISTORY = "This picture is not in your history any more: open History again."
PICTURE_FILE_MISSING = "The file of this picture is missing: choose another one, or make it again with Run again."
MAX_PICTURES_SENT = 100  # more than any checkpoint takes; the form reports those that it leaves out
NOTE_SECONDS = 12  # duration of a note
SEND_PICTURE_ID_JS = "(_, ...others) => [window.studioHistory.asked, ...others]"
RUN_FORM_JS = "(form) => { if (form) window.studioHistory.run(form); }"

HISTORY_HTML = """<div class="history">
<form class="filters" data-i18n role="search" aria-label="Find pictures">
<input type="search" data-i18n name="words" placeholder="Words of the prompt" aria-label="Words of the prompt"
autocomplete="off">
<select name="checkpoint" data-i18n aria-label="Checkpoint">
<option value="" data-i18n>Every checkpoint</option></select>
<label class="date"><span data-i18n>From</span><input type="date" name="since"></label>
<label class="date"><span data-i18n>to</span><input type="date" name="until"></label>
<label class="only"><input type="checkbox" name="favourites"><span data-i18n>Favourites only</span></label>
<button type="reset" data-i18n>Clear</button>
</form>
<div class="bar">
<p class="count" role="status"></p>
<div class="picked" hidden><button type="button" data-do="all" data-i18n>Select all shown</button>
<button type="button" data-do="none" data-i18n>Select none</button>
<button type="button" data-do="zip" data-i18n>Download as zip</button>
<button type="button" data-do="delete" data-i18n>Delete</button></div>
</div>
<div class="grid" data-i18n role="list" aria-label="Your pictures"></div>
<div class="nothing" hidden></div>
<div class="more" aria-hidden="true"></div>
<p class="trash" hidden><span></span><button type="button" data-do="back" data-i18n>Bring back</button>
<button type="button" data-do="empty" data-i18n>Remove for good</button></p>
<div class="told" hidden><span role="status"></span><button type="button" data-do="undo" data-i18n>Undo</button></div>
<dialog class="viewer" aria-labelledby="history-prompt">
<button type="button" class="close" data-do="close" data-i18n aria-label="Close (Escape)" autofocus>✕</button>
<figure><button type="button" class="step" data-do="newer" data-i18n
aria-label="Next newer picture (left arrow)">←</button>
<img alt=""><img class="before" data-i18n aria-label="What it was made from"><p class="lost" hidden></p>
<div class="comparison" role="group" data-i18n aria-label="Before and after" hidden>
<input type="range" min="0" max="100" value="50" data-i18n
aria-label="How much of the original is shown, in percent" hidden>
<button type="button" class="slide" aria-pressed="false" data-i18n>Slider</button>
<button type="button" class="hold" data-i18n>Hold: original</button>
<button type="button" class="flicker" aria-pressed="false" data-i18n title="Shows the original and the result in \
turns; where less motion is asked for, one of them at each press">Flicker</button></div>
<button type="button" class="step" data-do="older" data-i18n
aria-label="Next older picture (right arrow)">→</button></figure>
<div class="side">
<p id="history-prompt" class="prompt-text"></p>
<div class="acts main">
<button type="button" data-do="vary" data-i18n title="The same settings with a new seed">Vary</button>
<button type="button" data-do="again" data-i18n title="The same settings and seed">Run again</button>
<button type="button" data-do="reuse" data-i18n title="Put the settings into the form">Reuse settings</button>
<button type="button" data-do="edit" data-i18n>Send to Edit</button>
<button type="button" data-do="multi" data-i18n>Add to Multi-reference</button></div>
<div class="acts">
<button type="button" data-do="favourite" data-i18n aria-pressed="false" title="f">♡ Favourite</button>
<a data-do="download" data-i18n download>Download</a>
<button type="button" data-do="remove" data-i18n title="Delete">Delete</button></div>
<table><tbody></tbody></table>
<section class="from" hidden><h3 data-i18n>Made from</h3><div class="row"></div></section>
<section class="into" hidden><h3 data-i18n>Made from it</h3><div class="row"></div></section>
</div>
</dialog>
</div>"""


@dataclass(frozen=True, kw_only=True)
class HistoryTab:
    """picture_id: the script sends the picture's id in its place. form_to_run: the form to run once it is filled."""

    picture_id: gr.Textbox
    form_to_run: gr.Textbox
    edit: gr.Button
    multi: gr.Button
    reuse: gr.Button
    again: gr.Button
    vary: gr.Button


class OwnerPictures:
    """The pictures that `owner` may use as references: their own, and stored references of runs."""

    def __init__(self, history: History, reference_store: ReferenceStore | None, owner: str) -> None:
        self._history = history
        self._reference_store = reference_store
        self._owner = owner

    def find(self, sha256: str) -> Path | None:
        """The file with this hash; None if there is none."""
        own_file = self._history.find_file_by_hash(self._owner, sha256)
        return own_file if own_file is not None or self._reference_store is None else self._reference_store.find(sha256)


def build_history_tab() -> HistoryTab:
    with gr.Tab(i18n("History"), id="history", elem_id="history", elem_classes="sheet"):
        gr.HTML(HISTORY_HTML, elem_id="history-root", apply_default_css=False)
        buttons = {
            name: gr.Button(name, visible="hidden", elem_id=f"history-{name}")
            for name in ("edit", "multi", "reuse", "again", "vary")
        }
        picture_id, form_to_run = gr.Textbox(visible=False), gr.Textbox(visible=False)
    return HistoryTab(picture_id=picture_id, form_to_run=form_to_run, **buttons)


def history_script_tag(assets: Path) -> str:
    """The head script of this tab."""
    return f"<script>\n{(assets / 'history.js').read_text(encoding='utf-8')}</script>"


def wire_history_tab(
    tab: HistoryTab,
    studio: Studio,
    history: History,
    *,
    forms: Sequence[Form],
    checkpoint_dropdown: gr.Dropdown,
    tabs: gr.Tabs,
    reference_store: ReferenceStore | None,
) -> None:
    """Connect the tab.

    checkpoint_dropdown, tabs, forms: of the page. reference_store: references of runs; None if they are not stored.
    """
    edit, multi = (next(form for form in forms if form.name == name) for name in ("edit", "multi"))

    def picture_file(id_: str, request: gr.Request) -> Path:
        try:
            located = history.find_with_file(owner_of(request), str(id_))
        except StudioError as error:
            raise gr.Error(escape(translate_message(str(error))), print_exception=False) from error
        if located is None:
            raise gr.Error(translate(NOT_IN_HISTORY), print_exception=False)
        _, path = located
        if path is None:
            raise gr.Error(translate(PICTURE_FILE_MISSING), print_exception=False)
        return path

    def to_edit(id_: str, name: str, request: gr.Request) -> Update:
        picture = picture_file(id_, request)
        return {
            tabs: gr.Tabs(selected=edit.name),
            **set_references(edit, [picture], studio.settings.checkpoint(name), studio.pictures),
        }

    def to_multi(ids: str, name: str, items: Any, request: gr.Request) -> Update:
        pictures = [
            *gallery_paths(items),
            *(picture_file(id_, request) for id_ in str(ids).split(",")[:MAX_PICTURES_SENT]),
        ]
        update = set_references(
            multi, pictures, studio.settings.checkpoint(name), studio.pictures, names=names_in(items)
        )
        return {tabs: gr.Tabs(selected=multi.name), **update}

    def restore(id_: str, request: gr.Request, *, run: bool, vary: bool) -> Update:
        owner = owner_of(request)
        try:
            details = history.details(owner, str(id_))
        except StudioError as error:
            raise gr.Error(escape(translate_message(str(error))), print_exception=False) from error
        if details is None:
            raise gr.Error(translate(NOT_IN_HISTORY), print_exception=False)
        record = details.record
        if record is None:
            raise gr.Error(
                translate("The settings of this picture were written by another version of the studio: use that one."),
                print_exception=False,
            )
        if vary:  # a different picture is wanted, so it need not be reproducible
            record = replace(record, place=0, together=1, checkpoint="", versions={}, computed={})
        plan = plan_restoration(record, studio, OwnerPictures(history, reference_store, owner))
        if plan.request is None:
            raise gr.Error(escape(translate_message(plan.notes[0])), print_exception=False)
        if plan.notes:
            gr.Info(
                "<br>".join(escape(translate_message(note)) for note in plan.notes),
                duration=NOTE_SECONDS,
                title=translate("Settings from History"),
            )
        update = restoration_update(plan, forms, checkpoint_dropdown, tabs, studio.pictures)
        form = next(form for form in forms if form.name == plan.form)
        if vary:
            update |= {form.fields["seed"]: None, form.seed_lock: False}
        # With a missing reference it would be a different run.
        complete = len(plan.references) == len(record.references)
        return {**update, tab.form_to_run: form.name if run and complete else ""}

    def reuse(id_: str, _: str, request: gr.Request) -> Update:
        return restore(id_, request, run=False, vary=False)

    def again(id_: str, _: str, request: gr.Request) -> Update:
        return restore(id_, request, run=True, vary=False)

    def vary(id_: str, _: str, request: gr.Request) -> Update:
        return restore(id_, request, run=True, vary=True)

    picture_inputs = [tab.picture_id, checkpoint_dropdown]
    assert edit.reference_panel is not None and multi.reference_panel is not None
    clicks = [tab.edit.click, edit.reference_panel.history_button.click]
    listen(clicks, to_edit, picture_inputs, [tabs, *reference_outputs(edit)], js=SEND_PICTURE_ID_JS).success(
        None, js=SCROLL_TO_TABS_JS
    )
    clicks = [tab.multi.click, multi.reference_panel.history_button.click]
    inputs = [*picture_inputs, multi.fields["references"]]
    listen(clicks, to_multi, inputs, [tabs, *reference_outputs(multi)], js=SEND_PICTURE_ID_JS).success(
        None, js=SCROLL_TO_TABS_JS
    )
    for button, action in ((tab.reuse, reuse), (tab.again, again), (tab.vary, vary)):
        filled = listen(
            button.click,
            action,
            picture_inputs,
            [*restoration_outputs(forms, checkpoint_dropdown, tabs), tab.form_to_run],
            js=SEND_PICTURE_ID_JS,
        )
        filled.success(None, js=SCROLL_TO_TABS_JS).success(None, tab.form_to_run, None, js=RUN_FORM_JS)
