"""A text encoder on another machine: what goes out, what may come back, and what is said of all that may not."""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
import traceback
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flux2_studio.engine.params import TextRecipe
from flux2_studio.errors import RemoteTextError
from flux2_studio.models import tensor_codec
from flux2_studio.models.remote_text import (
    ENCODE_POLL_SECONDS,
    ENCODE_RETRY_DELAYS_SECONDS,
    MAX_ENCODE_RETRY_DELAY_SECONDS,
    RemoteTextEncoder,
)

TOKEN = "secret-abcdefghijklmnop"
RECIPE = TextRecipe(hidden_layers=(1, 2), length=4, padding_side="left", generation_prompt=False)
WIDTH = 6

Reply = Callable[["Handler"], None]


class Service(ThreadingHTTPServer):
    """Gives `replies`, one a request, the last one for ever; remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies: list[Reply] = []
        self.bodies: list[dict[str, object]] = []
        self.headers: list[dict[str, str]] = []
        self.go = threading.Event()  # what hanging replies wait for

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/predict"


class Handler(BaseHTTPRequestHandler):
    server: Service

    def log_message(self, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        service = self.server
        service.headers.append(dict(self.headers))
        service.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        reply = service.replies.pop(0) if len(service.replies) > 1 else service.replies[0]
        with suppress(ConnectionError):  # the client may give up
            reply(self)


def answer(body: bytes, status: int = 200, length: int | None = None, **headers: str) -> Reply:
    """length: what Content-Length says instead of the truth; -1: nothing."""

    def reply(handler: Handler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        if length != -1:
            handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        handler.wfile.write(body)

    return reply


def contexts(prompts: int = 1, length: int = RECIPE.length, width: int = WIDTH) -> Tensor:
    return torch.randn(prompts, length, width, generator=torch.Generator().manual_seed(1)).bfloat16()


def saved(what: object) -> bytes:
    out = io.BytesIO()
    torch.save(what, out)
    return out.getvalue()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Service()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.go.set()
    server.shutdown()
    thread.join()
    server.server_close()


class Pauses:
    """Sleeps not at all, and remembers for how long it should have."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self, seconds: float) -> None:
        assert 0 < seconds <= ENCODE_POLL_SECONDS, "a stop must be seen in time"
        self.seconds += seconds


def remote(url: str, token: str | None = TOKEN, patience: float = 60, pause: Pauses | None = None) -> RemoteTextEncoder:
    return RemoteTextEncoder(url, token, RECIPE, WIDTH, "FLUX.2 dev", timeout=patience, sleep=pause or Pauses())


def refusal(service: Service, reply: Reply, prompts: int = 1, **options: object) -> str:
    """The sentence for `reply`, which must say what to do and must not hold the token."""
    service.replies = [reply]
    with pytest.raises(RemoteTextError) as caught:
        remote(service.url, **options).encode(["a fox"] * prompts)  # type: ignore[arg-type]
    return checked(caught.value)


def checked(error: RemoteTextError) -> str:
    assert TOKEN not in "".join(traceback.format_exception(error))
    said = str(error)
    assert "FLUX2_TEXT_ENCODER_" in said or "Install" in said or "come back" in said
    return said


# --- what goes right -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", tensor_codec.ALLOWED_DTYPES, ids=str)
@pytest.mark.parametrize(
    "pack",
    [saved, lambda context: tensor_codec.pack_tensor(context, tensor_codec.SAFETENSORS_MEDIA_TYPE)],
    ids=["saved", "safe"],
)
def test_a_context_comes_back_bit_by_bit(service: Service, dtype: torch.dtype, pack: Callable[[Tensor], bytes]) -> None:
    sent = contexts(2).to(dtype)
    service.replies = [answer(pack(sent))]
    encoded = remote(service.url).encode(["ein Füchslein 🦊", ""])
    assert encoded.context.dtype == dtype and encoded.context.equal(sent)
    assert encoded.truncated_tokens == (0, 0), "not known"
    assert service.bodies == [{"prompt": ["ein Füchslein 🦊", ""]}]
    (headers,) = service.headers
    assert headers["Authorization"] == f"Bearer {TOKEN}"
    assert headers["Content-Type"] == "application/json"
    assert headers["Accept"].startswith("application/x-safetensors, ")


def test_without_a_token_none_is_sent(service: Service) -> None:
    service.replies = [answer(saved(contexts()))]
    remote(service.url, token=None).encode(["a fox"])
    assert "Authorization" not in service.headers[0]


def test_what_was_cut_is_told_by_our_own_server(service: Service) -> None:
    service.replies = [answer(saved(contexts(2)), X_Cut_Tokens="0,17")]
    assert remote(service.url).encode(["a", "b"]).truncated_tokens == (0, 17)


@pytest.mark.parametrize("told", ["0", "1,2,3", "-1,2", "a,b", "", "1e3,0", "9999999999999,0"])
def test_a_count_of_cut_tokens_that_is_none(service: Service, told: str) -> None:
    assert "another version" in refusal(service, answer(saved(contexts(2)), X_Cut_Tokens=told), prompts=2)


def test_an_answer_in_chunks(service: Service) -> None:
    body = saved(contexts())

    def reply(handler: Handler) -> None:
        handler.protocol_version = "HTTP/1.1"
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for start in range(0, len(body), 100):
            chunk = body[start : start + 100]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(chunk), chunk))
        handler.wfile.write(b"0\r\n\r\n")
        handler.close_connection = True

    service.replies = [reply]
    assert remote(service.url).encode(["a fox"]).context.equal(contexts())


def test_a_tensor_from_a_graphics_card_is_read_on_a_machine_without() -> None:
    """Such a file differs by the name of the place; weights_only must map it."""
    body, out = zipfile.ZipFile(io.BytesIO(saved(contexts()))), io.BytesIO()
    with zipfile.ZipFile(out, "w") as copy:
        for name in body.namelist():
            copy.writestr(name, body.read(name).replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0"))
    assert b"cuda:0" in out.getvalue()
    assert tensor_codec.unpack_tensor(out.getvalue()).equal(contexts())


# --- a tensor that is none of ours -----------------------------------------------------------------------------------


def test_another_checkpoints_width(service: Service) -> None:
    said = refusal(service, answer(saved(contexts(width=3))))
    assert said.startswith(
        "The service encodes for another checkpoint: it gave width 3, FLUX.2 dev reads 6. Set FLUX2_TEXT_ENCODER_FOR"
    )


@pytest.mark.parametrize(
    "shape", [(1, 3, WIDTH), (2, 4, WIDTH), (4, WIDTH), (1, 1, 4, WIDTH), (), (0, 4, WIDTH)], ids=str
)
def test_another_shape(service: Service, shape: tuple[int, ...]) -> None:
    assert f"shape {list(shape)} where FLUX.2 dev reads [1, 4, 6]" in refusal(
        service, answer(saved(torch.zeros(shape)))
    )


def test_a_view_of_one_number_that_claims_to_be_large(service: Service) -> None:
    large = torch.zeros(1).expand(10**6, 10**6, WIDTH)
    assert "shape [1000000, 1000000, 6]" in refusal(service, answer(saved(large)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.bool, torch.float8_e4m3fn], ids=str)
def test_other_numbers(service: Service, dtype: torch.dtype) -> None:
    sent = torch.zeros(1, RECIPE.length, WIDTH).to(dtype)
    name = str(dtype).removeprefix("torch.")
    assert f"numbers of type {name}" in refusal(
        service, answer(tensor_codec.pack_tensor(sent, tensor_codec.SAFETENSORS_MEDIA_TYPE))
    )
    assert "gave more than a tensor" in refusal(service, answer(saved(sent)))


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_none(service: Service, number: float) -> None:
    sent = contexts()
    sent[0, 3, 5] = number
    assert "NaN or infinite" in refusal(service, answer(saved(sent)))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"<!DOCTYPE html><html>Please sign in</html>", "gave a web page instead"),
        (b'{"error": "no"}', "gave no tensor instead"),
        (b"", "gave no tensor instead"),
        (b"PK\x03\x04 and no archive", "gave a damaged tensor instead"),
        (saved([contexts()]), "gave no tensor instead"),
        (saved({"context": contexts()}), "gave no tensor instead"),
        (saved(torch.nn.Parameter(contexts())), "gave more than a tensor instead"),
        (saved(contexts().to_sparse()), "gave more than a tensor instead"),
        (saved(contexts())[:-200], "gave a damaged tensor instead"),
        (tensor_codec.pack_tensor(contexts(), tensor_codec.SAFETENSORS_MEDIA_TYPE)[:-1], "gave no tensor instead"),
    ],
    ids=["html", "json", "nothing", "zip", "list", "dict", "parameter", "sparse", "cut", "cut-safe"],
)
def test_no_tensor(service: Service, body: bytes, says: str) -> None:
    assert says in refusal(service, answer(body, Content_Type="text/html"))


def test_several_tensors(service: Service) -> None:
    from safetensors.torch import save

    body = save({"a": torch.zeros(1), "b": torch.zeros(1)})
    assert "gave 2 tensors instead of one" in refusal(service, answer(body))


# --- pickles that do more --------------------------------------------------------------------------------------------


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


class Makes:
    """Becomes whatever `what(*arguments)` is."""

    def __init__(self, what: object, *arguments: object) -> None:
        self.reduced = (what, arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return self.reduced


def with_pickle(content: bytes, name: str = "data.pkl", compression: int = zipfile.ZIP_STORED) -> bytes:
    """A saved tensor whose pickle is `content`."""
    body, out = zipfile.ZipFile(io.BytesIO(saved(contexts()))), io.BytesIO()
    with zipfile.ZipFile(out, "w", compression) as copy:
        for entry in body.namelist():
            if entry.endswith("data.pkl"):
                copy.writestr(entry.replace("data.pkl", name), content)
            else:
                copy.writestr(entry, body.read(entry))
    return out.getvalue()


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_code_in_a_pickle_is_not_run(service: Service, tmp_path: Path, protocol: int, name: str) -> None:
    trap = tmp_path / "trap"
    bomb = pickle.dumps(Touches(trap), protocol)
    pickle.loads(bomb)
    assert trap.exists(), "the trap works"
    trap.unlink()
    for body in (with_pickle(bomb, name), bomb):
        assert "instead of a prompt's context" in refusal(service, answer(body))
    assert not trap.exists()


@pytest.mark.parametrize("bomb", [Makes(bytearray, 4), Makes(torch.Tensor, 4)], ids=["bytes", "tensor"])
@pytest.mark.parametrize("name", ["data.pkl", "DATA.PKL"])
def test_a_pickle_cannot_order_memory(bomb: Makes, name: str) -> None:
    """What weights_only would make, of any size: 4 is enough to see that nothing is made here."""
    body = with_pickle(pickle.dumps(bomb, 2), name)
    torch.load(io.BytesIO(body), weights_only=True)  # so it would
    with pytest.raises(tensor_codec.UnreadableTensor, match="more than a tensor"):
        tensor_codec.unpack_tensor(body)


def test_an_archive_that_unpacks_to_more(service: Service) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"x")
        archive.writestr("archive/data/0", bytes(10**6))
    assert "a packed archive" in refusal(service, answer(out.getvalue()))


def test_bytes_changed_at_random_never_do_more_than_be_refused() -> None:
    random = torch.Generator().manual_seed(2)

    def some(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    bodies = [saved(contexts()), tensor_codec.pack_tensor(contexts(), tensor_codec.SAFETENSORS_MEDIA_TYPE)]
    refused = 0
    for index in range(600):
        body = bytearray(bodies[index % 2])
        for _ in range(1 + some(3)):
            body[some(len(body))] = some(256)
        try:
            assert isinstance(
                tensor_codec.unpack_tensor(bytes(body[: some(len(body)) if index % 3 == 0 else None])), Tensor
            )
        except tensor_codec.UnreadableTensor:
            refused += 1
    assert refused > 300


# --- answers that are too long, too short, or never come -------------------------------------------------------------


def test_more_than_a_context_is_not_read(service: Service) -> None:
    most = tensor_codec.max_packed_bytes(1, RECIPE.length, WIDTH)
    assert "sends more than FLUX.2 dev can read" in refusal(service, answer(b"x", length=most + 1))
    sent = threading.Event()

    def endless(handler: Handler) -> None:
        handler.send_response(200)
        handler.end_headers()
        with suppress(OSError):
            while not handler.server.go.is_set():
                handler.wfile.write(bytes(2**16))
        sent.set()

    assert "sends more than FLUX.2 dev can read" in refusal(service, endless)
    assert sent.wait(60), "the connection is closed, not read to an end that never comes"


def test_the_largest_context_fits() -> None:
    largest = torch.zeros(2, 512, 15360)
    for media_type in (tensor_codec.SAFETENSORS_MEDIA_TYPE, tensor_codec.TORCH_MEDIA_TYPE):
        assert len(tensor_codec.pack_tensor(largest, media_type)) <= tensor_codec.max_packed_bytes(2, 512, 15360)


def test_an_answer_that_breaks_off(service: Service) -> None:
    body = saved(contexts())
    assert "broke off before its answer was whole" in refusal(service, answer(body[:-50], length=len(body)))


def test_no_answer_at_all(service: Service) -> None:
    assert "broke off" in refusal(service, lambda handler: None)


def test_what_is_no_http(service: Service) -> None:
    assert "broke off" in refusal(service, ssh)


def ssh(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")


def hang(handler: Handler) -> None:
    handler.server.go.wait()


def drip(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    while not handler.server.go.wait(0.05):
        handler.wfile.write(b"x")


@pytest.mark.parametrize("slow", [hang, drip])
def test_a_service_that_is_slow(service: Service, slow: Reply) -> None:
    assert "did not answer within 0 s" in refusal(service, slow, patience=0.4)


@pytest.mark.parametrize("slow", [hang, drip])
def test_whoever_waits_can_give_up(service: Service, slow: Reply) -> None:
    class Enough(Exception):
        pass

    told = []

    def progress(text: str, fraction: float | None) -> None:
        told.append(text)
        if len(told) == 3:
            raise Enough

    service.replies = [slow]
    with pytest.raises(Enough):
        remote(service.url, patience=3600).encode(["a fox"], progress)
    host = service.url.removeprefix("http://").removesuffix("/predict")
    assert set(told) == {f"Waiting for the text encoder at {host}"}


def test_nobody_listens() -> None:
    free = Service()
    free.server_close()
    with pytest.raises(RemoteTextError) as caught:
        remote(free.url).encode(["a fox"])
    said = checked(caught.value)
    assert said.startswith("Nothing answers at 127.0.0.1:") and "flux2-studio encode-server" in said


@pytest.mark.parametrize("host", ["no-such-machine.invalid", f"{'a' * 64}.example"])
def test_no_such_machine(service: Service, host: str) -> None:
    with pytest.raises(RemoteTextError) as caught:
        remote(f"http://{host}/").encode(["a fox"])
    assert f"There is no machine called {host}" in checked(caught.value)


def test_https_where_plain_http_is_spoken(service: Service) -> None:
    service.replies = [answer(b"")]
    with pytest.raises(RemoteTextError) as caught:
        remote(service.url.replace("http:", "https:")).encode(["a fox"])
    assert "does not speak HTTPS" in checked(caught.value)


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "token", "says"),
    [
        (401, TOKEN, "does not accept the token in FLUX2_TEXT_ENCODER_TOKEN"),
        (401, None, "asks for a token: set FLUX2_TEXT_ENCODER_TOKEN"),
        (403, TOKEN, "does not let you in"),
        (404, TOKEN, "no text encoder at that path"),
        (405, TOKEN, "no text encoder at that path"),
        (400, TOKEN, "does not take the prompt (HTTP 400)"),
        (422, TOKEN, "does not take the prompt (HTTP 422)"),
        (500, TOKEN, "has trouble (HTTP 500)"),
        (204, TOKEN, "does not take the prompt (HTTP 204)"),
    ],
)
def test_a_refusal(service: Service, status: int, token: str | None, says: str) -> None:
    echo = TOKEN.encode()  # a service may repeat what it was sent
    assert says in refusal(service, answer(echo if status != 204 else b"", status), token=token)
    assert len(service.bodies) == 1, "not asked again"


def test_a_redirect_is_not_followed(service: Service) -> None:
    elsewhere = service.url.replace("127.0.0.1", "localhost")
    for status in (301, 302, 303, 307, 308):
        assert "sends us on to another address" in refusal(service, answer(b"", status, Location=elsewhere))
    assert len(service.bodies) == 5


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize(
    ("asked", "seconds"),
    [
        (None, ENCODE_RETRY_DELAYS_SECONDS[0]),
        ("7", 7.0),
        ("0", 0.0),
        ("soon", ENCODE_RETRY_DELAYS_SECONDS[0]),
        ("-3", ENCODE_RETRY_DELAYS_SECONDS[0]),
    ],
)
def test_a_busy_service_is_asked_again(service: Service, status: int, asked: str | None, seconds: float) -> None:
    pauses = Pauses()
    busy = answer(b"busy", status) if asked is None else answer(b"busy", status, Retry_After=asked)
    service.replies = [busy, answer(saved(contexts()))]
    assert remote(service.url, pause=pauses).encode(["a fox"]).context.equal(contexts())
    assert len(service.bodies) == 2 and pauses.seconds == pytest.approx(seconds)


def test_a_service_that_stays_busy(service: Service) -> None:
    pauses = Pauses()
    assert "too busy at the moment (HTTP 429)" in refusal(service, answer(b"", 429), pause=pauses)
    assert len(service.bodies) == 3 and pauses.seconds == pytest.approx(sum(ENCODE_RETRY_DELAYS_SECONDS))


def test_a_busy_service_may_name_a_date(service: Service) -> None:
    pauses = Pauses()
    past = format_datetime(datetime.now(UTC) - timedelta(hours=1), usegmt=True)
    service.replies = [answer(b"", 503, Retry_After=past), answer(saved(contexts()))]
    remote(service.url, pause=pauses).encode(["a fox"])
    assert pauses.seconds == 0


def test_nobody_is_kept_waiting_for_long(service: Service) -> None:
    pauses = Pauses()
    long = f"{MAX_ENCODE_RETRY_DELAY_SECONDS + 1:.0f}"
    assert "come back in 31 s" in refusal(service, answer(b"", 429, Retry_After=long), pause=pauses)
    assert pauses.seconds == 0 and len(service.bodies) == 1


def test_giving_up_between_two_attempts(service: Service) -> None:
    class Enough(Exception):
        pass

    def progress(text: str, fraction: float | None) -> None:
        if "asking again" in text:
            raise Enough

    service.replies = [answer(b"", 503)]
    with pytest.raises(Enough):
        remote(service.url).encode(["a fox"], progress)
    assert len(service.bodies) == 1


def test_who_is_equal_is_the_same_text_encoder() -> None:
    """What was read once is kept under it: see `models/prompt_cache.py`."""
    one = RemoteTextEncoder("http://a/", TOKEN, RECIPE, WIDTH, "FLUX.2 dev")
    assert {one: 1}[RemoteTextEncoder("http://a/", TOKEN, RECIPE, WIDTH, "my own dev", timeout=1)] == 1
    for other in (
        RemoteTextEncoder("http://b/", TOKEN, RECIPE, WIDTH, "FLUX.2 dev"),
        RemoteTextEncoder("http://a/", TOKEN, replace(RECIPE, length=5), WIDTH, "FLUX.2 dev"),
        RemoteTextEncoder("http://a/", TOKEN, RECIPE, 7, "FLUX.2 dev"),
    ):
        assert one != other


def test_the_token_is_in_no_log_and_no_repr(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    client = remote(service.url)
    service.replies = [answer(saved(contexts())), answer(b"", 401)]
    client.encode(["a fox"])
    with pytest.raises(RemoteTextError):
        client.encode(["a fox"])
    assert TOKEN not in caplog.text and TOKEN not in repr(client)
    assert all(header["Authorization"].endswith(TOKEN) for header in service.headers), "it was in use"
