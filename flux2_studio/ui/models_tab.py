"""The Models tab: every checkpoint as a card, with its download and its deletion, which `models/hub/library.py` does.

The page looks at the shelf when the tab is opened, after every click, and once a second as long as something moves;
nobody waits for a download. Every text that may come from a file or from the hub is escaped here or in `render`.
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

DescribeMemoryNeeds = Callable[[Checkpoint], str]  # what a checkpoint asks of this machine's memory, as a sentence

REFRESH_SECONDS = 1.0  # seconds between two looks at what moves
COUNT_OTHERS_FROM = 3  # from here on, how many others share a part says more than their names
STATE_LABELS = {"downloading": "downloading", "paused": "paused", "failed": "not downloaded"}
READ_ONLY_NOTE = (
    "Downloads and deletions are for whoever runs this studio: on its machine, {download} fetches a checkpoint, and "
    "{remove} deletes it."
)


@dataclass(frozen=True, kw_only=True)
class CheckpointCard:
    """One checkpoint. The first word of the label of `transfer` is what it does."""

    name: str
    about: gr.HTML
    transfer: gr.Button
    delete: gr.Button
    confirmation: gr.Column
    question: gr.HTML
    confirm_delete: gr.Button
    cancel_delete: gr.Button
    outcome: gr.HTML  # what the last deletion did


@dataclass(frozen=True, kw_only=True)
class ModelsTab:
    tab: gr.Tab
    room: gr.HTML
    cards: tuple[CheckpointCard, ...]
    may_change: bool


def build_models_tab(
    library: CheckpointLibrary, describe_memory_needs: DescribeMemoryNeeds, *, may_change: bool
) -> ModelsTab:
    """The tab and its cards. Where `may_change` is false nothing can be downloaded or deleted here."""
    with gr.Tab(i18n("Models"), id="models", elem_id="models") as tab:
        room = gr.HTML(_room(library, may_change), elem_id="room")
        with gr.Column(elem_id="shelf"):
            cards = tuple(_card(entry, library, describe_memory_needs, may_change) for entry in library.list_statuses())
        if library.local_file_problems:
            gr.HTML(_others(library.local_file_problems), elem_id="others")
    return ModelsTab(tab=tab, room=room, cards=cards, may_change=may_change)


def wire_models_tab(
    models: ModelsTab,
    library: CheckpointLibrary,
    describe_memory_needs: DescribeMemoryNeeds,
    *,
    checkpoint_dropdown: gr.Dropdown,
    about: gr.HTML,
) -> None:
    """Connect the tab. `checkpoint_dropdown` is the page's checkpoint choice, `checkpoint_summary_html` what it says of
    the chosen one."""
    timer = gr.Timer(
        REFRESH_SECONDS, active=False
    )  # outside the tab, for what is in one lives only once it has been opened

    def look(name: str) -> Update:
        entries = library.list_statuses()
        by_name = {entry.checkpoint.name: entry for entry in entries}
        update: Update = {
            models.room: _room(library, models.may_change),
            timer: gr.Timer(active=any(entry.state == "downloading" or entry.fetching_kinds for entry in entries)),
            about: fields.checkpoint_summary_html(by_name[name].checkpoint, by_name[name].state == "complete"),
        }
        for card in models.cards:
            entry = by_name[card.name]
            update |= {card.about: checkpoint_card_html(entry, describe_memory_needs(entry.checkpoint))}
            update |= {card.transfer: _act(entry, models.may_change), card.delete: _delete(entry, models.may_change)}
        return update

    shown = [models.room, timer, about]
    shown += [component for card in models.cards for component in (card.about, card.transfer, card.delete)]
    listen([models.tab.select, timer.tick], look, checkpoint_dropdown, shown, queue=False)
    # When the page is opened too, and at every choice: a download may be on its way since.
    listen(None, look, checkpoint_dropdown, shown, queue=False)
    if models.may_change:
        for card in models.cards:
            _wire_card(card, library, look, checkpoint_dropdown, shown)


def _wire_card(
    card: CheckpointCard,
    library: CheckpointLibrary,
    look: Callable[[str], Update],
    checkpoint_dropdown: gr.Dropdown,
    shown: Sequence[gr.components.Component],
) -> None:
    def act(label: str, name: str) -> Update:
        # What the button said is what is done, whatever has become of the checkpoint meanwhile.
        if label == translate("Pause"):
            library.pause(card.name)
        else:
            library.download(card.name)
        return {card.outcome: "", card.confirmation: gr.Column(visible=False), **look(name)}

    def ask() -> Update:
        return {
            card.question: _question(library.get_status(card.name)),
            card.confirmation: gr.Column(visible=True),
            card.outcome: "",
        }

    def delete(name: str) -> Update:
        try:
            told = render.notes([library.remove(card.name)])
        except StudioError as error:
            told = render.problem(str(error))
        return {card.outcome: told, card.confirmation: gr.Column(visible=False), **look(name)}

    listen(
        card.transfer.click,
        act,
        [card.transfer, checkpoint_dropdown],
        [card.outcome, card.confirmation, *shown],
        queue=False,
    )
    listen(card.delete.click, ask, None, [card.question, card.confirmation, card.outcome], queue=False)
    listen(card.cancel_delete.click, lambda: gr.Column(visible=False), None, card.confirmation, queue=False)
    listen(
        card.confirm_delete.click, delete, checkpoint_dropdown, [card.outcome, card.confirmation, *shown], queue=False
    )


# --- how it looks -----------------------------------------------------------------------------------------------


def _card(
    entry: CheckpointStatus, library: CheckpointLibrary, describe_memory_needs: DescribeMemoryNeeds, may_change: bool
) -> CheckpointCard:
    with gr.Column(elem_classes="model", elem_id=f"model-{library.checkpoints.index(entry.checkpoint)}"):
        about = gr.HTML(checkpoint_card_html(entry, describe_memory_needs(entry.checkpoint)))
        told = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="acts"):
            act = _act(entry, may_change)
            delete = _delete(entry, may_change)
        with gr.Column(visible=False, elem_classes="confirm") as confirm:
            question = gr.HTML()
            with gr.Row(elem_classes="acts"):
                really = gr.Button(i18n("Delete"), variant="stop", size="sm", min_width=100)
                keep = gr.Button(i18n("Keep"), size="sm", min_width=100)
    return CheckpointCard(
        name=entry.checkpoint.name,
        about=about,
        transfer=act,
        delete=delete,
        confirmation=confirm,
        question=question,
        confirm_delete=really,
        cancel_delete=keep,
        outcome=told,
    )


def _act(entry: CheckpointStatus, may_change: bool) -> gr.Button:
    """Download, Pause or Resume: gone where there is nothing to fetch."""
    to_come = format_size(entry.remaining_bytes)
    label = {"downloading": translate("Pause"), "paused": translate("Resume, {amount} left", amount=to_come)}.get(
        entry.state, translate("Download {amount}", amount=to_come)
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


def _delete(entry: CheckpointStatus, may_change: bool) -> gr.Button:
    visible = may_change and entry.state != "downloading" and (entry.removable_bytes > 0 or entry.state == "paused")
    return gr.Button(i18n("Delete…"), size="sm", visible=visible, min_width=100, elem_classes="delete")


def checkpoint_card_html(entry: CheckpointStatus, memory_needs: str) -> str:
    """All that a card says, as HTML."""
    checkpoint = entry.checkpoint
    lines = [
        f"<h2>{escape(translate_message(checkpoint.label))}</h2>",
        f'<p class="facts">{"".join(_chips(entry))}</p>',
        f"<p>{escape(translate_message(checkpoint.good_for))}</p>",
    ]
    if memory_needs:
        lines.append(f'<p class="needs">{escape(translate_message(memory_needs))}</p>')
    if entry.shared and not entry.is_bundled:
        lines.append(f'<p class="shares">{escape(_shares(entry))}</p>')
    if entry.licence_urls and entry.remaining_bytes and not entry.failure:
        lines.append(
            fields.gated_notice_html([fields.link(page, page.split("/", 3)[-1]) for page in entry.licence_urls])
        )
    if entry.state in ("downloading", "paused") or (entry.state == "failed" and entry.bytes_on_disk):
        lines.append(_progress(entry))
    if entry.failure and entry.state != "downloading":
        lines.append(render.problem(entry.failure))
    return "".join(lines)


def _chips(entry: CheckpointStatus) -> list[str]:
    if entry.state == "complete":
        first = f'<span class="chip here">{translate("on board") if entry.is_bundled else translate("on disk")}</span>'
    else:
        first = f'<span class="chip {entry.state}">{translate(STATE_LABELS.get(entry.state, "not on disk"))}</span>'
    coming = [translate("{part} on its way", part=translate_message(kind)) for kind in entry.fetching_kinds]
    chips = [first, *(f'<span class="chip">{text}</span>' for text in coming)]
    if entry.is_local_file:
        chips.append(f'<span class="chip">{translate("your own file")}</span>')
    chips.append(f'<span class="chip">{format_size(entry.total_bytes)}</span>')
    licence = entry.checkpoint.licence
    # That of a user's own file is not the one of the checkpoint that it resembles.
    linked = fields.link(entry.checkpoint.licence_url, licence)
    if entry.is_local_file:
        linked = translate("licence: {name}", name=escape(licence))
    chips.append(f'<span class="chip">{linked}</span>')
    return chips + ([f'<span class="chip">{translate("gated")}</span>'] if entry.licence_urls else [])


def _shares(entry: CheckpointStatus) -> str:
    shared = []
    for part in entry.shared:
        few = len(part.others) < COUNT_OTHERS_FROM
        labels = translate(" and ").join(other.label for other in part.others)
        names = labels if few else translate("{count} others", count=len(part.others))
        shared.append(translate("the {part} with {names}", part=translate_message(part.kind), names=names))
    return translate("Shares {parts}.", parts=translate(", and ").join(shared))


def _progress(entry: CheckpointStatus) -> str:
    text = f"{format_size(entry.bytes_on_disk + entry.remaining_bytes, entry.bytes_on_disk)}"
    if entry.bytes_per_second:
        text += f" · {entry.bytes_per_second / MB:.1f} MB/s"
    if entry.seconds_left is not None:
        text += f" · {render.time_left(entry.seconds_left)}"
    doing = f'<p class="doing">{escape(translate_message(entry.activity))}</p>' if entry.activity else ""
    label = translate("Downloaded of {label}", label=entry.checkpoint.label)
    return (
        f'<div class="progress"><progress max="1" value="{entry.fraction:.4f}" aria-label="{escape(label)}"></progress>'
        f'<p class="bytes">{text}</p>{doing}</div>'
    )


def _question(entry: CheckpointStatus) -> str:
    label, room = entry.checkpoint.label, format_size(entry.removable_bytes)
    text = translate("Delete what was downloaded of {label}? {amount} become free.", label=label, amount=room)
    return render.notes([f"{text} {translate('Your own file stays.')}" if entry.is_local_file else text])


def _room(library: CheckpointLibrary, may_change: bool) -> str:
    if not may_change:  # nor is it a visitor's business where this machine keeps its files
        download, remove = (f"<code>flux2-studio models {act} NAME</code>" for act in ("download", "remove"))
        return f"<p>{translate(READ_ONLY_NOTE, download=download, remove=remove)}</p>"
    folder, free = library.free_space()
    where = f"<code>{escape(folder)}</code>"
    amount = format_size(free)
    return f"<p>{translate('Downloads go to {folder}, where {amount} are free.', folder=where, amount=amount)}</p>"


def _others(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(translate_message(sentence))}</li>" for sentence in sentences)
    return f"<h2 data-i18n>Other files in your folder</h2><ul>{items}</ul>"
