"""A server on this machine that speaks OpenAI's protocol as scripted, and remembers what it was asked."""

from __future__ import annotations

import json
import select
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Reply = Callable[["Handler"], None]


@dataclass(frozen=True)
class Asked:
    """One request: its path, headers (names in lower case) and parsed body."""

    path: str
    headers: Mapping[str, str]
    body: dict[str, Any]


class FakeOpenAI:
    """Answers each request with the next of `replies`, and with the last for ever after.

    gone: set once a client has left while `silent` kept it waiting.
    """

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.asked: list[Asked] = []
        self.gone = threading.Event()
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"fake": self}))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(BaseHTTPRequestHandler):
    fake: FakeOpenAI
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.fake.asked.append(Asked(self.path, {name.lower(): it for name, it in self.headers.items()}, body))
        reply = self.fake.replies[min(len(self.fake.asked), len(self.fake.replies)) - 1]
        self.close_connection = True
        try:
            reply(self)
        except ConnectionError:
            self.fake.gone.set()

    def begin(self, status: int = 200, kind: str = "text/event-stream", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Connection", "close")
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()

    def say(self, data: Any) -> None:
        """One event of a stream."""
        text = data if isinstance(data, str) else json.dumps(data)
        self.wfile.write(f"data: {text}\n\n".encode())
        self.wfile.flush()

    def wait(self) -> None:
        """Say nothing until the client leaves or the test is over."""
        while not self.fake.closing.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.01)
            if readable and not self.connection.recv(1):
                self.fake.gone.set()
                return

    def log_message(self, format: str, *args: Any) -> None:
        pass


def chunk(content: Any = None, finish: str | None = None, **delta: Any) -> dict[str, Any]:
    """A chunk as OpenAI documents it, without what most servers leave out (usage, fingerprint)."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": "toy",
        "choices": [{"index": 0, "delta": {"content": content, **delta}, "finish_reason": finish}],
    }


@dataclass(frozen=True)
class Says:
    """Streams `pieces` and ends well. events: said before them; done: whether [DONE] comes at the end."""

    pieces: tuple[str, ...]
    finish: str | None = "stop"
    events: tuple[Any, ...] = ()
    done: bool = True
    after: tuple[Any, ...] = field(default=())

    def __call__(self, handler: Handler) -> None:
        handler.begin()
        for event in self.events:
            handler.say(event)
        for piece in self.pieces:
            handler.say(chunk(piece))
        handler.say(chunk(finish=self.finish))
        for event in self.after:
            handler.say(event)
        if self.done:
            handler.say("[DONE]")


def says(*pieces: str, **more: Any) -> Says:
    return Says(pieces, **more)


def refuses(status: int, message: str = "no", **headers: str) -> Reply:
    """An error as OpenAI's are, with whatever the client sent repeated in it."""

    def reply(handler: Handler) -> None:
        handler.begin(status, "application/json", **headers)
        authorization = handler.headers.get("Authorization", "")
        handler.wfile.write(json.dumps({"error": {"message": f"{message} {authorization}", "code": status}}).encode())

    return reply


def fails_inside(code: Any, *pieces: str) -> Reply:
    """What OpenRouter does when a provider fails after 200 was said."""

    def reply(handler: Handler) -> None:
        handler.begin()
        handler.wfile.write(b": OPENROUTER PROCESSING\n\n")
        for piece in pieces:
            handler.say(chunk(piece))
        key = handler.headers.get("Authorization", "")
        handler.say({"error": {"code": code, "message": f"Provider said no to {key}"}, "choices": []})

    return reply


def silent(*pieces: str, begins: bool = True) -> Reply:
    """Says `pieces`, then nothing more; nothing at all, no status either, where it never begins."""

    def reply(handler: Handler) -> None:
        if begins:
            handler.begin()
        for piece in pieces:
            handler.say(chunk(piece))
        handler.wait()

    return reply


def breaks_off(*pieces: str) -> Reply:
    """Leaves in the middle of a body that it had announced to be longer."""

    def reply(handler: Handler) -> None:
        handler.begin(Content_Length="100000")
        for piece in pieces:
            handler.say(chunk(piece))

    return reply


def gives(body: bytes, kind: str) -> Reply:
    """Something else altogether."""

    def reply(handler: Handler) -> None:
        handler.begin(200, kind)
        handler.wfile.write(body)

    return reply
