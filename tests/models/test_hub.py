"""Finding and downloading parts, against a small hub of our own on 127.0.0.1 that speaks huggingface_hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from flux2_studio.checkpoints import Part
from flux2_studio.errors import DownloadError, WeightsError
from flux2_studio.models.hub import Hub, PartFiles
from flux2_studio.settings import Settings

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyzSECRET"
MB = 10**6

FLOW = Part(kind="flow", repo="maker/Toy-4B", path="toy.safetensors", size=22 * MB, override="TOY_MODEL_PATH")
GATED = Part(kind="flow", repo="maker/Gated", path="g.safetensors", size=1, override="GATED_MODEL_PATH", gated=True)
VAE = Part(kind="autoencoder", repo="maker/Toy-4B", path="vae/model.safetensors", size=4)
TEXT = Part(
    kind="text",
    repo="maker/Toy-4B",
    path="text_encoder",
    tokenizer=("maker/Toy-4B", "tokenizer"),
    size=30,
    override="TEXT_MODEL_PATH",
)
ROOT_TEXT = Part(kind="text", repo="maker/Root", path="", tokenizer=("maker/Words", ""), size=30)

INDEX = json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}})
SHARDED = {
    "config.json": b"{}",
    "model.safetensors.index.json": INDEX.encode(),
    "model-00001-of-00002.safetensors": b"first shard",
    "model-00002-of-00002.safetensors": b"second shard",
}
TOKENIZER = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "chat_template.jinja": b"x"}


class FakeHub(ThreadingHTTPServer):
    """Repositories as dictionaries of files; `refusals` are (status, X-Error-Code, message) by repository."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {
            "maker/Toy-4B": {
                "toy.safetensors": bytes(22 * MB),
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
        self.refusals: dict[str, tuple[int, str, str]] = {}
        self.listed = False  # whether the refused repositories' names of files are public, as on the real hub
        self.broken_off: set[str] = set()  # files whose transfer ends in the middle
        self.vanished: set[str] = set()  # files that are listed and yet not there
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(urlsplit(self.path).path).strip("/")
        hub.asked.append(f"{self.command} {path}")
        hub.tokens.add(self.headers.get("Authorization"))
        api = path.startswith("api/models/")
        parts = path.removeprefix("api/models/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo in hub.refusals and not (api and hub.listed):
            status, code, message = hub.refusals[repo]
            self.answer(b"", status, {"X-Error-Code": code, "X-Error-Message": message})
        elif repo not in hub.repos:
            # As the hub does: who has not signed in is not told whether a repository exists.
            status = 404 if self.headers.get("Authorization") else 401
            self.answer(b"", status, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        elif api and rest[0] == "revision":
            self.answer(json.dumps({"id": repo, "sha": COMMIT, "siblings": []}).encode())
        elif api and rest[0] == "tree":
            files = [
                {"type": "file", "path": name, "size": len(content), "oid": etag(content)}
                for name, content in hub.repos[repo].items()
            ]
            self.answer(json.dumps(files).encode())
        else:
            content = None if "/".join(rest[2:]) in hub.vanished else hub.repos[repo].get("/".join(rest[2:]))
            if content is None:
                self.answer(b"", 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
            else:
                cut = len(content) // 2 if "/".join(rest[2:]) in hub.broken_off else None
                self.answer(content, 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(content)}"'}, cut)

    def answer(
        self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            with suppress(ConnectionError):  # the client may give up
                self.wfile.write(content[:cut])
        if cut is not None:
            self.close_connection = True


def etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


@pytest.fixture
def fake() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def no_token_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))


def settings(tmp_path: Path, **overrides: Path) -> Settings:
    return Settings(home=tmp_path / "home", assets=tmp_path / "assets", overrides=overrides)


def hub(fake: FakeHub, tmp_path: Path, **overrides: Path) -> Hub:
    return Hub(settings(tmp_path, **overrides), endpoint=fake.url, cache=tmp_path / "cache")


def silent(text: str, fraction: float | None) -> None:
    pass


def refused(hub: Hub, part: Part) -> str:
    with pytest.raises(DownloadError) as error:
        hub.locate(part, silent)
    message = str(error.value)
    assert TOKEN not in message and "Error" not in message and "Traceback" not in message
    return message


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- downloading --------------------------------------------------------------------------------------------------


def test_a_file_is_downloaded_once_and_then_used_without_the_network(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path)
    assert not ours.on_disk(VAE) and fake.asked == []
    files = ours.locate(VAE, silent)
    assert files.tokenizer is None and files.weights.read_bytes() == b"vae"
    assert files.weights.name == "model.safetensors"
    fake.asked.clear()
    assert ours.on_disk(VAE) and ours.locate(VAE, silent) == files
    assert hub(fake, tmp_path).locate(VAE, silent) == files
    assert fake.asked == []


def test_progress_is_told_in_bytes(fake: FakeHub, tmp_path: Path) -> None:
    told: list[tuple[str, float | None]] = []
    hub(fake, tmp_path).locate(FLOW, lambda text, fraction: told.append((text, fraction)))
    assert told[0] == ("Downloading Toy-4B", None)
    assert told[-1] == ("Downloading Toy-4B: 22.0 of 22.0 MB", 1.0) and told.count(told[-1]) == 1
    fractions = [fraction for _, fraction in told[1:] if fraction is not None]
    assert fractions == sorted(fractions) and len(fractions) == len(told) - 1


def test_progress_of_a_folder_knows_its_whole_size_from_the_start(fake: FakeHub, tmp_path: Path) -> None:
    fake.repos["maker/Toy-4B"]["text_encoder/model-00002-of-00002.safetensors"] = bytes(25 * MB)
    part = Part(**(vars(TEXT) | {"size": 100 * MB}))
    told: list[tuple[str, float | None]] = []
    files = hub(fake, tmp_path).locate(part, lambda text, fraction: told.append((text, fraction)))
    assert files.weights.joinpath("model-00002-of-00002.safetensors").stat().st_size == 25 * MB
    assert told[0] == ("Downloading Toy-4B text encoder", None)
    assert all("of 100.0 MB" in text for text, fraction in told if fraction is not None and "encoder" in text)
    assert ("Downloading Toy-4B tokenizer", None) in told


def test_a_text_encoder_comes_with_its_tokenizer_and_without_pickles(fake: FakeHub, tmp_path: Path) -> None:
    files = hub(fake, tmp_path).locate(TEXT, silent)
    assert names(files.weights) == set(SHARDED)
    assert files.tokenizer is not None and names(files.tokenizer) == set(TOKENIZER)
    assert not any("toy.safetensors" in asked or ".bin" in asked or "README" in asked for asked in fake.asked)


def test_a_root_repository_is_not_downloaded_twice_over(fake: FakeHub, tmp_path: Path) -> None:
    files = hub(fake, tmp_path).locate(ROOT_TEXT, silent)
    assert names(files.weights) == set(SHARDED)
    assert files.tokenizer is not None and names(files.tokenizer) == {*TOKENIZER, "config.json"}
    assert not any("consolidated" in asked for asked in fake.asked)


def test_a_broken_off_folder_is_not_on_disk_and_is_completed(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path)
    files = ours.locate(TEXT, silent)
    assert files.tokenizer is not None
    for missing in (
        files.weights / "model-00002-of-00002.safetensors",
        files.weights / "model.safetensors.index.json",
        files.weights / "config.json",
        files.tokenizer / "tokenizer.json",
        files.tokenizer / "tokenizer_config.json",
        files.tokenizer / "chat_template.jinja",
    ):
        missing.unlink()
        assert not ours.on_disk(TEXT), missing.name
        assert ours.locate(TEXT, silent) == files
        assert missing.is_file() and ours.on_disk(TEXT)


def test_what_another_tool_left_in_the_cache_is_judged_by_the_index(fake: FakeHub, tmp_path: Path) -> None:
    """Without the listing that newer versions of huggingface_hub keep."""
    ours = hub(fake, tmp_path)
    files = ours.locate(TEXT, silent)
    assert files.tokenizer is not None
    cache = tmp_path / "cache" / "models--maker--Toy-4B"
    (cache / "trees" / f"{COMMIT}.json").unlink()
    program = f"""
import sys
from pathlib import Path
from tests.models.test_hub import TEXT, Hub, settings
print(Hub(settings(Path({str(tmp_path)!r})), cache=Path({str(tmp_path / "cache")!r})).on_disk(TEXT))
"""
    assert python(program).stdout == "True\n"
    for missing in (files.weights / "model-00001-of-00002.safetensors", files.tokenizer / "tokenizer_config.json"):
        content = missing.read_bytes()
        missing.unlink()
        assert python(program).stdout == "False\n", missing.name
        missing.write_bytes(content)
    vocabulary = files.tokenizer / "tokenizer.json"
    vocabulary.rename(vocabulary.with_name("vocab.json"))
    assert python(program).stdout == "False\n"  # a vocabulary in two files, of which one is missing
    fill(files.tokenizer, "merges.txt")
    assert python(program).stdout == "True\n"


def test_what_progress_raises_ends_the_download_and_arrives(fake: FakeHub, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    def give_up(text: str, fraction: float | None) -> None:
        if fraction is not None:
            raise Enough

    ours = hub(fake, tmp_path)
    ours_flow = Part(**(vars(FLOW) | {"size": 1}))
    fake.repos["maker/Toy-4B"]["text_encoder/model-00001-of-00002.safetensors"] = bytes(22 * MB)
    for part in (ours_flow, Part(**(vars(TEXT) | {"size": 1}))):
        with pytest.raises(Enough):
            ours.locate(part, give_up)
        assert not ours.on_disk(part)
    assert ours.locate(ours_flow, silent).weights.stat().st_size == 22 * MB  # and nothing stands in the way later
    for error in (Enough, KeyboardInterrupt):  # with its first word

        def interrupt(text: str, fraction: float | None, error: type[BaseException] = error) -> None:
            raise error

        with pytest.raises(error):
            hub(fake, tmp_path / "other").locate(VAE, interrupt)


# --- what can go wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "part", [GATED, Part(**(vars(TEXT) | {"repo": "maker/Gated", "override": "GATED_MODEL_PATH"}))]
)
@pytest.mark.parametrize("listed", [True, False])
def test_a_gate(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part, listed: bool) -> None:
    fake.listed = listed
    fake.repos["maker/Gated"] |= {f"text_encoder/{name}": content for name, content in SHARDED.items()}
    ours = hub(fake, tmp_path)
    fake.refusals["maker/Gated"] = (401, "GatedRepo", "Access to model is restricted. Please log in.")
    assert refused(ours, part) == (
        f"maker/Gated is only for those who have accepted its licence: sign in at {fake.url}/maker/Gated and accept "
        f"it, then make a token at {fake.url}/settings/tokens and set HF_TOKEN to it, or set GATED_MODEL_PATH to a "
        f"local copy."
    )
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Gated"] = (403, "GatedRepo", f"You sent {TOKEN} and are not in the authorized list.")
    message = refused(ours, part)
    assert f"has no access to maker/Gated yet: accept its licence at {fake.url}/maker/Gated" in message
    fake.refusals["maker/Gated"] = (403, "", "Please enable access to public gated repositories")
    assert "fine-grained token" in refused(ours, part)
    assert f"Bearer {TOKEN}" in fake.tokens  # it was really sent, so it could have leaked


@pytest.mark.parametrize("part", [VAE, TEXT])
def test_a_bad_token(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: Part) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Toy-4B"] = (401, "", "Invalid credentials in Authorization header")
    message = refused(hub(fake, tmp_path), part)
    assert message.startswith("The hub does not accept this machine's token: make a new one at ")
    assert "HF_TOKEN" in message


def test_no_part_of_a_token_is_in_the_chain_of_errors(
    fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fake.refusals["maker/Gated"] = (403, "GatedRepo", "not in the authorized list")
    with pytest.raises(DownloadError) as error:
        hub(fake, tmp_path).locate(GATED, silent)
    assert TOKEN not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_no_such_repository(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    part = Part(**(vars(FLOW if kind == "file" else TEXT) | {"repo": "maker/Gone"}))
    for token in ("", TOKEN):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        message = refused(hub(fake, tmp_path), part)
        assert message == (
            f"The hub has no repository maker/Gone, or hides it: look at {fake.url}/maker/Gone, or set "
            f"{part.override} to a local copy."
        )


def test_no_such_file(fake: FakeHub, tmp_path: Path) -> None:
    part = Part(**(vars(FLOW) | {"path": "renamed.safetensors"}))
    assert refused(hub(fake, tmp_path), part) == (
        f"maker/Toy-4B does not hold renamed.safetensors (any more): look at {fake.url}/maker/Toy-4B, or set "
        f"TOY_MODEL_PATH to a local copy."
    )


def test_a_file_that_is_listed_but_gone(fake: FakeHub, tmp_path: Path) -> None:
    fake.vanished.add("toy.safetensors")
    assert "The hub does not hold maker/Toy-4B/toy.safetensors (any more)" in refused(hub(fake, tmp_path), FLOW)


def test_a_repository_without_the_files_that_are_needed(fake: FakeHub, tmp_path: Path) -> None:
    del fake.repos["maker/Toy-4B"]["text_encoder/model-00002-of-00002.safetensors"]
    assert "maker/Toy-4B does not hold text_encoder (any more)" in refused(hub(fake, tmp_path), TEXT)


def test_a_broken_connection(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)  # between its own attempts
    fake.broken_off.add("vae/model.safetensors")
    ours = hub(fake, tmp_path)
    assert "could not be downloaded" in refused(ours, VAE)
    assert not ours.on_disk(VAE)


def python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parents[2]
    known = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return subprocess.run(
        [sys.executable, "-c", program],
        env=known | {"PYTHONPATH": str(root)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )


def test_the_hubs_own_variables_are_honoured(fake: FakeHub, tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE are read when huggingface_hub is imported: in processes of their own."""
    program = f"""
from pathlib import Path
from flux2_studio.errors import DownloadError
from flux2_studio.models.hub import Hub
from tests.models.test_hub import FLOW, VAE, settings, silent
ours = Hub(settings(Path({str(tmp_path)!r})))
print(ours.on_disk(VAE), ours.locate(VAE, silent).weights)
try:
    print(ours.locate(FLOW, silent).weights.name)
except DownloadError as error:
    print(error)
"""
    home = tmp_path / "hf-home"
    first = python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home)).stdout.splitlines()
    assert first[0].startswith("False ") and str(home) in first[0]
    assert first[1] == "toy.safetensors"
    for blob in (home / "hub" / "models--maker--Toy-4B" / "snapshots" / COMMIT).glob("toy*"):
        blob.unlink()
    fake.asked.clear()
    second = python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home), HF_HUB_OFFLINE="1").stdout.splitlines()
    assert second[0] == first[0].replace("False", "True")
    assert second[1] == (
        "maker/Toy-4B/toy.safetensors is not on this machine, and HF_HUB_OFFLINE forbids downloading it: unset that "
        "variable, or set TOY_MODEL_PATH to a local copy."
    )
    assert fake.asked == []


def test_no_room(fake: FakeHub, tmp_path: Path) -> None:
    program = f"""
import resource
from pathlib import Path
from flux2_studio.errors import DownloadError
from flux2_studio.models.hub import Hub
from tests.models.test_hub import FLOW, settings, silent
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
try:
    Hub(settings(Path({str(tmp_path)!r}))).locate(FLOW, silent)
except DownloadError as error:
    print(error)
"""
    home = tmp_path / "hf-home"
    assert python(program, HF_ENDPOINT=fake.url, HF_HOME=str(home)).stdout == (
        f"There is no room for maker/Toy-4B/toy.safetensors (22.0 MB) in {home}/hub: free some space, or set HF_HOME "
        f"to a folder on a larger drive, or set TOY_MODEL_PATH to a local copy.\n"
    )


def test_a_cache_that_cannot_be_written(fake: FakeHub, tmp_path: Path) -> None:
    (tmp_path / "cache").touch()  # a file where the folder should be
    for part in (VAE, TEXT):
        assert f"cannot be stored in {tmp_path}/cache: allow writing there, or set HF_HOME" in refused(
            hub(fake, tmp_path), part
        )


def test_no_connection(tmp_path: Path) -> None:
    ours = Hub(settings(tmp_path), endpoint="http://127.0.0.1:9", cache=tmp_path / "cache")
    for part in (FLOW, TEXT):
        message = refused(ours, part)
        assert "http://127.0.0.1:9 cannot be reached" in message
        assert message.endswith(f"or set {part.override} to a local copy.")


@pytest.fixture
def mute() -> Iterator[str]:
    """The address of a hub that takes every connection and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_a_hub_that_never_answers(mute: str, tmp_path: Path) -> None:
    ours = Hub(settings(tmp_path), endpoint=mute, cache=tmp_path / "cache", patience=0.5)
    began = time.monotonic()
    for part in (FLOW, TEXT):
        assert f"{mute} cannot be reached" in refused(ours, part)
    assert time.monotonic() - began < 10


def test_waiting_for_the_hub_can_be_stopped(mute: str, tmp_path: Path) -> None:
    class Enough(Exception):
        pass

    told: list[tuple[str, float | None]] = []

    def give_up(text: str, fraction: float | None) -> None:
        told.append((text, fraction))
        if len(told) > 1:
            raise Enough

    with pytest.raises(Enough):
        Hub(settings(tmp_path), endpoint=mute, cache=tmp_path / "cache", patience=30).locate(FLOW, give_up)
    assert told == [("Downloading Toy-4B", None)] * 2


def test_a_hub_in_trouble(fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    fake.refusals["maker/Toy-4B"] = (503, "", "over capacity")
    for part in (FLOW, TEXT):
        assert "trouble at the moment (HTTP 503): try again later, or set" in refused(hub(fake, tmp_path), part)


# --- local copies and what ships with the studio ------------------------------------------------------------------


def test_a_local_file_or_folder_comes_before_the_hub(fake: FakeHub, tmp_path: Path) -> None:
    own = tmp_path / "own.safetensors"
    own.write_bytes(b"mine")
    for path in (own, tmp_path):
        ours = hub(fake, tmp_path, TOY_MODEL_PATH=path)
        assert ours.on_disk(FLOW)
        assert ours.locate(FLOW, silent) == PartFiles(weights=path, tokenizer=None)
    assert fake.asked == []


def test_a_local_copy_that_is_not_there(fake: FakeHub, tmp_path: Path) -> None:
    ours = hub(fake, tmp_path, TOY_MODEL_PATH=tmp_path / "gone.safetensors", TEXT_MODEL_PATH=tmp_path / "gone")
    assert not ours.on_disk(FLOW) and not ours.on_disk(TEXT)
    with pytest.raises(WeightsError) as error:
        ours.locate(FLOW, silent)
    assert str(error.value) == (
        f"TOY_MODEL_PATH points to {tmp_path}/gone.safetensors, where there is nothing: set it to a .safetensors file "
        f"or to the folder that holds it, or unset it."
    )
    with pytest.raises(WeightsError, match=r"TEXT_MODEL_PATH points to .*/gone, where there is no folder"):
        ours.locate(TEXT, silent)
    assert fake.asked == []  # and it is not fetched from the hub behind the user's back


def fill(folder: Path, *files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        (folder / file).touch()
    return folder


WEIGHTS, WORDS = ("config.json", "model.safetensors"), ("tokenizer.json", "tokenizer_config.json")


def test_the_places_of_a_local_text_encoder_and_its_tokenizer(fake: FakeHub, tmp_path: Path) -> None:
    together = fill(tmp_path / "a", *WEIGHTS, *WORDS)
    beside, beside_words = fill(tmp_path / "b" / "text_encoder", *WEIGHTS), fill(tmp_path / "b" / "tokenizer", *WORDS)
    fill(tmp_path / "b", "model_index.json", "toy-transformer.safetensors")  # a whole repository
    inside, inside_words = fill(tmp_path / "c", *WEIGHTS), fill(tmp_path / "c" / "tokenizer", *WORDS)
    for given, weights, tokenizer in (
        (together, together, together),
        (beside, beside, beside_words),
        (tmp_path / "b", beside, beside_words),
        (inside, inside, inside_words),
    ):
        ours = hub(fake, tmp_path, TEXT_MODEL_PATH=given)
        assert ours.on_disk(TEXT)
        assert ours.locate(TEXT, silent) == PartFiles(weights=weights, tokenizer=tokenizer)
    assert fake.asked == []


def test_a_local_text_encoder_that_lacks_something(fake: FakeHub, tmp_path: Path) -> None:
    for folder, said in (
        (fill(tmp_path / "a", *WORDS), "no config.json with .safetensors files beside it, nor in text_encoder/"),
        (fill(tmp_path / "c", "toy-transformer.safetensors", *WORDS), "no config.json with .safetensors files"),
        (fill(tmp_path / "b", *WEIGHTS), "which has no tokenizer: put its tokenizer.json"),
    ):
        ours = hub(fake, tmp_path, TEXT_MODEL_PATH=folder)
        assert not ours.on_disk(TEXT)
        with pytest.raises(WeightsError) as error:
            ours.locate(TEXT, silent)
        assert said in str(error.value) and f"TEXT_MODEL_PATH points to {folder}" in str(error.value)


def test_what_ships_with_the_studio(fake: FakeHub, tmp_path: Path) -> None:
    part = Part(kind="text", repo=None, path="toy/text", tokenizer=(None, "toy/words"), size=1)
    ours = hub(fake, tmp_path)
    assert not ours.on_disk(part)
    with pytest.raises(WeightsError, match="ships with the studio: install the studio again"):
        ours.locate(part, silent)
    weights, words = fill(tmp_path / "assets" / "toy" / "text"), fill(tmp_path / "assets" / "toy" / "words")
    assert ours.on_disk(part)
    assert ours.locate(part, silent) == PartFiles(weights=weights, tokenizer=words)
