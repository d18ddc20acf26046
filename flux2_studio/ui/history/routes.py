"""HTTP routes of the History tab: lists of pictures as JSON, the pictures themselves, and changes to them.

Every response is for the owner only, identified by a cookie or Gradio's own sign-in; unknown ids and other owners' ids
get the same 404. Under a public name, Gradio lets pages of any origin read its responses with the visitor's cookies, so
all routes here refuse requests from other sites.
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
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.references import load_reference
from flux2_studio.images.thumbnails import ThumbnailCache, read_saved
from flux2_studio.provenance.inspect import setting_rows
from flux2_studio.storage.history import (
    DEFAULT_PAGE_SIZE,
    MAX_PICTURES_PER_CALL,
    History,
    HistoryEntry,
    HistoryPage,
    HistorySearch,
    PictureDetails,
)
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.history.original import OriginalLoader

MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg", ".webp": "image/webp"}
LISTED_PROMPT_CHARS = 300  # per prompt in a list; the details of a picture have all of it
MAX_JSON_BYTES = 64 * 1024  # per request body
MAX_ZIP_BYTES = 4 * 10**9  # of pictures in one zip file
ZIP_CHUNK_BYTES = 1 << 20
SAFE_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Vary": "Cookie",
}
PRIVATE_HEADERS = {**SAFE_HEADERS, "Cache-Control": "private, no-store"}
NO_SUCH_PICTURE = "There is no such picture in your history."
FILE_MISSING_OR_DAMAGED = "The file of this picture is missing or damaged."


class _HttpError(Exception):
    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class HistoryRoutes:
    """The routes.

    reference_store: references of runs, shown beside the pictures made from them; None shows none. originals: for the
    before-and-after comparison; None disables it.
    """

    def __init__(
        self,
        history: History,
        thumbnails: ThumbnailCache,
        reference_store: ReferenceStore | None,
        originals: OriginalLoader | None = None,
    ) -> None:
        self._originals = originals
        self._history = history
        self._thumbnails = thumbnails
        self._reference_store = reference_store

    def routes(self) -> list[Route]:
        return [
            Route("/history/page", owner_endpoint(self._page)),
            Route("/history/entry/{id}", owner_endpoint(self._details)),
            Route("/history/picture/{id}", owner_endpoint(self._picture)),
            Route("/history/before/{id}", owner_endpoint(self._before)),
            Route("/history/thumbnail/{id}", owner_endpoint(self._thumbnail)),
            Route("/history/source/{id}/{place:int}", owner_endpoint(self._source)),
            Route("/history/zip", owner_endpoint(self._zip)),
            Route("/history/favourite", owner_endpoint(self._favourite), methods=["POST"]),
            Route("/history/delete", owner_endpoint(self._delete), methods=["POST"]),
            Route("/history/restore", owner_endpoint(self._restore), methods=["POST"]),
            Route("/history/empty", owner_endpoint(self._empty), methods=["POST"]),
        ]

    # The handlers run in a thread, because all of them read the disk.

    def _page(self, owner: str, request: WebRequest, body: Any) -> Response:
        query = request.query_params
        search, before, limit = _search(query), query.get("before"), _number(query, "limit") or DEFAULT_PAGE_SIZE
        if before is not None:
            return _json(_page_json(self._history.page(owner, search, before, limit)))
        self._history.purge()
        overview = self._history.overview(owner, search, limit)
        return _json(
            {
                **_page_json(overview.page),
                "count": overview.found,
                "all": overview.total,
                "trashed": overview.trashed_ids,
                "checkpoints": [{"name": name, "label": label} for name, label in overview.checkpoints],
            }
        )

    def _details(self, owner: str, request: WebRequest, body: Any) -> Response:
        details = self._require_details(owner, request)
        sources = [
            _entry_json(source.entry)
            if source.entry
            else {"source": f"{details.entry.id}/{place}", "kept": self._reference_file(source.sha256) is not None}
            for place, source in enumerate(details.made_from)
        ]
        rows = setting_rows(details.record) if details.record else []
        return _json(
            {
                **_entry_json(details.entry),
                "prompt": details.entry.prompt,
                "rows": [[name, text] for name, text in rows if name not in ("Prompt", "References")],
                "before": self._originals is not None and self._originals.has_original(owner, details),
                "madeFrom": sources,
                "madeInto": [_entry_json(it) for it in details.made_into],
            }
        )

    def _picture(self, owner: str, request: WebRequest, body: Any) -> Response:
        entry, path = self._require_picture(owner, request)
        return FileResponse(
            path,
            media_type=MEDIA_TYPES[entry.suffix],
            filename=picture_download_name(entry),
            content_disposition_type="attachment" if "download" in request.query_params else "inline",
            headers={**SAFE_HEADERS, "Cache-Control": "private, max-age=3600"},
        )

    def _before(self, owner: str, request: WebRequest, body: Any) -> Response:
        details = self._require_details(owner, request)
        try:
            data = self._originals.load_png(owner, details) if self._originals is not None else None
        except (OSError, ReferenceImageError) as error:
            raise _HttpError(410, FILE_MISSING_OR_DAMAGED) from error
        if data is None:
            raise _HttpError(404, NO_SUCH_PICTURE)
        return Response(
            data, media_type="image/png", headers={**SAFE_HEADERS, "Cache-Control": "private, max-age=3600"}
        )

    def _thumbnail(self, owner: str, request: WebRequest, body: Any) -> Response:
        entry, path = self._require_picture(owner, request)
        return self._thumbnail_response(entry.id, lambda: read_saved(path))

    def _source(self, owner: str, request: WebRequest, body: Any) -> Response:
        made_from = self._require_details(owner, request).made_from
        place = int(request.path_params["place"])
        path = self._reference_file(made_from[place].sha256) if place < len(made_from) else None
        if path is None:
            raise _HttpError(404, NO_SUCH_PICTURE)
        existing_path = path
        return self._thumbnail_response(made_from[place].sha256, lambda: load_reference(existing_path).image)

    def _zip(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = request.query_params.get("ids", "").split(",")
        if len(ids) > MAX_PICTURES_PER_CALL:
            raise _HttpError(400, f"Choose at most {MAX_PICTURES_PER_CALL} pictures to download at once.")
        entries = self._history.find(owner, ids)
        if not entries:
            raise _HttpError(404, NO_SUCH_PICTURE)
        found = [(entry, self._history.find_file(owner, entry.id)) for entry in entries]
        files = [(entry, path) for entry, path in found if path is not None]
        if not files:
            raise _HttpError(410, FILE_MISSING_OR_DAMAGED)
        if sum(path.stat().st_size for _, path in files) > MAX_ZIP_BYTES:
            raise _HttpError(400, f"These are more than {MAX_ZIP_BYTES // 10**9} GB: choose fewer to download at once.")
        name = f"flux2-studio-{len(files)}-pictures.zip"
        headers = {
            **SAFE_HEADERS,
            "Cache-Control": "private, no-store",
            "Content-Disposition": f'attachment; filename="{name}"',
        }
        return StreamingResponse(stream_zip(files), media_type="application/zip", headers=headers)

    def _favourite(self, owner: str, request: WebRequest, body: Any) -> Response:
        on = body.get("on")
        if not isinstance(on, bool):
            raise _HttpError(400, 'Say whether it is a favourite: {"ids": [...], "on": true}.')
        count = self._history.set_favourite(owner, _ids(body), on)
        if not count:
            raise _HttpError(404, NO_SUCH_PICTURE)
        return _json({"count": count})

    def _delete(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = self._history.delete(owner, _ids(body))
        if not ids:
            raise _HttpError(404, NO_SUCH_PICTURE)
        return _json({"ids": ids})

    def _restore(self, owner: str, request: WebRequest, body: Any) -> Response:
        ids = self._history.restore(owner, _ids(body))
        if not ids:
            raise _HttpError(404, "There is nothing to undo: the trash was emptied, or a day has passed.")
        return _json({"ids": ids})

    def _empty(self, owner: str, request: WebRequest, body: Any) -> Response:
        return _json({"count": self._history.empty_trash(owner)})

    def _require_details(self, owner: str, request: WebRequest) -> PictureDetails:
        details = self._history.details(owner, request.path_params["id"])
        if details is None:
            raise _HttpError(404, NO_SUCH_PICTURE)
        return details

    def _require_picture(self, owner: str, request: WebRequest) -> tuple[HistoryEntry, Path]:
        """The picture and its file. Raises `_HttpError` if it is not `owner`'s or its file is missing."""
        located = self._history.find_with_file(owner, request.path_params["id"])
        if located is None:
            raise _HttpError(404, NO_SUCH_PICTURE)
        entry, path = located
        if path is None:
            raise _HttpError(410, FILE_MISSING_OR_DAMAGED)
        return entry, path

    def _reference_file(self, sha256: str) -> Path | None:
        return self._reference_store.find(sha256) if self._reference_store is not None else None

    def _thumbnail_response(self, name: str, picture: Callable[[], Image.Image]) -> Response:
        try:
            path = self._thumbnails.get_or_create(name, picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, ReferenceImageError) as error:
            raise _HttpError(410, FILE_MISSING_OR_DAMAGED) from error
        return Response(
            path.read_bytes(),
            media_type="image/webp",
            headers={**SAFE_HEADERS, "Cache-Control": "private, max-age=86400"},
        )


def picture_download_name(entry: HistoryEntry) -> str:
    """The ASCII file name for downloads of `entry`, without the random part of our own names."""
    made = datetime.fromtimestamp(entry.created / 10**6)
    checkpoint = re.sub(r"[^A-Za-z0-9.-]+", "-", entry.checkpoint)[:60].strip("-.") or "picture"
    return f"{made:%Y-%m-%d-%H%M%S}-{checkpoint}-{entry.seed}{entry.suffix}"


class _ZipBuffer:
    """Write-only file for `zipfile`; `take` returns and clears what was written."""

    def __init__(self) -> None:
        self._written = bytearray()

    def write(self, data: bytes) -> int:
        self._written += data
        return len(data)

    def flush(self) -> None:
        """Do nothing: there is no buffer to flush."""

    def take(self) -> bytes:
        data = bytes(self._written)
        self._written.clear()
        return data


def stream_zip(files: Sequence[tuple[HistoryEntry, Path]]) -> Iterator[bytes]:
    """Yield a zip file of `files` in chunks. Pictures are stored uncompressed."""
    buffer = _ZipBuffer()
    names: set[str] = set()
    with zipfile.ZipFile(buffer, "w") as archive:  # type: ignore[call-overload]
        for entry, path in files:
            plain = picture_download_name(entry)
            name, number = plain, 1
            while name in names:
                number += 1
                name = f"{plain.removesuffix(entry.suffix)}-{number}{entry.suffix}"
            names.add(name)
            member = zipfile.ZipInfo(name, datetime.fromtimestamp(entry.created / 10**6).timetuple()[:6])
            with path.open("rb") as file, archive.open(member, "w") as target:
                while chunk := file.read(ZIP_CHUNK_BYTES):
                    target.write(chunk)
                    yield buffer.take()
    yield buffer.take()


# --- requests ---------------------------------------------------------------------------------------------------


OwnerHandler = Callable[[str, WebRequest, Any], Response]


def owner_endpoint(handler: OwnerHandler) -> Callable[[WebRequest], Awaitable[Response]]:
    """Make an endpoint that checks the request and calls `handler` with its owner and JSON body."""

    async def endpoint(request: WebRequest) -> Response:
        try:
            _check_site(request)
            owner = await _owner(request)
            body = await _body(request) if request.method == "POST" else None
            return await asyncio.to_thread(handler, owner, request, body)
        except _HttpError as refused:
            return _text(str(refused), refused.status)
        except RequestError as error:
            return _text(str(error), 400)
        except StudioError as error:
            return _text(str(error), 503)

    return endpoint


async def _owner(request: WebRequest) -> str:
    """The owner of the request, by the rules of Gradio's own `/user`. Raises `_HttpError` if there is none."""
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
        raise _HttpError(401, "Sign in first: open the page again.")
    owner = owner_of(request)
    if not owner:
        raise _HttpError(404, NO_SUCH_PICTURE)
    return owner


def _check_site(request: WebRequest) -> None:
    """Raise `_HttpError` for requests by other sites' pages, and for changes of unknown origin."""
    site, origin = request.headers.get("sec-fetch-site"), request.headers.get("origin")
    changes = request.method == "POST"
    if site is not None:  # every browser sends it over encrypted or local connections
        allowed = site == "same-origin" or (site == "none" and not changes)
    elif origin is not None:
        allowed = urlsplit(origin).netloc == request.headers.get("host", "")
    else:
        allowed = not changes
    if not allowed:
        raise _HttpError(403, "Another site may not ask for this: open the studio itself.")


async def _body(request: WebRequest) -> dict[str, Any]:
    """The JSON object in the request body. Raises `_HttpError` for anything else."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise _HttpError(415, "Send JSON.")
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_JSON_BYTES:
            raise _HttpError(413, f"That is too much at once: name at most {MAX_PICTURES_PER_CALL} pictures.")
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _HttpError(400, "That is no well-formed JSON.") from error
    if not isinstance(body, dict):
        raise _HttpError(400, "Send a JSON object.")
    return body


def _ids(body: dict[str, Any]) -> list[str]:
    ids = body.get("ids")
    if (
        not isinstance(ids, list)
        or not 0 < len(ids) <= MAX_PICTURES_PER_CALL
        or not all(isinstance(it, str) for it in ids)
    ):
        raise _HttpError(400, f'Name between 1 and {MAX_PICTURES_PER_CALL} pictures: {{"ids": [...]}}.')
    return ids


def _search(query: QueryParams) -> HistorySearch:
    since, until = _number(query, "since"), _number(query, "until")
    return HistorySearch(
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
        raise _HttpError(400, f"{name} must be a whole number.")
    return int(value)


def _page_json(page: HistoryPage) -> dict[str, Any]:
    return {"entries": [_entry_json(it) for it in page.entries], "more": page.next_cursor}


def _entry_json(entry: HistoryEntry) -> dict[str, Any]:
    """`entry` as JSON for the script; `created` in milliseconds, for JavaScript."""
    return {
        "id": entry.id,
        "created": entry.created // 1000,
        "width": entry.width,
        "height": entry.height,
        "seed": entry.seed,
        "label": entry.label,
        "prompt": entry.prompt[:LISTED_PROMPT_CHARS],
        "favourite": entry.favourite,
        "missing": entry.missing,
    }


def _json(value: Any) -> Response:
    return JSONResponse(value, headers=PRIVATE_HEADERS)


def _text(text: str, status: int) -> Response:
    return PlainTextResponse(text, status_code=status, headers=PRIVATE_HEADERS)
