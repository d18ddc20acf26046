"""The Models tab: every checkpoint as a card, with its download and its deletion, which `models/hub/library.py` does.

The page looks at the shelf when the tab is opened, after every click, and once a second as long as something moves;
nobody waits for a download. Every text that may come from a file or from the hub is escaped here or in `show`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import gradio as gr

from flux2_studio.checkpoints import MB, Checkpoint
from flux2_studio.errors import StudioError
from flux2_studio.models.hub.hub_errors import amount
from flux2_studio.models.hub.library import Entry, Shelf
from flux2_studio.ui.forms import fields
from flux2_studio.ui.gradio_compat.language import say, t, told
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import show

Needs = Callable[[Checkpoint], str]  # what a checkpoint asks of this machine's memory, as a sentence

TICK = 1.0  # seconds between two looks at what moves
MANY = 3  # from here on, how many others share a part says more than their names
CHIPS = {"downloading": "downloading", "paused": "paused", "failed": "not downloaded"}
NOT_HERE = (
    "Downloads and deletions are for whoever runs this studio: on its machine, {download} fetches a checkpoint, and "
    "{remove} deletes it."
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """One checkpoint. The first word of the label of `act` is what it does."""

    name: str
    about: gr.HTML
    act: gr.Button
    delete: gr.Button
    confirm: gr.Column
    question: gr.HTML
    really: gr.Button
    keep: gr.Button
    told: gr.HTML  # what the last deletion did


@dataclass(frozen=True, kw_only=True)
class ModelsTab:
    tab: gr.Tab
    room: gr.HTML
    cards: tuple[Card, ...]
    may_change: bool


def layout(shelf: Shelf, needs: Needs, *, may_change: bool) -> ModelsTab:
    """The tab and its cards. Where `may_change` is false nothing can be downloaded or deleted here."""
    with gr.Tab(t("Models"), id="models", elem_id="models") as tab:
        room = gr.HTML(_room(shelf, may_change), elem_id="room")
        with gr.Column(elem_id="shelf"):
            cards = tuple(_card(entry, shelf, needs, may_change) for entry in shelf.entries())
        if shelf.others:
            gr.HTML(_others(shelf.others), elem_id="others")
    return ModelsTab(tab=tab, room=room, cards=cards, may_change=may_change)


def wire(models: ModelsTab, shelf: Shelf, needs: Needs, *, chosen: gr.Dropdown, about: gr.HTML) -> None:
    """Connect the tab. `chosen` is the page's checkpoint choice, `about` what it says of the chosen one."""
    timer = gr.Timer(TICK, active=False)  # outside the tab, for what is in one lives only once it has been opened

    def look(name: str) -> Update:
        entries = shelf.entries()
        by_name = {entry.checkpoint.name: entry for entry in entries}
        update: Update = {
            models.room: _room(shelf, models.may_change),
            timer: gr.Timer(active=any(entry.state == "downloading" or entry.on_its_way for entry in entries)),
            about: fields.about(by_name[name].checkpoint, by_name[name].state == "complete"),
        }
        for card in models.cards:
            entry = by_name[card.name]
            update |= {card.about: describe(entry, needs(entry.checkpoint))}
            update |= {card.act: _act(entry, models.may_change), card.delete: _delete(entry, models.may_change)}
        return update

    shown = [models.room, timer, about]
    shown += [component for card in models.cards for component in (card.about, card.act, card.delete)]
    listen([models.tab.select, timer.tick], look, chosen, shown, queue=False)
    # When the page is opened too, and at every choice: a download may be on its way since.
    listen(None, look, chosen, shown, queue=False)
    if models.may_change:
        for card in models.cards:
            _wire_card(card, shelf, look, chosen, shown)


def _wire_card(
    card: Card,
    shelf: Shelf,
    look: Callable[[str], Update],
    chosen: gr.Dropdown,
    shown: Sequence[gr.components.Component],
) -> None:
    def act(label: str, name: str) -> Update:
        # What the button said is what is done, whatever has become of the checkpoint meanwhile.
        if label == say("Pause"):
            shelf.pause(card.name)
        else:
            shelf.download(card.name)
        return {card.told: "", card.confirm: gr.Column(visible=False), **look(name)}

    def ask() -> Update:
        return {card.question: _question(shelf.entry(card.name)), card.confirm: gr.Column(visible=True), card.told: ""}

    def delete(name: str) -> Update:
        try:
            told = show.notes([shelf.remove(card.name)])
        except StudioError as error:
            told = show.problem(str(error))
        return {card.told: told, card.confirm: gr.Column(visible=False), **look(name)}

    listen(card.act.click, act, [card.act, chosen], [card.told, card.confirm, *shown], queue=False)
    listen(card.delete.click, ask, None, [card.question, card.confirm, card.told], queue=False)
    listen(card.keep.click, lambda: gr.Column(visible=False), None, card.confirm, queue=False)
    listen(card.really.click, delete, chosen, [card.told, card.confirm, *shown], queue=False)


# --- how it looks -----------------------------------------------------------------------------------------------


def _card(entry: Entry, shelf: Shelf, needs: Needs, may_change: bool) -> Card:
    with gr.Column(elem_classes="model", elem_id=f"model-{shelf.checkpoints.index(entry.checkpoint)}"):
        about = gr.HTML(describe(entry, needs(entry.checkpoint)))
        told = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="acts"):
            act = _act(entry, may_change)
            delete = _delete(entry, may_change)
        with gr.Column(visible=False, elem_classes="confirm") as confirm:
            question = gr.HTML()
            with gr.Row(elem_classes="acts"):
                really = gr.Button(t("Delete"), variant="stop", size="sm", min_width=100)
                keep = gr.Button(t("Keep"), size="sm", min_width=100)
    return Card(
        name=entry.checkpoint.name,
        about=about,
        act=act,
        delete=delete,
        confirm=confirm,
        question=question,
        really=really,
        keep=keep,
        told=told,
    )


def _act(entry: Entry, may_change: bool) -> gr.Button:
    """Download, Pause or Resume: gone where there is nothing to fetch."""
    to_come = amount(entry.to_come)
    label = {"downloading": say("Pause"), "paused": say("Resume, {amount} left", amount=to_come)}.get(
        entry.state, say("Download {amount}", amount=to_come)
    )
    visible = may_change and (entry.to_come > 0 or entry.state == "downloading")
    return gr.Button(
        label,
        variant="secondary" if entry.state == "downloading" else "primary",
        size="sm",
        visible=visible,
        min_width=100,
        elem_classes="act",
    )


def _delete(entry: Entry, may_change: bool) -> gr.Button:
    visible = may_change and entry.state != "downloading" and (entry.removable > 0 or entry.state == "paused")
    return gr.Button(t("Delete…"), size="sm", visible=visible, min_width=100, elem_classes="delete")


def describe(entry: Entry, needs: str) -> str:
    """All that a card says, as HTML."""
    checkpoint = entry.checkpoint
    lines = [
        f"<h2>{escape(told(checkpoint.label))}</h2>",
        f'<p class="facts">{"".join(_chips(entry))}</p>',
        f"<p>{escape(told(checkpoint.good_for))}</p>",
    ]
    if needs:
        lines.append(f'<p class="needs">{escape(told(needs))}</p>')
    if entry.shared and not entry.on_board:
        lines.append(f'<p class="shares">{escape(_shares(entry))}</p>')
    if entry.pages and entry.to_come and not entry.failure:
        lines.append(fields.gate([fields.link(page, page.split("/", 3)[-1]) for page in entry.pages]))
    if entry.state in ("downloading", "paused") or (entry.state == "failed" and entry.here):
        lines.append(_progress(entry))
    if entry.failure and entry.state != "downloading":
        lines.append(show.problem(entry.failure))
    return "".join(lines)


def _chips(entry: Entry) -> list[str]:
    if entry.state == "complete":
        first = f'<span class="chip here">{say("on board") if entry.on_board else say("on disk")}</span>'
    else:
        first = f'<span class="chip {entry.state}">{say(CHIPS.get(entry.state, "not on disk"))}</span>'
    coming = [say("{part} on its way", part=told(kind)) for kind in entry.on_its_way]
    chips = [first, *(f'<span class="chip">{text}</span>' for text in coming)]
    if entry.own:
        chips.append(f'<span class="chip">{say("your own file")}</span>')
    chips.append(f'<span class="chip">{amount(entry.size)}</span>')
    licence = entry.checkpoint.licence
    # That of a user's own file is not the one of the checkpoint that it resembles.
    linked = fields.link(entry.checkpoint.licence_url, licence)
    if entry.own:
        linked = say("licence: {name}", name=escape(licence))
    chips.append(f'<span class="chip">{linked}</span>')
    return chips + ([f'<span class="chip">{say("gated")}</span>'] if entry.pages else [])


def _shares(entry: Entry) -> str:
    shared = []
    for part in entry.shared:
        few = len(part.others) < MANY
        labels = say(" and ").join(other.label for other in part.others)
        names = labels if few else say("{count} others", count=len(part.others))
        shared.append(say("the {part} with {names}", part=told(part.kind), names=names))
    return say("Shares {parts}.", parts=say(", and ").join(shared))


def _progress(entry: Entry) -> str:
    text = f"{amount(entry.here + entry.to_come, entry.here)}"
    if entry.per_second:
        text += f" · {entry.per_second / MB:.1f} MB/s"
    if entry.seconds_left is not None:
        text += f" · {show.left(entry.seconds_left)}"
    doing = f'<p class="doing">{escape(told(entry.doing))}</p>' if entry.doing else ""
    label = say("Downloaded of {label}", label=entry.checkpoint.label)
    return (
        f'<div class="progress"><progress max="1" value="{entry.fraction:.4f}" aria-label="{escape(label)}"></progress>'
        f'<p class="bytes">{text}</p>{doing}</div>'
    )


def _question(entry: Entry) -> str:
    label, room = entry.checkpoint.label, amount(entry.removable)
    text = say("Delete what was downloaded of {label}? {amount} become free.", label=label, amount=room)
    return show.notes([f"{text} {say('Your own file stays.')}" if entry.own else text])


def _room(shelf: Shelf, may_change: bool) -> str:
    if not may_change:  # nor is it a visitor's business where this machine keeps its files
        download, remove = (f"<code>flux2-studio models {act} NAME</code>" for act in ("download", "remove"))
        return f"<p>{say(NOT_HERE, download=download, remove=remove)}</p>"
    folder, free = shelf.room()
    where = f"<code>{escape(folder)}</code>"
    return f"<p>{say('Downloads go to {folder}, where {amount} are free.', folder=where, amount=amount(free))}</p>"


def _others(sentences: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(told(sentence))}</li>" for sentence in sentences)
    return f"<h2 data-i18n>Other files in your folder</h2><ul>{items}</ul>"
