"""The Models tab: every checkpoint as a card, with download and deletion, which `models/hub/library.py` does.

The page reads the library when the tab is opened, after every click, and once a second during downloads; no handler
waits for a download. Every text from a file or from the hub is escaped here or in `render`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from flux2_studio.checkpoints import MB, Checkpoint
from flux2_studio.errors import StudioError
from flux2_studio.models.hub.hub_errors import format_size
from flux2_studio.models.hub.library import CheckpointLibrary, CheckpointStatus
from flux2_studio.ui.forms import fields
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

DescribeMemoryNeeds = Callable[[Checkpoint], str]  # a checkpoint's memory needs on this machine, as a sentence

REFRESH_SECONDS = 1.0  # interval of updates during downloads
COUNT_OTHERS_FROM = 3  # from this many checkpoints on, shared parts show their number, not their names
STATE_LABELS = {"downloading": "downloading", "paused": "paused", "failed": "not downloaded"}
READ_ONLY_NOTE = (
    "Downloads and deletions are for whoever runs this studio: on its machine, {download} fetches a checkpoint, and "
    "{remove} deletes it."
)


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """One checkpoint. The label of `transfer` starts with its action."""

    name: str
    about: gr.HTML
    transfer: gr.Button
    delete: gr.Button
    confirmation: gr.Column
    question: gr.HTML
    confirm_delete: gr.Button
    cancel_delete: gr.Button
    outcome: gr.HTML  # result of the last deletion


@dataclass(frozen=True, kw_only=True)
class ModelsTab:
    tab: gr.Tab
    room: gr.HTML
    cards: tuple[CheckpointCard, ...]
    may_change: bool


def build_models_tab(
    library: CheckpointLibrary, describe_memory_needs: DescribeMemoryNeeds, *, may_change: bool
) -> ModelsTab:
    """Build the tab and its cards. may_change: whether checkpoints can be downloaded and deleted here."""
    with gr.Tab(i18n("Models"), id="models", elem_id="models") as tab:
        free_space = gr.HTML(_free_space_html(library, may_change), elem_id="room")
        with gr.Column(elem_id="shelf"):
            cards = tuple(_card(entry, library, describe_memory_needs, may_change) for entry in library.list_statuses())
        if library.local_file_problems:
            gr.HTML(_other_files_html(library.local_file_problems), elem_id="others")
    return ModelsTab(tab=tab, room=free_space, cards=cards, may_change=may_change)


def wire_models_tab(
    models: ModelsTab,
    library: CheckpointLibrary,
    describe_memory_needs: DescribeMemoryNeeds,
    *,
    checkpoint_dropdown: gr.Dropdown,
    about: gr.HTML,
) -> None:
    """Connect the tab. checkpoint_dropdown: of the page. about: the summary of its checkpoint."""
    # Outside the tab, because components in a tab exist only after it was opened.
    timer = gr.Timer(REFRESH_SECONDS, active=False)

    def refresh(name: str) -> Update:
        entries = library.list_statuses()
        by_name = {entry.checkpoint.name: entry for entry in entries}
        update: Update = {
            models.room: _free_space_html(library, models.may_change),
            timer: gr.Timer(active=any(entry.state == "downloading" or entry.fetching_kinds for entry in entries)),
            about: fields.checkpoint_summary_html(by_name[name].checkpoint, by_name[name].state == "complete"),
        }
        for card in models.cards:
            entry = by_name[card.name]
            update |= {card.about: checkpoint_card_html(entry, describe_memory_needs(entry.checkpoint))}
            update |= {
                card.transfer: _transfer_button(entry, models.may_change),
                card.delete: _delete_button(entry, models.may_change),
            }
        return update

    shown = [models.room, timer, about]
    shown += [component for card in models.cards for component in (card.about, card.transfer, card.delete)]
    listen([models.tab.select, timer.tick], refresh, checkpoint_dropdown, shown, queue=False)
    # Also when the page is opened, and at every choice: a download may be running.
    listen(None, refresh, checkpoint_dropdown, shown, queue=False)
    if models.may_change:
        for card in models.cards:
            _wire_card(card, library, refresh, checkpoint_dropdown, shown)


def _wire_card(
    card: CheckpointCard,
    library: CheckpointLibrary,
    refresh: Callable[[str], Update],
    checkpoint_dropdown: gr.Dropdown,
    shown: Sequence[gr.components.Component],
) -> None:
    def transfer(label: str, name: str) -> Update:
        # The clicked label decides, even if the checkpoint's state has changed since.
        if label == translate("Pause"):
            library.pause(card.name)
        else:
            library.download(card.name)
        return {card.outcome: "", card.confirmation: gr.Column(visible=False), **refresh(name)}

    def ask_delete() -> Update:
        return {
            card.question: _question_html(library.get_status(card.name)),
            card.confirmation: gr.Column(visible=True),
            card.outcome: "",
        }

    def delete(name: str) -> Update:
        try:
            html = render.notes([library.remove(card.name)])
        except StudioError as error:
            html = render.problem(str(error))
        return {card.outcome: html, card.confirmation: gr.Column(visible=False), **refresh(name)}

    listen(
        card.transfer.click,
        transfer,
        [card.transfer, checkpoint_dropdown],
        [card.outcome, card.confirmation, *shown],
        queue=False,
    )
    listen(card.delete.click, ask_delete, None, [card.question, card.confirmation, card.outcome], queue=False)
    listen(card.cancel_delete.click, lambda: gr.Column(visible=False), None, card.confirmation, queue=False)
    listen(
        card.confirm_delete.click, delete, checkpoint_dropdown, [card.outcome, card.confirmation, *shown], queue=False
    )


# --- layout -----------------------------------------------------------------------------------------------------


def _card(
    entry: CheckpointStatus, library: CheckpointLibrary, describe_memory_needs: DescribeMemoryNeeds, may_change: bool
) -> CheckpointCard:
    with gr.Column(elem_classes="model", elem_id=f"model-{library.checkpoints.index(entry.checkpoint)}"):
        about = gr.HTML(checkpoint_card_html(entry, describe_memory_needs(entry.checkpoint)))
        outcome = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="acts"):
            transfer = _transfer_button(entry, may_change)
            delete = _delete_button(entry, may_change)
        with gr.Column(visible=False, elem_classes="confirm") as confirmation:
            question = gr.HTML()
            with gr.Row(elem_classes="acts"):
                confirm_delete = gr.Button(i18n("Delete"), variant="stop", size="sm", min_width=100)
                cancel_delete = gr.Button(i18n("Keep"), size="sm", min_width=100)
    return CheckpointCard(
        name=entry.checkpoint.name,
        about=about,
        transfer=transfer,
        delete=delete,
        confirmation=confirmation,
        question=question,
        confirm_delete=confirm_delete,
        cancel_delete=cancel_delete,
        outcome=outcome,
    )


def _transfer_button(entry: CheckpointStatus, may_change: bool) -> gr.Button:
    """The button Download, Pause or Resume; hidden if there is nothing to download."""
    remaining = format_size(entry.remaining_bytes)
    label = {"downloading": translate("Pause"), "paused": translate("Resume, {amount} left", amount=remaining)}.get(
        entry.state, translate("Download {amount}", amount=remaining)
    )
    visible = may_change and (entry.remaining_bytes > 0 or entry.state == "downloading")
    return gr.Button(
        label,
        variant="secondary" if entry.state == "downloading" else "primary",
        size="sm",
        visible=visible,
        min_width=100,
        elem_classes="act",
    )


def _delete_button(entry: CheckpointStatus, may_change: bool) -> gr.Button:
    visible = may_change and entry.state != "downloading" and (entry.removable_bytes > 0 or entry.state == "paused")
    return gr.Button(i18n("Delete…"), size="sm", visible=visible, min_width=100, elem_classes="delete")


def checkpoint_card_html(entry: CheckpointStatus, memory_needs: str) -> str:
    """The contents of a card as HTML."""
    checkpoint = entry.checkpoint
    lines = [
        f"<h2>{escape(translate_message(checkpoint.label))}</h2>",
        f'<p class="facts">{"".join(_chip_list(entry))}</p>',
        f"<p>{escape(translate_message(checkpoint.good_for))}</p>",
    ]
    if memory_needs:
        lines.append(f'<p class="needs">{escape(translate_message(memory_needs))}</p>')
    if entry.shared and not entry.is_bundled:
        lines.append(f'<p class="shares">{escape(_shared_parts_text(entry))}</p>')
    if entry.licence_urls and entry.remaining_bytes and not entry.failure:
        lines.append(
            fields.gated_notice_html([fields.link(page, page.split("/", 3)[-1]) for page in entry.licence_urls])
        )
    if entry.state in ("downloading", "paused") or (entry.state == "failed" and entry.bytes_on_disk):
        lines.append(_progress_html(entry))
    if entry.failure and entry.state != "downloading":
        lines.append(render.problem(entry.failure))
    return "".join(lines)


def _chip_list(entry: CheckpointStatus) -> list[str]:
    if entry.state == "complete":
        first = f'<span class="chip here">{translate("on board") if entry.is_bundled else translate("on disk")}</span>'
    else:
        first = f'<span class="chip {entry.state}">{translate(STATE_LABELS.get(entry.state, "not on disk"))}</span>'
    fetching = [translate("{part} on its way", part=translate_message(kind)) for kind in entry.fetching_kinds]
    chips = [first, *(f'<span class="chip">{text}</span>' for text in fetching)]
    if entry.is_local_file:
        chips.append(f'<span class="chip">{translate("your own file")}</span>')
    chips.append(f'<span class="chip">{format_size(entry.total_bytes)}</span>')
    licence = entry.checkpoint.licence
    # A user's own file may have another licence page than the checkpoint that it resembles.
    licence_html = fields.link(entry.checkpoint.licence_url, licence)
    if entry.is_local_file:
        licence_html = translate("licence: {name}", name=escape(licence))
    chips.append(f'<span class="chip">{licence_html}</span>')
    return chips + ([f'<span class="chip">{translate("gated")}</span>'] if entry.licence_urls else [])


def _shared_parts_text(entry: CheckpointStatus) -> str:
    shared = []
    for part in entry.shared:
        few = len(part.others) < COUNT_OTHERS_FROM
        labels = translate(" and ").join(other.label for other in part.others)
        names = labels if few else translate("{count} others", count=len(part.others))
        shared.append(translate("the {part} with {names}", part=translate_message(part.kind), names=names))
    return translate("Shares {parts}.", parts=translate(", and ").join(shared))


def _progress_html(entry: CheckpointStatus) -> str:
    text = f"{format_size(entry.bytes_on_disk + entry.remaining_bytes, entry.bytes_on_disk)}"
    if entry.bytes_per_second:
        text += f" · {entry.bytes_per_second / MB:.1f} MB/s"
    if entry.seconds_left is not None:
        text += f" · {render.time_left(entry.seconds_left)}"
    activity = f'<p class="doing">{escape(translate_message(entry.activity))}</p>' if entry.activity else ""
    label = translate("Downloaded of {label}", label=entry.checkpoint.label)
    return (
        f'<div class="progress"><progress max="1" value="{entry.fraction:.4f}" aria-label="{escape(label)}"></progress>'
        f'<p class="bytes">{text}</p>{activity}</div>'
    )


def _question_html(entry: CheckpointStatus) -> str:
    label, amount = entry.checkpoint.label, format_size(entry.removable_bytes)
    text = translate("Delete what was downloaded of {label}? {amount} become free.", label=label, amount=amount)
    return render.notes([f"{text} {translate('Your own file stays.')}" if entry.is_local_file else text])


def _free_space_html(library: CheckpointLibrary, may_change: bool) -> str:
    if not may_change:  # the folder is private, too
        download, remove = (f"<code>flux2-studio models {act} NAME</code>" for act in ("download", "remove"))
        return f"<p>{translate(READ_ONLY_NOTE, download=download, remove=remove)}</p>"
    folder, free = library.free_space()
    folder_html = f"<code>{escape(folder)}</code>"
    amount = format_size(free)
    return (
        f"<p>{translate('Downloads go to {folder}, where {amount} are free.', folder=folder_html, amount=amount)}</p>"
    )


def _other_files_html(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(translate_message(sentence))}</li>" for sentence in sentences)
    return f"<h2 data-i18n>Other files in your folder</h2><ul>{items}</ul>"
