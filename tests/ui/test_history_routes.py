"""What the History tab fetches, asked for by owners, by others, and by those who mean harm."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gradio as gr
import pytest
from gradio.routes import App
from PIL import Image
from starlette.middleware import Middleware
from starlette.testclient import TestClient

from flux2_studio.checkpoints import NANO
from flux2_studio.events import Saved
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.thumbnails import ThumbnailCache
from flux2_studio.provenance.metadata import encode_picture
from flux2_studio.record import Record
from flux2_studio.request import Request
from flux2_studio.storage.database import Database
from flux2_studio.storage.history import MAX_PICTURES_PER_CALL, History
from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, VisitorCookieMiddleware
from flux2_studio.ui.history.routes import MAX_JSON_BYTES, HistoryRoutes

MINE, YOURS = "m" * 43, "y" * 43
ME, YOU = f"browser:{MINE}", f"browser:{YOURS}"
SITE = {"Sec-Fetch-Site": "same-origin"}
HOSTILE = "<img src=x onerror='alert(1)'>\"</script>\r\nSet-Cookie: a=b"


class Studio:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.kept = ReferenceStore(home / "references")
        thumbnails = ThumbnailCache(home / "thumbnails")
        self.history = History(Database(home / "db"), home / "outputs", home / "trash", on_delete=thumbnails.delete)
        routes = HistoryRoutes(self.history, thumbnails, self.kept).routes()
        with gr.Blocks() as page:
            gr.Textbox()
        self.app = App.create_app(
            page, app_kwargs={"middleware": [Middleware(VisitorCookieMiddleware)], "routes": routes}
        )

    def client(self, token: str | None = None) -> TestClient:
        return TestClient(self.app, cookies={VISITOR_COOKIE: token} if token else {})

    def add(self, prompt: str = "a fox", owner: str = ME, *, references: tuple[str, ...] = (), **more: object) -> str:
        request = Request(prompt=prompt, width=64, height=64, seed=3).resolve(NANO)
        record = replace(Record(request=request, label=NANO.label, references=references), **more)  # type: ignore[arg-type]
        path = self.home / "outputs" / f"{len(list(self.home.rglob('*.png')))}-secret.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_picture(Image.new("RGB", (64, 64), "teal"), "png", record).data)
        return self.history.add(owner, "job", Saved(index=0, image=path, seed=3, record=record))


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    """One for all tests: Gradio's app takes its time."""
    return Studio(tmp_path_factory.mktemp("home"))


@pytest.fixture
def studio(opened: Studio) -> Iterator[Studio]:
    yield opened
    opened.app.auth = None
    for owner in (ME, YOU, "user:ann"):
        opened.history.delete(owner, [it.id for it in opened.history.page(owner).entries])
        opened.history.empty_trash(owner)


@pytest.fixture
def mine(studio: Studio) -> TestClient:
    return studio.client(MINE)


def test_the_routes_come_before_gradios_own(studio: Studio, mine: TestClient) -> None:
    id_ = studio.add()
    page = mine.get("/history/page").json()
    assert [it["id"] for it in page["entries"]] == [id_] and page["count"] == page["all"] == 1 and page["more"] is None
    assert page["checkpoints"] == [{"name": "nano", "label": NANO.label}]


def test_a_picture_is_the_very_file_with_headers_that_keep_it_private(studio: Studio, mine: TestClient) -> None:
    id_ = studio.add()
    path = studio.history.find_file(ME, id_)
    assert path is not None
    answer = mine.get(f"/history/picture/{id_}", headers={"Accept-Encoding": "br, gzip"})
    assert answer.status_code == 200 and answer.content == path.read_bytes()
    headers = answer.headers
    assert headers["content-type"] == "image/png" and headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"].startswith("private") and headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["content-disposition"].startswith("inline")
    disposition = mine.get(f"/history/picture/{id_}?download=1").headers["content-disposition"]
    assert disposition.startswith('attachment; filename="20') and disposition.endswith('-nano-3.png"')
    assert "secret" not in disposition
    thumbnail = mine.get(f"/history/thumbnail/{id_}")
    assert thumbnail.headers["content-type"] == "image/webp" and thumbnail.headers["cache-control"].startswith(
        "private"
    )
    assert Image.open(io.BytesIO(thumbnail.content)).size == (64, 64)


PATHS = ("picture", "thumbnail", "entry")


def test_an_unknown_id_and_a_foreign_one_look_the_same(studio: Studio) -> None:
    id_ = studio.add(references=("ab" * 32,))
    you, nobody = studio.client(YOURS), studio.client()
    for client in (you, nobody):
        for path in PATHS:
            foreign, unknown = client.get(f"/history/{path}/{id_}"), client.get(f"/history/{path}/{'0' * 32}")
            assert (foreign.status_code, foreign.text) == (unknown.status_code, unknown.text)
            assert foreign.status_code == 404 and foreign.headers == unknown.headers
        assert client.get(f"/history/source/{id_}/0").status_code == 404
        assert client.get(f"/history/zip?ids={id_}").status_code == 404
        for change in ("favourite", "delete", "restore"):
            sent = {"ids": [id_], "on": True}
            assert client.post(f"/history/{change}", json=sent, headers=SITE).status_code == 404
    assert you.get("/history/page").json()["entries"] == []
    assert nobody.get("/history/page").status_code == 404
    (entry,) = studio.history.page(ME).entries
    assert not entry.favourite and not entry.missing


@pytest.mark.parametrize(
    "guess",
    ["..%2f..%2f..%2fetc%2fpasswd", "../../db", "%00", "' OR '1'='1", "%25", "A" * 32, "x" * 5000, "0" * 31 + "%0a"],
)
def test_nothing_else_is_an_id(studio: Studio, mine: TestClient, guess: str) -> None:
    studio.add()
    for path in PATHS:
        assert mine.get(f"/history/{path}/{guess}").status_code == 404


@pytest.mark.parametrize("token", ["", "short", "m" * 65, "m" * 42 + "!", "../../x", "user:you"])
def test_a_cookie_that_was_never_given_is_nobodys(studio: Studio, token: str) -> None:
    studio.add()
    client = TestClient(studio.app, headers={"Cookie": f"{VISITOR_COOKIE}={token}"})
    assert client.get("/history/page").status_code == 404


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "http://testserver"}, 200),
        ({}, 403),
        ({"Sec-Fetch-Site": "none"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://testserver"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://testserver.evil.example"}, 403),
    ],
)
def test_no_other_site_changes_anything(studio: Studio, mine: TestClient, headers: dict[str, str], status: int) -> None:
    id_ = studio.add()
    assert mine.post("/history/delete", json={"ids": [id_]}, headers=headers).status_code == status
    assert len(studio.history.page(ME).entries) == (0 if status == 200 else 1)


def test_no_other_site_reads_anything(studio: Studio, mine: TestClient) -> None:
    id_ = studio.add()
    for path in ("page", f"picture/{id_}", f"thumbnail/{id_}", f"entry/{id_}", f"zip?ids={id_}"):
        for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "https://evil.example"}):
            assert mine.get(f"/history/{path}", headers=headers).status_code == 403


@pytest.mark.parametrize(
    "sent, status",
    [
        ({"content": '{"ids": ["%s"]}'}, 415),
        ({"data": {"ids": "%s"}}, 415),
        ({"json": ["%s"]}, 400),
        ({"json": {"ids": "%s"}}, 400),
        ({"json": {"ids": [1]}}, 400),
        ({"json": {"ids": []}}, 400),
        ({"json": {"ids": ["0" * 32] * (MAX_PICTURES_PER_CALL + 1)}}, 400),
        ({"content": "[" * 60_000, "headers": {"Content-Type": "application/json"}}, 400),
        ({"content": "1" * (MAX_JSON_BYTES + 1), "headers": {"Content-Type": "application/json"}}, 413),
        ({"json": {"ids": ["../../db"]}}, 404),
    ],
)
def test_a_wrong_change_changes_nothing(studio: Studio, mine: TestClient, sent: dict[str, object], status: int) -> None:
    studio.add()
    given = dict(sent)
    headers = {**SITE, **given.pop("headers", {})}  # type: ignore[dict-item]
    assert mine.post("/history/delete", headers=headers, **given).status_code == status  # type: ignore[arg-type]
    assert len(studio.history.page(ME).entries) == 1
    assert mine.get("/history/delete").status_code == 405


def test_favourite_delete_undo_and_empty(studio: Studio, mine: TestClient) -> None:
    id_ = studio.add()
    ids = {"ids": [id_]}
    assert mine.post("/history/favourite", json={**ids, "on": True}, headers=SITE).status_code == 200
    assert mine.get("/history/page?favourites=1").json()["entries"][0]["favourite"]
    assert mine.post("/history/favourite", json={**ids, "on": "yes"}, headers=SITE).status_code == 400
    assert mine.post("/history/delete", json=ids, headers=SITE).json() == ids
    page = mine.get("/history/page").json()
    assert page["entries"] == [] and page["trashed"] == [id_]
    assert mine.get(f"/history/picture/{id_}").status_code == 404
    assert mine.post("/history/restore", json=ids, headers=SITE).json() == ids
    assert mine.get(f"/history/picture/{id_}").status_code == 200
    mine.post("/history/delete", json=ids, headers=SITE)
    assert mine.post("/history/empty", json={}, headers=SITE).json() == {"count": 1}
    assert mine.post("/history/restore", json=ids, headers=SITE).status_code == 404


def test_words_and_dates_and_pages(studio: Studio, mine: TestClient) -> None:
    studio.add("50% fox")
    studio.add("an owl")
    newest = mine.get("/history/page?limit=1").json()
    assert [it["prompt"] for it in newest["entries"]] == ["an owl"]
    rest = mine.get("/history/page", params={"limit": "1", "before": newest["more"]}).json()
    assert [it["prompt"] for it in rest["entries"]] == ["50% fox"] and rest["more"] is None
    assert mine.get("/history/page", params={"words": "FOX 50%"}).json()["count"] == 1
    assert mine.get("/history/page", params={"words": "5_%"}).json()["count"] == 0
    created = newest["entries"][0]["created"]
    assert mine.get(f"/history/page?since={created + 1000}").json()["count"] == 0
    assert mine.get(f"/history/page?until={created + 1000}").json()["count"] == 2
    for wrong in ("since=x", "until=-1", "limit=1e9", "before=x", "since=" + "9" * 30, "limit=²"):
        assert mine.get(f"/history/page?{wrong}").status_code == 400


def test_hostile_texts_stay_texts(studio: Studio, mine: TestClient) -> None:
    id_ = studio.add(HOSTILE, upsampled_by=None, original_prompt=HOSTILE)
    for answer in (mine.get("/history/page"), mine.get(f"/history/entry/{id_}")):
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"
    details = mine.get(f"/history/entry/{id_}").json()
    assert details["prompt"] == HOSTILE and ["Original prompt", HOSTILE] in details["rows"]
    assert "\n" not in mine.get(f"/history/picture/{id_}").headers["content-disposition"]


def test_lineage_opens_and_a_kept_reference_is_shown_small(studio: Studio, mine: TestClient) -> None:
    parent = studio.add()
    file = studio.history.find_file(ME, parent)
    assert file is not None
    out = io.BytesIO()
    Image.new("RGB", (640, 400), "gold").save(out, "GIF")
    kept = studio.kept.save(out.getvalue())
    parents = studio.kept.save(file.read_bytes())
    child = studio.add(references=(parents, kept, "cd" * 32))
    details = mine.get(f"/history/entry/{child}").json()
    first, second, third = details["madeFrom"]
    assert first["id"] == parent and second["kept"] and not third["kept"]
    assert [it["id"] for it in mine.get(f"/history/entry/{parent}").json()["madeInto"]] == [child]
    small = mine.get(f"/history/source/{second['source']}")
    assert Image.open(io.BytesIO(small.content)).size == (320, 200)
    for path in (third["source"], f"{child}/9", f"{child}/-1", f"{child}/x"):
        assert mine.get(f"/history/source/{path}").status_code == 404


def test_a_lost_or_broken_file_is_told_and_no_error(studio: Studio, mine: TestClient) -> None:
    lost, broken = studio.add(), studio.add()
    for id_, spoil in ((lost, Path.unlink), (broken, lambda path: path.write_bytes(b"<script>"))):
        path = studio.history.find_file(ME, id_)
        assert path is not None
        spoil(path)
    entries = {it["id"]: it["missing"] for it in mine.get("/history/page").json()["entries"]}
    assert entries == {lost: True, broken: False}
    for path in (f"thumbnail/{lost}", f"picture/{lost}", f"thumbnail/{broken}", f"zip?ids={lost}"):
        assert mine.get(f"/history/{path}").status_code == 410
    assert mine.get(f"/history/picture/{broken}").headers["content-type"] == "image/png"


def test_a_zip_holds_the_chosen_pictures_that_are_ones_own(studio: Studio, mine: TestClient) -> None:
    ids = [studio.add(), studio.add(), studio.add(owner=YOU), studio.add()]
    chosen = ",".join([*ids[:3], "nonsense"])
    answer = mine.get(f"/history/zip?ids={chosen}", headers={"Accept-Encoding": "br, gzip"})
    assert answer.headers["content-type"] == "application/zip"
    assert "attachment" in answer.headers["content-disposition"]
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert archive.testzip() is None
        packed = [archive.read(name) for name in archive.namelist()]
        assert all("/" not in name and "secret" not in name for name in archive.namelist())
    files = [studio.history.find_file(ME, id_) for id_ in ids[:2]]
    assert packed == [file.read_bytes() for file in files if file]
    assert mine.get(f"/history/zip?ids={','.join(['0' * 32] * (MAX_PICTURES_PER_CALL + 1))}").status_code == 400


def test_who_is_signed_in_has_a_history_of_their_own(studio: Studio) -> None:
    studio.app.auth = {"ann": "secret", "bob": "secret"}
    id_ = studio.add(owner="user:ann")
    studio.add(owner=ME)

    def signed_in(name: str) -> TestClient:
        client = studio.client(MINE)
        assert client.post("/login", data={"username": name, "password": "secret"}).status_code == 200
        return client

    assert [it["id"] for it in signed_in("ann").get("/history/page").json()["entries"]] == [id_]
    assert signed_in("bob").get(f"/history/picture/{id_}").status_code == 404
    assert studio.client(MINE).get("/history/page").status_code == 401
