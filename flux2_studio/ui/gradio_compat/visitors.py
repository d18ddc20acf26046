"""Whose is a run, a picture, a preset: a signed-in user's, else a browser's, known by a cookie that only it has."""

from __future__ import annotations

import re
import secrets
from typing import Any

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

VISITOR_COOKIE = "flux2_visitor"
COOKIE_MAX_AGE_SECONDS = 365 * 24 * 3600  # seconds
_TOKEN = re.compile(r"[A-Za-z0-9_-]{32,64}")


class VisitorCookieMiddleware:
    """ASGI middleware that gives each new browser its cookie."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _cookie(HTTPConnection(scope).cookies):
            await self._app(scope, receive, send)
            return
        # Inside another site's frame, as on a Space, a browser keeps only a cookie that says all this; and it takes
        # none of them without TLS.
        headers = dict(scope["headers"])
        encrypted = scope.get("scheme") == "https" or headers.get(b"x-forwarded-proto", b"") == b"https"
        kind = "SameSite=None; Secure; Partitioned" if encrypted else "SameSite=Lax"

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/":
                token = secrets.token_urlsafe(32)
                cookie = f"{VISITOR_COOKIE}={token}; Path=/; Max-Age={COOKIE_MAX_AGE_SECONDS}; HttpOnly; {kind}"
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self._app(scope, receive, with_cookie)


def owner_of(request: gr.Request | HTTPConnection) -> str:
    """Who makes `request`: `user:NAME`, `browser:TOKEN`, or, of a program that keeps no cookies, `session:HASH`.

    A connection's own routes know no session: there, an unknown caller is "".
    """
    user = getattr(request, "username", None)
    if isinstance(user, str) and user:
        return f"user:{user}"
    cookies: Any = request.cookies
    if token := _cookie(cookies):
        return f"browser:{token}"
    session = getattr(request, "session_hash", None)
    return f"session:{session}" if session else ""


def _cookie(cookies: Any) -> str:
    value = cookies.get(VISITOR_COOKIE, "")
    return value if _TOKEN.fullmatch(value) else ""
