"""A small hub on 127.0.0.1 that speaks the real one's protocol: listings, gates, redirects to a CDN, ranges, etags."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from flux2_studio.checkpoints import KLEIN_4B, Part
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyzSECRET"
MB = 10**6
BLOCK = 50_000  # bytes that the hub sends at once

FLOW = Part(kind="flow", repo="maker/Toy-4B", path="toy.safetensors", size=3 * MB, path_variable="TOY_MODEL_PATH")
GATED = Part(
    kind="flow", repo="maker/Gated", path="g.safetensors", size=1, path_variable="GATED_MODEL_PATH", gated=True
)
VAE = Part(kind="autoencoder", repo="maker/Toy-4B", path="vae/model.safetensors", size=3)
TEXT = Part(
    kind="text",
    repo="maker/Toy-4B",
    path="text_encoder",
    tokenizer=("maker/Toy-4B", "tokenizer"),
    size=30,
    path_variable="TEXT_MODEL_PATH",
)
ROOT_TEXT = Part(kind="text", repo="maker/Root", path="", tokenizer=("maker/Words", ""), size=30)
TINY = Part(kind="tiny autoencoder", repo="maker/Words", path="consolidated.safetensors", size=14)

CHECKPOINT = replace(KLEIN_4B, flow=FLOW, text=TEXT, autoencoder=VAE, tiny_autoencoder=TINY)
OTHER = replace(CHECKPOINT, name="other", label="Other", flow=GATED)

INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{ }", "chat_template.jinja": b"x"}
TOY = random.Random(1).randbytes(3 * MB)


class FakeHub(ThreadingHTTPServer):
    """Repositories as dictionaries of files. The other attributes make it misbehave, or tell what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {
            "maker/Toy-4B": {
                "toy.safetensors": TOY,
                "vae/model.safetensors": b"vae",
                "README.md": b"never read",
                **{f"text_encoder/{name}": content for name, content in SHARDED.items()},
                "text_encoder/pytorch_model.bin": b"a pickle",
                **{f"tokenizer/{name}": content for name, content in TOKENIZER.items()},
            },
            "maker/Gated": {"g.safetensors": b"precious"},
            "maker/Root": {**SHARDED, "consolidated.safetensors": b"the same again", "tekken.json": b"{}"},
            "maker/Words": {**TOKENIZER, **SHARDED, "consolidated.safetensors": b"the same again"},
        }
        self.commits: dict[str, str] = {}  # where it is not COMMIT
        self.refusals: dict[str, tuple[int, str, str]] = {}  # (status, X-Error-Code, message) by repository
        self.listed = False  # whether the refused repositories' names of files are public, as on the real hub
        self.bare = False  # whether listings have names only, as mirrors' may
        self.vanished: set[str] = set()  # files that are listed and yet not there
        self.lies: dict[str, bytes] = {}  # what is sent instead of what is announced
        self.ranges = True  # whether it knows them
        self.busy = 0  # how many of the next requests for a file it answers with 503
        self.breaks = 0  # how many of the next answers with a file end in the middle
        self.hold_at: int | None = None  # bytes after which an answer waits for `go`
        self.go = threading.Event()
        self.pace = 0.0  # seconds that it takes for each BLOCK of an answer
        self.asked: list[str] = []  # "GET path", of the hub itself
        self.sent: list[tuple[str, str | None]] = []  # (name, Range) of every file that was asked for
        self.tokens: set[str | None] = set()  # that the hub was shown
        self.cdn_tokens: set[str | None] = set()  # and its CDN, which is none of its business

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def content(self, repo: str, name: str) -> bytes | None:
        return None if name in self.vanished else self.repos[repo].get(name)


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization")
        if path.startswith("cdn/"):
            hub.cdn_tokens.add(token)
            _, maker, name, *rest = path.split("/")
            self.file(f"{maker}/{name}", "/".join(rest), {"ETag": '"the-storage-has-etags-of-its-own"'})
            return
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.add(token)
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        commit = hub.commits.get(repo, COMMIT)
        if repo in hub.refusals and not (api and hub.listed):
            status, code, message = hub.refusals[repo]
            self.answer(b"", status, {"X-Error-Code": code, "X-Error-Message": message})
        elif repo not in hub.repos:
            # As the hub does: who has not signed in is not told whether a repository exists.
            status = 404 if token else 401
            self.answer(b"", status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif api:
            siblings = [{"rfilename": name} if hub.bare else sibling(name, it) for name, it in hub.repos[repo].items()]
            self.answer(json.dumps({"id": repo, "sha": commit, "siblings": siblings}).encode())
        elif rest[:1] != ["resolve"] or rest[1] not in ("main", commit):
            self.answer(b"", 404, {"X-Error-Code": "RevisionNotFound"})
        else:
            name = "/".join(rest[2:])
            content = hub.content(repo, name)
            headers = {"X-Repo-Commit": commit}
            if content is None:
                self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            elif is_large(name):
                # To another host ("localhost" is one), as the hub does with all that is in Git LFS.
                headers["X-Linked-ETag"], headers["X-Linked-Size"] = f'"{etag(name, content)}"', str(len(content))
                headers["Location"] = f"http://localhost:{hub.port}/cdn/{repo}/{name}?Signature=x"
                self.answer(b"", 302, headers)
            else:
                self.file(repo, name, headers | {"ETag": f'"{etag(name, content)}"'})

    def file(self, repo: str, name: str, headers: dict[str, str]) -> None:
        hub = self.server
        content = hub.lies.get(name, hub.content(repo, name))
        assert content is not None
        asked = self.headers.get("Range")
        if self.command == "GET":
            hub.sent.append((name, asked))
        if hub.busy:
            hub.busy -= 1
            self.answer(b"", 503)
            return
        status = 200
        span = re.fullmatch(r"bytes=(\d+)-(\d+)", asked) if asked and hub.ranges else None
        if span:
            first, last = int(span[1]), min(int(span[2]), len(content) - 1)
            if first >= len(content):
                self.answer(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
                return
            headers = headers | {"Content-Range": f"bytes {first}-{last}/{len(content)}"}
            status, content = 206, content[first : last + 1]
        cut = None
        if hub.breaks:
            hub.breaks -= 1
            cut = len(content) // 2
        self.answer(content, status, headers, cut)

    def answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            hold = self.server.hold_at
            with suppress(ConnectionError):  # the client may give up
                if hold is None or hold >= len(content):
                    for start in range(0, len(content[:cut]), BLOCK):
                        time.sleep(self.server.pace)
                        self.wfile.write(content[:cut][start : start + BLOCK])
                else:
                    self.wfile.write(content[:hold])
                    self.server.go.wait()
                    self.wfile.write(content[hold:cut])
        if cut is not None:
            self.close_connection = True


def is_large(name: str) -> bool:
    return name.endswith(".safetensors")


def etag(name: str, content: bytes) -> str:
    """As the hub gives it: the sha256 of a large file, git's id of a small one."""
    return hashlib.sha256(content).hexdigest() if is_large(name) else git_id(content)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sibling(name: str, content: bytes) -> dict[str, object]:
    found: dict[str, object] = {"rfilename": name, "size": len(content), "blobId": git_id(content)}
    if is_large(name):
        found["lfs"] = {"size": len(content), "sha256": etag(name, content), "pointerSize": 130}
    return found


@contextmanager
def serve() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.go.set()
        server.shutdown()
        thread.join()
        server.server_close()


def settings(tmp_path: Path, **overrides: Path) -> Settings:
    return Settings(home=tmp_path / "home", assets=tmp_path / "assets", path_overrides=overrides)


def hub(fake: FakeHub, tmp_path: Path, **overrides: Path) -> Hub:
    return Hub(settings(tmp_path, **overrides), endpoint=fake.url, cache=tmp_path / "cache", timeout=60)


def silent(text: str, fraction: float | None) -> None:
    pass


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    """`program` in a Python of its own, which knows nothing of this machine's hub settings."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.Popen(
        [sys.executable, "-c", program],
        env=known | {"PYTHONPATH": str(ROOT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def python(program: str, **environment: str) -> str:
    """What `program` printed."""
    with start(program, **environment) as running:
        out, err = running.communicate(timeout=300)
    assert running.returncode == 0, err
    return out
