"""What the History tab fetches: lists of pictures as JSON, the pictures themselves, and changes to them.

Each answer is for the owner alone, whom a cookie or Gradio's own sign-in names; an unknown id and a foreign one get the
same 404. Gradio lets pages of any origin read what it serves with the visitor's cookies, wherever it runs under a
public name, so that all of this refuses whoever asks from another site.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import re
import zipfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from starlette.datastructures import QueryParams
from starlette.requests import Request as WebRequest
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from flux2_studio.errors import ReferenceImageError, RequestError, StudioError
from flux2_studio.images.reference_store import KeptReferences
from flux2_studio.images.references import load_reference
from flux2_studio.images.thumbnails import Thumbnails, read_saved
from flux2_studio.provenance.inspect import setting_rows
from flux2_studio.storage.history import MOST, PAGE, Details, Entry, History, Page, Search
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.history.original import Befores

TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
SHOWN = 300  # characters of a prompt in a list; one picture's own page has all of it
MAX_BODY = 64 * 1024  # bytes of a change
MAX_ZIP = 4 * 10**9  # bytes of pictures in one file
CHUNK = 1 << 20  # bytes
SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Cookie",
}
PRIVATE = {**SAFE, "Cache-Control": "private, no-store"}
UNKNOWN = "There is no such picture in your history."
GONE = "The file of this picture is missing or damaged."


class _Refused(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HistoryRoutes:
    """kept: where the references of runs are, which are shown beside the pictures made from them; None shows none.
    befores: what pictures can be compared with; None for nothing."""

    def __init__(
        self,
        history: History,
        thumbnails: Thumbnails,
        kept: KeptReferences | None,
        befores: Befores | None = None,
    ) -> None:
        self._befores = befores
        self._history = history
        self._thumbnails = thumbnails
        self._kept = kept

    def routes(self) -> list[Route]:
        return [
            Route("/history/page", asked(self._page)),
            Route("/history/entry/{id}", asked(self._details)),
            Route("/history/picture/{id}", asked(self._picture)),
            Route("/history/before/{id}", asked(self._before)),
            Route("/history/thumbnail/{id}", asked(self._thumbnail)),
            Route("/history/source/{id}/{place:int}", asked(self._source)),
            Route("/history/zip", asked(self._zip)),
            Route("/history/favourite", asked(self._favourite), methods=["POST"]),
            Route("/history/delete", asked(self._delete), methods=["POST"]),
            Route("/history/restore", asked(self._restore), methods=["POST"]),
            Route("/history/empty", asked(self._empty), methods=["POST"]),
        ]

    # Each runs in a thread: all of them read the disk.

    def _page(self, owner: str, request: WebRequest, body: Any) -> Response:
        query = request.query_params
        search, before, limit = _search(query), query.get("before"), _number(query, "limit") or PAGE
        if before is not None:
            return _json(_list(self._history.page(owner, search, before, limit)))
        self._history.purge()
        opening = self._history.opening(owner, search, limit)
        return _json(
            {
                **_list(opening.page),
                "count": opening.found,
                "all": opening.all,
                "trashed": opening.trashed,
                "checkpoints": [{"name": name, "label": label} for name, label in opening.checkpoints],
            }
        )

    def _details(self, owner: str, request: WebRequest, body: Any) -> Response:
        details = self._known(owner, request)
        sources = [
            _entry(source.picture)
            if source.picture
            else {"source": f"{details.entry.id}/{place}", "kept": self._kept_file(source.sha256) is not None}
            for place, source in enumerate(details.made_from)
        ]
        rows = setting_rows(details.record) if details.record else []
        return _json(
            {
                **_entry(details.entry),
                "prompt": details.entry.prompt,
                "rows": [[name, text] for name, text in rows if name not in ("Prompt", "References")],
                "before": self._befores is not None and self._befores.known(owner, details),
                "madeFrom": sources,
                "madeInto": [_entry(it) for it in details.made_into],
            }
        )

    def _picture(self, owner: str, request: WebRequest, body: Any) -> Response:
        entry, path = self._found(owner, request)
        return FileResponse(
            path,
            media_type=TYPES[entry.ending],
            filename=file_name(entry),
            content_disposition_type="attachment" if "download" in request.query_params else "inline",
            headers={**SAFE, "Cache-Control": "private, max-age=3600"},
        )

    def _before(self, owner: str, request: WebRequest, body: Any) -> Response:
        details = self._known(owner, request)
        try:
            data = self._befores.picture(owner, details) if self._befores is not None else None
        except (OSError, ReferenceImageError) as error:
            raise _Refused(410, GONE) from error
        if data is None:
            raise _Refused(404, UNKNOWN)
        return Response(data, media_type="image/png", headers={**SAFE, "Cache-Control": "private, max-age=3600"})

    def _thumbnail(self, owner: str, request: WebRequest, body: Any) -> Response:
        entry, path = self._found(owner, request)
        return self._small(entry.id, lambda: read_saved(path))

    def _source(self, owner: str, request: WebRequest, body: Any) -> Response:
        made_from = self._known(owner, request).made_from
        place = int(request.path_params["place"])
        path = self._kept_file(made_from[place].sha256) if place < len(made_from) else None
        if path is None:
            raise _Refused(404, UNKNOWN)
        found = path
        return self._small(made_from[place].sha256, lambda: load_reference(found).image)

    def _zip(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = request.query_params.get("ids", "").split(",")
        if len(ids) > MOST:
            raise _Refused(400, f"Choose at most {MOST} pictures to download at once.")
        entries = self._history.find(owner, ids)
        if not entries:
            raise _Refused(404, UNKNOWN)
        found = [(entry, self._history.file(owner, entry.id)) for entry in entries]
        files = [(entry, path) for entry, path in found if path is not None]
        if not files:
            raise _Refused(410, GONE)
        if sum(path.stat().st_size for _, path in files) > MAX_ZIP:
            raise _Refused(400, f"These are more than {MAX_ZIP // 10**9} GB: choose fewer to download at once.")
        name = f"flux2-studio-{len(files)}-pictures.zip"
        headers = {
            **SAFE,
            "Cache-Control": "private, no-store",
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return StreamingResponse(zipped(files), media_type="application/zip", headers=headers)

    def _favourite(self, owner: str, request: WebRequest, body: Any) -> Response:
        on = body.get("on")
        if not isinstance(on, bool):
            raise _Refused(400, 'Say whether it is a favourite: {"ids": [...], "on": true}.')
        count = self._history.favourite(owner, _ids(body), on)
        if not count:
            raise _Refused(404, UNKNOWN)
        return _json({"count": count})

    def _delete(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = self._history.delete(owner, _ids(body))
        if not ids:
            raise _Refused(404, UNKNOWN)
        return _json({"ids": ids})

    def _restore(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = self._history.restore(owner, _ids(body))
        if not ids:
            raise _Refused(404, "There is nothing to undo: the trash was emptied, or a day has passed.")
        return _json({"ids": ids})

    def _empty(self, owner: str, request: WebRequest, body: Any) -> Response:
        return _json({"count": self._history.empty_trash(owner)})

    def _known(self, owner: str, request: WebRequest) -> Details:
        details = self._history.details(owner, request.path_params["id"])
        if details is None:
            raise _Refused(404, UNKNOWN)
        return details

    def _found(self, owner: str, request: WebRequest) -> tuple[Entry, Path]:
        """The picture and its file. Raises `_Refused` for one that is not `owner`'s, or whose file is gone."""
        located = self._history.located(owner, request.path_params["id"])
        if located is None:
            raise _Refused(404, UNKNOWN)
        entry, path = located
        if path is None:
            raise _Refused(410, GONE)
        return entry, path

    def _kept_file(self, sha256: str) -> Path | None:
        return self._kept.find(sha256) if self._kept is not None else None

    def _small(self, name: str, picture: Callable[[], Image.Image]) -> Response:
        try:
            path = self._thumbnails.get(name, picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, ReferenceImageError) as error:
            raise _Refused(410, GONE) from error
        return Response(
            path.read_bytes(), media_type="image/webp", headers={**SAFE, "Cache-Control": "private, max-age=86400"}
        )


def file_name(entry: Entry) -> str:
    """The name under which `entry` is downloaded, in plain ASCII and without what makes our own name unguessable."""
    made = datetime.fromtimestamp(entry.created / 10**6)
    checkpoint = re.sub(r"[^A-Za-z0-9.-]+", "-", entry.checkpoint)[:60].strip("-.") or "picture"
    return f"{made:%Y-%m-%d-%H%M%S}-{checkpoint}-{entry.seed}{entry.ending}"


class _Outbox:
    """What `zipfile` writes to: a file that only grows, and is emptied by whoever sends it on."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """Nothing waits here."""

    def take(self) -> bytes:
        data = bytes(self._written)
        self._written.clear()
        return data


def zipped(files: Sequence[tuple[Entry, Path]]) -> Iterator[bytes]:
    """A zip file of `files`, piece by piece. Pictures are not compressed again."""
    outbox = _Outbox()
    names: set[str] = set()
    with zipfile.ZipFile(outbox, "w") as archive:  # type: ignore[call-overload]
        for entry, path in files:
            plain = file_name(entry)
            name, number = plain, 1
            while name in names:
                number += 1
                name = f"{plain.removesuffix(entry.ending)}-{number}{entry.ending}"
            names.add(name)
            member = zipfile.ZipInfo(name, datetime.fromtimestamp(entry.created / 10**6).timetuple()[:6])
            with path.open("rb") as file, archive.open(member, "w") as packed:
                while chunk := file.read(CHUNK):
                    packed.write(chunk)
                    yield outbox.take()
    yield outbox.take()


# --- who asks, and what ------------------------------------------------------------------------------------------


Answer = Callable[[str, WebRequest, Any], Response]


def asked(answer: Answer) -> Callable[[WebRequest], Awaitable[Response]]:
    """An endpoint that gives `answer` for the owner, and what was sent, where the request may be made at all."""

    async def endpoint(request: WebRequest) -> Response:
        try:
            _check_site(request)
            owner = await _owner(request)
            body = await _body(request) if request.method == "POST" else None
            return await asyncio.to_thread(answer, owner, request, body)
        except _Refused as refused:
            return _text(str(refused), refused.status)
        except RequestError as error:
            return _text(str(error), 400)
        except StudioError as error:
            return _text(str(error), 503)

    return endpoint


async def _owner(request: WebRequest) -> str:
    """Whose history is asked for, by the rules of Gradio's own `/user`. Raises `_Refused` for a stranger."""
    app = request.app
    if app.auth_dependency is not None:
        user = app.auth_dependency(request)
        user = await user if inspect.isawaitable(user) else user
    else:
        names = (f"access-token-{app.cookie_id}", f"access-token-unsecure-{app.cookie_id}")
        user = app.tokens.get(next(filter(None, map(request.cookies.get, names)), None))
    if user:
        return f"user:{user}"
    if app.auth is not None or app.auth_dependency is not None:
        raise _Refused(401, "Sign in first: open the page again.")
    owner = owner_of(request)
    if not owner:
        raise _Refused(404, UNKNOWN)
    return owner


def _check_site(request: WebRequest) -> None:
    """Raises `_Refused` for a request that another site's page makes, and for a change that does not say from where."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    changes = request.method == "POST"
    if site is not None:  # every browser's word, where the connection is encrypted or local
        allowed = site == "same-origin" or (site == "none" and not changes)
    elif origin is not None:
        allowed = urlsplit(origin).netloc == request.headers.get("host", "")
    else:
        allowed = not changes
    if not allowed:
        raise _Refused(403, "Another site may not ask for this: open the studio itself.")


async def _body(request: WebRequest) -> dict[str, Any]:
    """The JSON object that was sent. Raises `_Refused` for anything else."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _Refused(415, "Send JSON.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            raise _Refused(413, f"That is too much at once: name at most {MOST} pictures.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Refused(400, "That is no well-formed JSON.") from error
    if not isinstance(body, dict):
        raise _Refused(400, "Send a JSON object.")
    return body


def _ids(body: dict[str, Any]) -> list[str]:
    ids = body.get("ids")
    if not isinstance(ids, list) or not 0 < len(ids) <= MOST or not all(isinstance(it, str) for it in ids):
        raise _Refused(400, f'Name between 1 and {MOST} pictures: {{"ids": [...]}}.')
    return ids


def _search(query: QueryParams) -> Search:
    since, until = _number(query, "since"), _number(query, "until")
    return Search(
        words=query.get("words", "")[:1000],
        checkpoint=query.get("checkpoint", ""),
        since=None if since is None else since * 1000,
        until=None if until is None else until * 1000,
        favourites=query.get("favourites") == "1",
    )


def _number(query: QueryParams, name: str) -> int | None:
    value = query.get(name)
    if not value:
        return None
    if not re.fullmatch(r"[0-9]{1,14}", value):
        raise _Refused(400, f"{name} must be a whole number.")
    return int(value)


def _list(page: Page) -> dict[str, Any]:
    return {"entries": [_entry(it) for it in page.entries], "more": page.more}


def _entry(entry: Entry) -> dict[str, Any]:
    """`entry` as the script takes it; `created` in milliseconds, for JavaScript."""
    return {
        "id": entry.id,
        "created": entry.created // 1000,
        "width": entry.width,
        "height": entry.height,
        "seed": entry.seed,
        "label": entry.label,
        "prompt": entry.prompt[:SHOWN],
        "favourite": entry.favourite,
        "missing": entry.missing,
    }


def _json(value: Any) -> Response:
    return JSONResponse(value, headers=PRIVATE)


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text, status_code=status, headers=PRIVATE)
