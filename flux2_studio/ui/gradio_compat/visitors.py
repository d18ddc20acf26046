"""Ownership of runs, pictures and presets: a signed-in user, or a browser identified by its own cookie."""

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
        # In another site's frame, as on a Space, browsers keep only cookies with all three attributes, and reject
        # these without TLS.
        headers = dict(scope["headers"])
        encrypted = scope.get("scheme") == "https" or headers.get(b"x-forwarded-proto", b"") == b"https"
        attributes = "SameSite=None; Secure; Partitioned" if encrypted else "SameSite=Lax"

        async def with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and scope["path"] == "/":
                token = secrets.token_urlsafe(32)
                cookie = f"{VISITOR_COOKIE}={token}; Path=/; Max-Age={COOKIE_MAX_AGE_SECONDS}; HttpOnly; {attributes}"
                MutableHeaders(scope=message).append("set-cookie", cookie)
            await send(message)

        await self._app(scope, receive, with_cookie)


def owner_of(request: gr.Request | HTTPConnection) -> str:
    """The owner of `request`: `user:NAME`, `browser:TOKEN`, or `session:HASH` for a program without cookies.

    HTTP routes have no Gradio session: there, an unknown caller is "".
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
