"""What a picture of the history is compared with, and for whom."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from gradio.routes import App
from PIL import Image
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Saved
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.thumbnails import ThumbnailCache
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.record import Record
from flux2_studio.request import Outpaint, Request
from flux2_studio.settings import Settings
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import History
from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, VisitorCookieMiddleware
from flux2_studio.ui.history.original import OriginalLoader
from flux2_studio.ui.history.routes import HistoryRoutes

MINE, YOURS = "m" * 43, "y" * 43
ME, YOU = f"browser:{MINE}", f"browser:{YOURS}"
TEAL, RED = (0, 128, 128), (200, 0, 0)

Add = Callable[..., str]


@pytest.fixture
def history(tmp_path: Path) -> History:
    return History(Database(tmp_path / "db"), tmp_path / "outputs", tmp_path / "trash")


@pytest.fixture
def kept(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "references")


@pytest.fixture
def add(history: History, tmp_path: Path) -> Add:
    """Puts a picture into the history; returns its id."""

    def add(colour: tuple[int, int, int], owner: str = ME, size: tuple[int, int] = (64, 64), **more: Any) -> str:
        asked = {"outpaint": more.pop("outpaint", Outpaint()), "checkpoint": more.pop("checkpoint", "nano")}
        request = Request(
            prompt="a fox", width=size[0], height=size[1], seed=3, steps=4, guidance=1.0, negative_prompt="", **asked
        )
        record = Record(request=request, label=NANO.label, **more)
        path = tmp_path / "outputs" / f"{len(list(tmp_path.rglob('*.png')))}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(Image.new("RGB", size, colour), "png", record).data)
        return history.add(owner, "job", Saved(index=0, image=path, seed=3, record=record))

    return add


@pytest.fixture
def client(history: History, kept: ReferenceStore, tmp_path: Path) -> Callable[..., TestClient]:
    def client(token: str, *, references: ReferenceStore | None = kept) -> TestClient:
        befores = OriginalLoader(history, references, Settings(home=tmp_path).checkpoint, PictureCache())
        routes = HistoryRoutes(history, ThumbnailCache(tmp_path / "thumbnails"), references, befores).routes()
        with gr.Blocks() as page:
            gr.Textbox()
        app = App.create_app(page, app_kwargs={"middleware": [Middleware(VisitorCookieMiddleware)], "routes": routes})
        return TestClient(app, cookies={VISITOR_COOKIE: token})

    return client


def sha256_of(history: History, id_: str, owner: str = ME) -> str:
    file = history.find_file(owner, id_)
    assert file is not None
    return hashlib.sha256(file.read_bytes()).hexdigest()


def shown(client: TestClient, id_: str) -> Image.Image:
    assert client.get(f"/history/entry/{id_}").json()["before"] is True
    answer = client.get(f"/history/before/{id_}")
    assert answer.status_code == 200 and answer.headers["content-type"] == "image/png"
    return Image.open(io.BytesIO(answer.content))


def expect_none(client: TestClient, id_: str) -> None:
    assert client.get(f"/history/entry/{id_}").json()["before"] is False
    assert client.get(f"/history/before/{id_}").status_code == 404


def test_an_edit_has_the_picture_that_it_was_made_from(
    history: History, add: Add, client: Callable[..., TestClient]
) -> None:
    first = add(TEAL)
    edit = add(RED, references=(sha256_of(history, first),))
    mine = client(MINE)
    assert shown(mine, edit).getpixel((5, 5)) == TEAL
    expect_none(mine, first)
    foreign = client(YOURS)
    assert foreign.get(f"/history/before/{edit}").status_code == 404
    assert foreign.get(f"/history/entry/{edit}").status_code == 404


def test_it_lies_where_it_was_when_the_picture_grew(
    history: History, add: Add, client: Callable[..., TestClient]
) -> None:
    source = sha256_of(history, add(TEAL))
    grown = add(RED, size=(96, 64), references=(source,), outpaint=Outpaint(left=32))
    before = shown(client(MINE), grown)
    assert before.size == (96, 64) and before.getpixel((60, 30)) == TEAL and before.getpixel((5, 5)) != TEAL


def test_references_from_outside_are_shown_only_where_they_are_kept(
    kept: ReferenceStore, add: Add, client: Callable[..., TestClient]
) -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 64), TEAL).save(out, "PNG")
    kept.save(out.getvalue())
    edit = add(RED, references=(hashlib.sha256(out.getvalue()).hexdigest(),))
    assert shown(client(MINE), edit).getpixel((5, 5)) == TEAL
    expect_none(client(MINE, references=None), edit)


def test_anothers_picture_of_the_same_hash_is_none(
    history: History, add: Add, client: Callable[..., TestClient]
) -> None:
    edit = add(RED, references=(sha256_of(history, add(TEAL, YOU), YOU),))
    expect_none(client(MINE), edit)


def test_what_went_into_a_combination_is_no_before(
    history: History, add: Add, client: Callable[..., TestClient]
) -> None:
    one, two = sha256_of(history, add(TEAL)), sha256_of(history, add(RED))
    expect_none(client(MINE), add(RED, references=(one, two)))
    assert shown(client(MINE), add(RED, references=(one, two), mask="0" * 64)).getpixel((5, 5)) == TEAL


def test_a_checkpoint_that_is_gone_leaves_nothing_to_compare(
    history: History, add: Add, client: Callable[..., TestClient]
) -> None:
    edit = add(RED, references=(sha256_of(history, add(TEAL)),), checkpoint="my-own")
    assert client(MINE).get(f"/history/before/{edit}").status_code == 404
