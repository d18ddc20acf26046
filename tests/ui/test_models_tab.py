"""The Models tab without a browser: what a card says, which buttons it has, and what they do to the shelf."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from flux2_studio.checkpoints import DEV, GB, KLEIN_4B, KLEIN_BASE_4B, MB, NANO, Checkpoint
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.library import CheckpointState, CheckpointStatus, SharedPart
from flux2_studio.settings import Settings
from flux2_studio.ui import models_tab
from flux2_studio.ui.app import for_guests
from flux2_studio.ui.forms import fields

HOSTILE = '<img src=x onerror="alert(1)">'


def entry(checkpoint: Checkpoint = KLEIN_4B, state: CheckpointState = "absent", **changes: Any) -> CheckpointStatus:
    given: dict[str, Any] = {
        "total_bytes": 16 * GB,
        "bytes_on_disk": 0,
        "remaining_bytes": 16 * GB,
        "removable_bytes": 0,
        "is_bundled": checkpoint.is_toy,
        "is_local_file": False,
        "shared": (),
        "licence_urls": (),
        **changes,
    }
    return CheckpointStatus(checkpoint=checkpoint, state=state, **given)


class Shelf:
    """Shows the entries that it was given, and remembers what it was told to do."""

    def __init__(self, *entries: CheckpointStatus, others: tuple[str, ...] = ()) -> None:
        self.local_file_problems = others
        self.checkpoints = tuple(entry.checkpoint for entry in entries)
        self.now = {entry.checkpoint.name: entry for entry in entries}
        self.asked: list[str] = []
        self.refusal = ""

    def list_statuses(self) -> list[CheckpointStatus]:
        return list(self.now.values())

    def get_status(self, name: str) -> CheckpointStatus:
        return self.now[name]

    def free_space(self) -> tuple[str, int]:
        return f"/cache/{HOSTILE}", 120 * GB

    def download(self, name: str) -> None:
        self.asked.append(f"download {name}")
        self.now[name] = replace(self.now[name], state="downloading", activity="Starting")

    def pause(self, name: str) -> None:
        self.asked.append(f"pause {name}")
        self.now[name] = replace(self.now[name], state="paused")

    def remove(self, name: str) -> str:
        self.asked.append(f"remove {name}")
        if self.refusal:
            raise WeightsError(self.refusal)
        self.now[name] = replace(self.now[name], state="absent", removable_bytes=0, bytes_on_disk=0)
        return "7.8 GB freed."


class Tab:
    """The tab laid out and wired in a page of its own, and its events as functions."""

    def __init__(
        self, shelf: Shelf, may_change: bool = True, needs: models_tab.DescribeMemoryNeeds = lambda _: ""
    ) -> None:
        with gr.Blocks() as self.page:
            chosen = fields.checkpoint(shelf.checkpoints, shelf.checkpoints[0].name)
            self.about = gr.HTML()
            with gr.Tabs():
                self.tab = models_tab.build_models_tab(shelf, needs, may_change=may_change)  # type: ignore[arg-type]
            models_tab.wire_models_tab(self.tab, shelf, needs, checkpoint_dropdown=chosen, about=self.about)  # type: ignore[arg-type]
        (self.timer,) = [block for block in self.page.blocks.values() if isinstance(block, gr.Timer)]

    def card(self, name: str) -> models_tab.CheckpointCard:
        return next(card for card in self.tab.cards if card.name == name)

    def on(self, component: gr.Button | gr.Timer | gr.Tab, event: str) -> Callable[..., dict[Any, Any]]:
        """What happens on `event`."""
        (found,) = [fn for fn in self.page.fns.values() if (component._id, event) in fn.targets]
        assert found.fn is not None
        return found.fn


def said(entry: CheckpointStatus, needs: str = "") -> str:
    """What a card says, without its tags."""
    return " ".join(re.sub(r"<[^>]+>", " ", models_tab.checkpoint_card_html(entry, needs)).split())


# --- what a card says ---------------------------------------------------------------------------------------------


def test_a_card_says_what_a_checkpoint_is_and_takes() -> None:
    shared = (
        SharedPart(kind="text encoder", others=(KLEIN_BASE_4B,)),
        SharedPart(kind="autoencoder", others=(NANO, KLEIN_BASE_4B, DEV)),
    )
    text = said(entry(shared=shared), "Needs 8 GB on this card.")
    assert text.startswith(f"{KLEIN_4B.label} not on disk 16.0 GB Apache 2.0 {KLEIN_4B.good_for}")
    assert "Needs 8 GB on this card." in text
    assert "Shares the text encoder with FLUX.2 klein Base 4B, and the autoencoder with 3 others." in text
    assert "<progress" not in models_tab.checkpoint_card_html(
        entry(), ""
    ) and 'class="needs"' not in models_tab.checkpoint_card_html(entry(), "")
    assert KLEIN_4B.licence_url in models_tab.checkpoint_card_html(entry(), "")


@pytest.mark.parametrize(
    ("state", "changes", "chip"),
    [
        ("complete", {"is_bundled": True}, "on board"),
        ("complete", {"remaining_bytes": 0}, "on disk"),
        ("absent", {"fetching_kinds": ("transformer",)}, "not on disk transformer on its way"),
        ("downloading", {}, "downloading"),
        ("paused", {}, "paused"),
        ("failed", {}, "not downloaded"),
        ("complete", {"is_local_file": True}, "on disk your own file"),
    ],
)
def test_chips(state: CheckpointState, changes: dict[str, Any], chip: str) -> None:
    assert said(entry(state=state, **changes)).startswith(f"{KLEIN_4B.label} {chip} 16.0 GB")


def test_progress_in_bytes_speed_and_time_left() -> None:
    half: dict[str, Any] = {"bytes_on_disk": 4 * GB, "remaining_bytes": 12 * GB, "activity": "Downloading text encoder"}
    html = models_tab.checkpoint_card_html(entry(state="downloading", bytes_per_second=50.0 * MB, **half), "")
    assert 'value="0.2500"' in html
    text = said(entry(state="downloading", bytes_per_second=50.0 * MB, **half))
    assert "4.0 of 16.0 GB · 50.0 MB/s · 4 min 0 s left Downloading text encoder" in text
    assert said(entry(state="downloading", **half)).endswith("4.0 of 16.0 GB Downloading text encoder")
    assert said(entry(state="paused", bytes_on_disk=4 * GB, remaining_bytes=12 * GB)).endswith("4.0 of 16.0 GB")
    assert "of 16.0 GB" not in said(
        entry(bytes_on_disk=8 * GB, remaining_bytes=8 * GB)
    )  # a shared part is no download of its own


def test_a_gate_says_where_to_accept_the_licence() -> None:
    pages = ("https://hub.example/maker/Gated",)
    html = models_tab.checkpoint_card_html(entry(licence_urls=pages), "")
    assert 'href="https://hub.example/maker/Gated"' in html and ">maker/Gated</a>" in html and "HF_TOKEN" in html
    assert "HF_TOKEN" not in models_tab.checkpoint_card_html(
        entry(state="complete", remaining_bytes=0, licence_urls=pages), ""
    )
    refused = models_tab.checkpoint_card_html(
        entry(state="failed", licence_urls=pages, failure=f"Sign in at {pages[0]}, then try."), ""
    )
    assert 'role="alert"' in refused and refused.count(f'href="{pages[0]}"') == 1
    assert "Sign in at" not in models_tab.checkpoint_card_html(entry(state="downloading", failure="Sign in at"), "")


def test_no_text_becomes_html() -> None:
    named = replace(KLEIN_4B, label=HOSTILE, good_for=HOSTILE, licence=HOSTILE, licence_url=f'https://x/"{HOSTILE}')
    shared = (SharedPart(kind="text encoder", others=(named,)),)
    for state in ("absent", "downloading", "failed", "paused"):
        for own in (True, False):
            bad = entry(
                named,
                state,
                activity=HOSTILE,
                failure=f"https://{HOSTILE}",
                licence_urls=(HOSTILE,),
                shared=shared,
                is_local_file=own,
            )
            html = models_tab.checkpoint_card_html(bad, HOSTILE)
            assert "<img" not in html and "&lt;img" in html
            assert not re.search(r'<[^>]*onerror="', html)
    tab = Tab(Shelf(entry(named), others=(HOSTILE,)))
    drawn = [str(block.value) for block in tab.page.blocks.values() if isinstance(block, gr.HTML) and block.value]
    assert any("&lt;img" in html for html in drawn) and not any("<img" in html for html in drawn)


# --- which buttons there are --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("state", "changes", "act", "delete"),
    [
        ("absent", {}, "Download 16.0 GB", False),
        ("absent", {"remaining_bytes": 8 * GB, "bytes_on_disk": 8 * GB}, "Download 8.0 GB", False),
        ("downloading", {"removable_bytes": GB}, "Pause", False),
        ("paused", {"remaining_bytes": 9 * GB, "removable_bytes": 7 * GB}, "Resume, 9.0 GB left", True),
        ("paused", {}, "Resume, 16.0 GB left", True),  # or it could not be called off
        ("failed", {"removable_bytes": GB}, "Download 16.0 GB", True),
        ("complete", {"remaining_bytes": 0, "removable_bytes": GB}, None, True),
        ("complete", {"remaining_bytes": 0}, None, False),
    ],
)
def test_buttons(state: CheckpointState, changes: dict[str, Any], act: str | None, delete: bool) -> None:
    card = Tab(Shelf(entry(state=state, **changes))).card(KLEIN_4B.name)
    assert (card.transfer.value if card.transfer.visible else None) == act
    assert card.delete.visible is delete and card.confirmation.visible is False


def test_guests_can_change_nothing() -> None:
    tab = Tab(Shelf(entry(removable_bytes=GB), entry(DEV, "paused", removable_bytes=GB)), may_change=False)
    assert not any(card.transfer.visible or card.delete.visible for card in tab.tab.cards)
    # Hidden buttons would not do: whoever knows the page could still send their clicks.
    assert not [target for fn in tab.page.fns.values() for target in fn.targets if target[1] == "click"]
    assert "models download" in tab.tab.room.value and "/cache" not in tab.tab.room.value


@pytest.mark.parametrize(("on_space", "share"), [(False, False), (True, False), (False, True)])
def test_who_comes_to_a_space_or_through_a_public_link_is_a_guest(tmp_path: Path, on_space: bool, share: bool) -> None:
    assert for_guests(Settings(home=tmp_path, on_space=on_space), share) is (on_space or share)


# --- what they do -------------------------------------------------------------------------------------------------


def test_the_button_does_what_it_says() -> None:
    shelf = Shelf(entry(), entry(DEV))
    tab = Tab(shelf)
    card = tab.card("dev")
    act = tab.on(card.transfer, "click")
    update = act(card.transfer.value, KLEIN_4B.name)
    assert shelf.asked == ["download dev"]
    assert update[card.transfer].value == "Pause" and update[tab.timer].active is True
    act("Download 16.0 GB", KLEIN_4B.name)  # from a page that has not heard of it yet
    act("Pause", KLEIN_4B.name)
    update = act("Resume, 16.0 GB left", KLEIN_4B.name)
    assert shelf.asked[1:] == ["download dev", "pause dev", "download dev"]
    assert set(update) >= {tab.about, *(it for one in tab.tab.cards for it in (one.about, one.transfer, one.delete))}


def test_deleting_asks_first_and_says_what_it_did() -> None:
    shelf = Shelf(entry(state="complete", remaining_bytes=0, bytes_on_disk=16 * GB, removable_bytes=8 * GB), entry(DEV))
    tab = Tab(shelf)
    card = tab.card(KLEIN_4B.name)
    asked = tab.on(card.delete, "click")()
    assert asked[card.confirmation].visible is True and "8.0 GB become free" in asked[card.question]
    assert shelf.asked == []
    kept: Any = tab.on(card.cancel_delete, "click")()
    assert kept.visible is False and shelf.asked == []
    done = tab.on(card.confirm_delete, "click")("dev")
    assert shelf.asked == [f"remove {KLEIN_4B.name}"]
    assert done[card.outcome] == "<p>7.8 GB freed.</p>" and done[card.confirmation].visible is False
    assert done[card.delete].visible is False
    shelf.refusal = f"Cannot be deleted: {HOSTILE}"
    done = tab.on(card.confirm_delete, "click")("dev")
    assert 'role="alert"' in done[card.outcome] and "<img" not in done[card.outcome]


def test_an_own_file_is_said_to_stay() -> None:
    shelf = Shelf(entry(state="complete", remaining_bytes=0, removable_bytes=GB, is_local_file=True))
    tab = Tab(shelf)
    card = tab.card(KLEIN_4B.name)
    assert "Your own file stays." in tab.on(card.delete, "click")()[card.question]


def test_the_page_looks_only_while_something_moves() -> None:
    shelf = Shelf(entry(), entry(DEV))
    tab = Tab(shelf)
    look = tab.on(tab.timer, "tick")
    assert tab.timer.active is False and look("dev")[tab.timer].active is False
    shelf.now["dev"] = entry(DEV, fetching_kinds=("text encoder",))  # for a run
    assert look("dev")[tab.timer].active is True
    shelf.now["dev"] = entry(DEV, "downloading")
    assert look("dev")[tab.timer].active is True
    assert "first run downloads" in look("dev")[tab.about]
    shelf.now["dev"] = entry(DEV, "complete", remaining_bytes=0)
    update = look("dev")
    assert update[tab.timer].active is False and "on disk" in update[tab.about]
    assert tab.on(tab.tab.tab, "select") == look
    assert all(fn.queue is False for fn in tab.page.fns.values())  # nothing here waits in line behind a run


def test_needs_is_asked_for_every_checkpoint() -> None:
    tab = Tab(Shelf(entry(), entry(DEV)), needs=lambda checkpoint: f"{checkpoint.name} fits <well>")
    assert [f"{card.name} fits &lt;well&gt;" in card.about.value for card in tab.tab.cards] == [True, True]
