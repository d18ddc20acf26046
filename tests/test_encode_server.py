"""Our own text encoder for others: the studio's client asks it over a real connection, and so does everybody else."""

from __future__ import annotations

import http.client
import io
import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from flux2_studio.checkpoints import DEV
from flux2_studio.cli.main import main
from flux2_studio.engine.text.encoder import EncodedPrompts, load_text_encoder
from flux2_studio.errors import OutOfMemory, RemoteTextError, StudioError
from flux2_studio.models import tensor_codec
from flux2_studio.models.remote_text import RemoteTextEncoder
from flux2_studio.remote.text_server import (
    MAX_CONNECTIONS,
    MAX_ENCODE_REQUEST_BYTES,
    MAX_PROMPTS,
    MAX_WAITING_REQUESTS,
    RETRY_AFTER_SECONDS,
    EncodeRequestHandler,
    EncodeServer,
    open_server,
)
from flux2_studio.request import MAX_PROMPT
from flux2_studio.settings import Settings
from tests.tiny import Toys

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "secret-abcdefghijklmnop"
LONG = " ".join(["a photo of a red fox and a blue dog"] * 80)  # more than the 512 tokens that are read
PROMPTS = ("a red fox", "", "ein Füchslein 🦊 [IMG]", LONG)

Answer = tuple[int, http.client.HTTPMessage, bytes]


@contextmanager
def running(server: EncodeServer) -> Iterator[EncodeServer]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Lengths:
    """Encodes a prompt as its length; waits for `go` where told to; counts how many do so at once."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.begun = threading.Semaphore(0)
        self.calls: list[list[str]] = []
        self.failure: Exception | None = None

    def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
        self.calls.append(list(prompts))
        self.begun.release()
        assert self.go.wait(60)
        if self.failure:
            raise self.failure
        return EncodedPrompts(
            torch.tensor([float(len(prompt)) for prompt in prompts]).reshape(-1, 1, 1).expand(-1, 512, 2),
            tuple(len(prompt) % 7 for prompt in prompts),
        )


@contextmanager
def serving(encoder: Lengths, token: str | None = TOKEN) -> Iterator[EncodeServer]:
    server = EncodeServer("127.0.0.1", 0, token)
    server.accept_connections(encoder, DEV, 2)
    with running(server):
        yield server


@pytest.fixture
def lengths() -> Lengths:
    return Lengths()


@pytest.fixture
def server(lengths: Lengths) -> Iterator[EncodeServer]:
    with serving(lengths) as found:
        yield found


def address(server: EncodeServer) -> tuple[str, int]:
    return str(server.server_address[0]), int(server.server_address[1])


def ask(
    server: EncodeServer, body: bytes | str, *, method: str = "POST", path: str = "/", **changes: str | None
) -> Answer:
    """changes: of the headers; None leaves one out."""
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    headers |= {name.replace("_", "-"): value for name, value in changes.items()}  # type: ignore[misc]
    connection = http.client.HTTPConnection(*address(server), timeout=60)
    connection.request(method, path, body, {name: value for name, value in headers.items() if value is not None})
    response = connection.getresponse()
    found = response.status, response.headers, response.read()
    connection.close()
    return found


def prompts(*said: str) -> str:
    return json.dumps({"prompt": said})


def error_of(answer: Answer) -> str:
    said = json.loads(answer[2])
    assert said.keys() == {"error"} and answer[1]["Content-Type"] == "application/json"
    assert TOKEN not in said["error"]
    return str(said["error"])


def client(
    server: EncodeServer, width: int, token: str | None = TOKEN, recipe: object = DEV.recipe
) -> RemoteTextEncoder:
    return RemoteTextEncoder(server.url, token, recipe, width, "FLUX.2 dev", sleep=lambda seconds: None)  # type: ignore[arg-type]


# --- what the studio gets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["klein-4b", "dev"])
def test_contexts_are_those_of_the_encoder_itself_bit_by_bit(toys: Toys, tmp_path: Path, name: str) -> None:
    settings = toys.settings(tmp_path, [name], encode_token=TOKEN)
    text = toys.qwen if name == "klein-4b" else toys.mistral
    checkpoint = settings.checkpoint(name)
    told: list[str] = []
    server = open_server(settings, None, None, 0, lambda said, fraction: told.append(said))
    assert told == [f"Loading the text encoder of {checkpoint.label}"]
    encoder = load_text_encoder(
        text.folder, text.folder, checkpoint.recipe, device=torch.device("cpu"), dtype=torch.float32
    )
    expected = encoder.encode(PROMPTS)
    assert expected.truncated_tokens[3] > 0 and not any(expected.truncated_tokens[:3])
    with running(server):
        remote = client(server, expected.context.shape[2], recipe=checkpoint.recipe)
        for _ in range(2):  # the second is remembered
            encoded = remote.encode(PROMPTS)
            assert encoded.context.dtype == torch.float32 and encoded.context.equal(expected.context)
            assert encoded.truncated_tokens == expected.truncated_tokens
        status, headers, body = ask(server, prompts(*PROMPTS), Accept=tensor_codec.TORCH_MEDIA_TYPE)
        assert (status, headers["Content-Type"]) == (200, "application/octet-stream")
        assert torch.load(io.BytesIO(body), weights_only=True).equal(expected.context)
        with pytest.raises(RemoteTextError, match="it gave width"):
            client(server, 7680, recipe=checkpoint.recipe).encode(["a fox"])


def test_the_precision_is_that_of_the_settings(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"], dtype="bfloat16")
    recipe = settings.checkpoint(None).recipe
    with running(open_server(settings, "klein-4b", "localhost", 0, lambda *_: None)) as server:
        context = client(server, 96, token=None, recipe=recipe).encode(["a fox"]).context
    assert context.dtype == torch.bfloat16 and context.shape == (1, 512, 96)


def test_the_same_prompts_are_read_once(server: EncodeServer, lengths: Lengths) -> None:
    remote = client(server, 2)
    assert remote.encode(["a fox", "an owl"]).context[:, 0, 0].tolist() == [5.0, 6.0]
    assert remote.encode(["an owl", "a newt"]).truncated_tokens == (6, 6)
    assert lengths.calls == [["a fox", "an owl"], ["a newt"]]


def test_health_tells_what_is_served(server: EncodeServer) -> None:
    status, headers, body = ask(server, b"", method="GET", path="/health", Authorization=None)
    assert (status, headers["Content-Type"]) == (200, "application/json")
    assert json.loads(body) == {"model": "dev", "width": 2, "length": 512}


@pytest.mark.parametrize(
    ("accept", "format_"),
    [
        (None, tensor_codec.SAFETENSORS_MEDIA_TYPE),
        ("*/*", tensor_codec.SAFETENSORS_MEDIA_TYPE),
        ("application/x-safetensors, application/octet-stream;q=0.5", tensor_codec.SAFETENSORS_MEDIA_TYPE),
        ("application/octet-stream", tensor_codec.TORCH_MEDIA_TYPE),
        ("Application/Octet-Stream;q=0.9, */*;q=0.1", tensor_codec.TORCH_MEDIA_TYPE),
    ],
)
def test_the_format_is_the_clients_choice(server: EncodeServer, accept: str | None, format_: str) -> None:
    status, headers, body = ask(server, json.dumps({"prompt": "a fox"}), Accept=accept)
    assert (status, headers["Content-Type"], headers[tensor_codec.TRUNCATED_TOKENS_HEADER]) == (200, format_, "5")
    assert body.startswith(b"PK") is (format_ == tensor_codec.TORCH_MEDIA_TYPE)
    assert tensor_codec.unpack_tensor(body).equal(torch.full((1, 512, 2), 5.0))


# --- what others get -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown", [None, "", "Bearer", "Bearer ", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN]
)
def test_without_the_token_nothing_is_read(server: EncodeServer, lengths: Lengths, shown: str | None) -> None:
    answer = ask(server, prompts("a fox"), Authorization=shown)
    assert answer[0] == 401 and answer[1]["WWW-Authenticate"] == "Bearer"
    assert "Authorization: Bearer" in error_of(answer)
    assert lengths.calls == []


def test_the_studio_is_told_so(server: EncodeServer) -> None:
    for token, says in ((None, "asks for a token"), ("wrong", "does not accept the token")):
        with pytest.raises(RemoteTextError, match=says):
            client(server, 2, token=token).encode(["a fox"])


def test_no_token_is_asked_for_where_none_is_set(lengths: Lengths) -> None:
    with serving(lengths, token=None) as server:
        assert ask(server, prompts("a fox"), Authorization=None)[0] == 200


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ("", 400, "not JSON"),
        ("{", 400, "not JSON"),
        ("[" * 100_000, 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        ("[]", 400, "and nothing else"),
        ("{}", 400, "and nothing else"),
        ('{"prompt": "a", "model": "dev"}', 400, "and nothing else"),
        ('{"prompt": 1}', 400, "A prompt is text"),
        ('{"prompt": null}', 400, "A prompt is text"),
        ('{"prompt": ["a", 1]}', 400, "A prompt is text"),
        ('{"prompt": []}', 400, "between 1 and 8 prompts at once, not 0"),
        (prompts(*"abcdefghi"), 400, "between 1 and 8 prompts at once, not 9"),
        (prompts("x" * (MAX_PROMPT + 1)), 400, "has 20,001 characters; shorten it to 20,000"),
        ('{"prompt": "\\ud83e"}', 400, "lone surrogates"),
        (b" " * (MAX_ENCODE_REQUEST_BYTES + 1), 413, "too long"),
    ],
    ids=lambda value: repr(value)[:24],
)
def test_what_is_no_prompt(server: EncodeServer, lengths: Lengths, body: bytes | str, status: int, says: str) -> None:
    answer = ask(server, body)
    assert answer[0] == status and says in error_of(answer)
    assert lengths.calls == []


def test_the_longest_request_that_is_allowed_fits(server: EncodeServer) -> None:
    longest = json.dumps({"prompt": ["🦊" * MAX_PROMPT] * MAX_PROMPTS})
    assert ask(server, longest)[0] == 200


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("POST", "/", {"Content_Type": "text/plain"}, 415),
        ("POST", "/", {"Content_Type": None}, 415),
        ("POST", "/", {"Content_Length": "many"}, 411),
        ("POST", "/", {"Content_Length": "-1"}, 411),
        ("POST", "/predict", {}, 404),
        ("GET", "/", {}, 404),
        ("PUT", "/", {}, 501),
        ("OPTIONS", "/", {}, 501),
    ],
)
def test_what_is_no_request(
    server: EncodeServer, lengths: Lengths, method: str, path: str, headers: dict[str, str | None], status: int
) -> None:
    answer = ask(server, prompts("a fox"), method=method, path=path, **headers)
    assert answer[0] == status and error_of(answer)
    assert lengths.calls == []


def test_what_is_no_http(server: EncodeServer) -> None:
    for said in (
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x00\r\n\r\n",
    ):
        with socket.create_connection(address(server), timeout=60) as connection:
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(2**16):
                pass
    assert ask(server, prompts("a fox"))[0] == 200, "still there"


def test_one_at_a_time_a_few_wait_and_the_rest_come_back(server: EncodeServer, lengths: Lengths) -> None:
    lengths.go.clear()
    statuses: list[int] = []
    waiting = [
        threading.Thread(target=lambda n=n: statuses.append(ask(server, prompts(f"{n}"))[0]))
        for n in range(1 + MAX_WAITING_REQUESTS)
    ]
    for thread in waiting:
        thread.start()
    assert lengths.begun.acquire(timeout=60)
    while server.request_slots._value:  # taking one to see whether there is one would turn somebody away
        time.sleep(0.01)
    answer = ask(server, prompts("one too many"))
    assert answer[0] == 503 and answer[1]["Retry-After"] == f"{RETRY_AFTER_SECONDS}" and "come back" in error_of(answer)
    assert len(lengths.calls) == 1, "the others wait"
    lengths.go.set()
    for thread in waiting:
        thread.join()
    assert statuses == [200] * (1 + MAX_WAITING_REQUESTS)
    assert ask(server, prompts("after that"))[0] == 200


def test_whoever_goes_leaves_the_place_to_others(server: EncodeServer, lengths: Lengths) -> None:
    for _ in range(MAX_WAITING_REQUESTS + 2):
        with socket.create_connection(address(server), timeout=60) as connection:
            body = prompts("a fox").encode()
            head = f"POST / HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
            connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    assert ask(server, prompts("a fox"))[0] == 200


@pytest.mark.parametrize("part", ["request line", "headers", "body"])
def test_whoever_sends_byte_by_byte_is_cut_off(server: EncodeServer, lengths: Lengths, part: str) -> None:
    class Hasty(EncodeRequestHandler):
        timeout = 0.5  # of which each byte takes a tenth

    server.RequestHandlerClass = Hasty
    body = prompts("a fox").encode()
    head = f"Authorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\nContent-Length: {len(body) + 1000}\r\n"
    sent = {
        "request line": b"POST /",
        "headers": b"POST / HTTP/1.1\r\nX-Long: ",
        "body": b"POST / HTTP/1.1\r\n" + head.encode() + b"\r\n" + body,
    }
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(sent[part])
        patience = time.monotonic() + 60
        with suppress(ConnectionError):
            while True:
                assert time.monotonic() < patience, "it was never cut off"
                time.sleep(0.05)
                connection.sendall(b"x")
    assert lengths.calls == []
    server.RequestHandlerClass = EncodeRequestHandler
    assert ask(server, prompts("a fox"))[0] == 200


def test_an_answer_has_time_of_its_own(server: EncodeServer) -> None:
    """However late the request's last byte came."""

    timeouts: list[float | None] = []

    class Patient(EncodeRequestHandler):
        timeout = 3600.0

        def send_response(self, code: int, message: str | None = None) -> None:
            timeouts.append(self.connection.gettimeout())
            super().send_response(code, message)

    class Wide(Lengths):
        def encode(self, prompts: Sequence[str]) -> EncodedPrompts:
            return EncodedPrompts(
                torch.zeros(len(prompts), 512, 8192), (0,) * len(prompts)
            )  # more than a connection holds

    server.RequestHandlerClass, server.encoder = Patient, Wide()
    body = prompts("a fox").encode()
    head = f"POST / HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\nContent-Type: application/json\r\n"
    with socket.create_connection(address(server), timeout=60) as connection:
        connection.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body))
        connection.sendall(body)  # what is left of the request's time is what the connection waits for it
        found = http.client.HTTPResponse(connection)
        found.begin()
        assert found.status == 200 and len(found.read()) > 512 * 8192 * 4
    assert timeouts == [Patient.timeout]


@pytest.mark.parametrize(
    ("failure", "says"),
    [
        (ValueError(f"it holds {TOKEN}"), "its log says why"),
        (torch.OutOfMemoryError("CUDA out of memory"), "its memory does not suffice"),
    ],
)
def test_an_encoder_that_fails(
    server: EncodeServer, lengths: Lengths, failure: Exception, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    lengths.failure = failure
    answer = ask(server, prompts("a fox"))
    assert answer[0] == 500 and says in error_of(answer)
    with pytest.raises(RemoteTextError, match=r"has trouble \(HTTP 500\)"):
        client(server, 2).encode(["a fox"])
    lengths.failure = None
    assert ask(server, prompts("a fox"))[0] == 200
    logged, patience = "", time.monotonic() + 60
    while "Traceback" not in logged:  # it is written once the answer is out
        assert time.monotonic() < patience, logged
        time.sleep(0.01)
        logged += capsys.readouterr().err


def test_the_log_has_no_token_and_no_prompt(server: EncodeServer, capsys: pytest.CaptureFixture[str]) -> None:
    ask(server, prompts("a secretive fox"))
    ask(server, prompts("a secretive fox"), path=f"/?token={TOKEN}")
    ask(server, prompts("a secretive fox"), path=f"/{TOKEN}", Authorization=f"Bearer {TOKEN}x")
    logged = capsys.readouterr().err
    assert re.findall(r"POST (\d+)$", logged, re.MULTILINE) == ["200", "200", "404"]
    assert TOKEN not in logged and "secretive" not in logged
    assert TOKEN not in repr(server)


# --- where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_others_are_let_in_with_a_token_only(host: str) -> None:
    with pytest.raises(StudioError, match="set FLUX2_ENCODE_TOKEN to a secret of your own"):
        EncodeServer(host, 0, None)
    if host == "0.0.0.0":
        EncodeServer(host, 0, TOKEN).server_close()


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_on_this_machine_alone_none_is_needed(host: str) -> None:
    server = EncodeServer(host, 0, None)
    assert re.fullmatch(r"http://(127\.0\.0\.\d|\[::1\]):\d+/", server.url)
    server.server_close()


@pytest.mark.parametrize(
    ("host", "port", "says"),
    [
        ("127.0.0.1", 70000, "There is no port 70000"),
        ("no such host", 7870, "no such host is not an address of this machine"),
        ("a" * 70, 7870, "is not an address of this machine"),
        ("192.0.2.1", 7870, "Port 7870 at 192.0.2.1 cannot be used"),
    ],
)
def test_an_address_that_cannot_be_had(host: str, port: int, says: str) -> None:
    with pytest.raises(StudioError, match=says):
        EncodeServer(host, port, TOKEN)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path, path_overrides={"MISTRAL_MODEL_PATH": tmp_path / "nothing"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StudioError, match=f"Port {port} at 127.0.0.1 cannot be used"):
            open_server(settings, "dev", None, port, lambda *_: None)
    with pytest.raises(StudioError, match="MISTRAL_MODEL_PATH"):
        open_server(settings, "dev", None, port, lambda *_: None)
    with socket.create_server(("127.0.0.1", port)):
        pass  # given back


def test_an_encoder_that_does_not_fit(toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    empty = torch.empty

    def full(*size: object, **how: object) -> torch.Tensor:
        if how.get("dtype") is torch.uint8:  # a buffer of what reads the files
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory")
        return empty(*size, **how)  # type: ignore[call-overload]

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(OutOfMemory, match=r"text encoder of .*klein.* memory of cpu\. Set FLUX2_QUANTIZE=int8"):
            open_server(settings, "klein-4b", None, port, lambda *_: None)
    with running(open_server(settings, "klein-4b", None, port, lambda *_: None)) as server:
        assert ask(server, prompts("a fox"))[0] == 200


# --- the command -----------------------------------------------------------------------------------------------------


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    known = {name: value for name, value in os.environ.items() if not name.startswith(("FLUX2_", "HF_"))}
    return known | {"FLUX2_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "FLUX2_DEVICE": "cpu"} | more


def test_what_was_begun_is_answered_before_the_end(lengths: Lengths) -> None:
    lengths.go.clear()
    statuses: list[int] = []
    with serving(lengths) as server:
        asking = threading.Thread(target=lambda: statuses.append(ask(server, prompts("a fox"))[0]))
        asking.start()
        assert lengths.begun.acquire(timeout=60)
        server.shutdown()
        threading.Timer(0.2, lengths.go.set).start()
    assert lengths.go.is_set(), "it was waited for"
    asking.join()
    assert statuses == [200]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "flux"], "There is no checkpoint called 'flux'"),
        (["--host", "0.0.0.0"], "set FLUX2_ENCODE_TOKEN"),
        (["--port", "70000"], "There is no port 70000"),
        (["--model", "klein-4b", "--port", "0"], "QWEN3_4B_MODEL_PATH"),
    ],
)
def test_a_users_error_is_one_line(
    tmp_path: Path, arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    known = environment(tmp_path, QWEN3_4B_MODEL_PATH=str(tmp_path / "nothing"))
    with patch.dict(os.environ, known, clear=True):
        assert main(["encode-server", *arguments]) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("flux2-studio: ") and says in last


def test_other_threads_of_the_process_take_no_connections(server: EncodeServer) -> None:
    """And connections that have ended make room for others."""
    rest = threading.Event()
    others = [threading.Thread(target=rest.wait) for _ in range(MAX_CONNECTIONS + 8)]
    for thread in others:
        thread.start()
    try:
        for _ in range(MAX_CONNECTIONS + 8):
            assert ask(server, "", method="GET", path="/health")[0] == 200
    finally:
        rest.set()
        for thread in others:
            thread.join()
