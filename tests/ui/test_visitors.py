"""Whose is what: a cookie for each browser, and nobody passes for another."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from flux2_studio.ui.gradio_compat.visitors import VISITOR_COOKIE, VisitorCookieMiddleware, owner_of

TOKEN = "t" * 43


def client(url: str = "http://studio.example") -> TestClient:
    async def who(request: Request) -> PlainTextResponse:
        return PlainTextResponse(owner_of(request))

    app = Starlette(routes=[Route("/", who), Route("/other", who)], middleware=[Middleware(VisitorCookieMiddleware)])
    return TestClient(app, base_url=url)


def test_a_browser_gets_one_cookie_and_keeps_it() -> None:
    with client() as browser:
        first = browser.get("/")
        assert first.text == "" and "httponly" in first.headers["set-cookie"].lower()
        token = browser.cookies[VISITOR_COOKIE]
        assert browser.get("/").text == f"browser:{token}"
        assert "set-cookie" not in browser.get("/").headers
    with client() as another:
        another.get("/")
        assert another.cookies[VISITOR_COOKIE] != token


def test_only_the_page_gives_one() -> None:
    with client() as browser:
        assert "set-cookie" not in browser.get("/other").headers


@pytest.mark.parametrize(("url", "framed"), [("http://studio.example", False), ("https://studio.example", True)])
def test_within_a_frame_only_over_tls(url: str, framed: bool) -> None:
    with client(url) as browser:
        cookie = browser.get("/").headers["set-cookie"]
    assert ("SameSite=None; Secure; Partitioned" in cookie) is framed
    assert ("SameSite=Lax" in cookie) is not framed


@pytest.mark.parametrize("forged", ["", "short", "user:admin" * 5, "x" * 65, "a/b" * 15])
def test_what_is_no_token_of_ours_is_replaced(forged: str) -> None:
    with client() as browser:
        answer = browser.get("/", headers={"cookie": f"{VISITOR_COOKIE}={forged}"})
        assert answer.text == "" and VISITOR_COOKIE in answer.headers["set-cookie"]


@pytest.mark.parametrize(
    ("request_", "owner"),
    [
        ({"username": "ada", "cookies": {VISITOR_COOKIE: TOKEN}, "session_hash": "s"}, "user:ada"),
        ({"username": None, "cookies": {VISITOR_COOKIE: TOKEN}, "session_hash": "s"}, f"browser:{TOKEN}"),
        ({"username": None, "cookies": {}, "session_hash": "s"}, "session:s"),
        ({"cookies": {}}, ""),
    ],
)
def test_who_asks(request_: dict[str, Any], owner: str) -> None:
    assert owner_of(SimpleNamespace(**request_)) == owner  # type: ignore[arg-type]
