"""`flux2-studio encode-server`: serves one checkpoint's text encoder over HTTP, for studios with too little memory.

    POST /         {"prompt": "..." or ["...", ...]}, with a bearer token if one is set -> the context [B, L, W] as
                   safetensors, or in torch.save's format if Accept names application/octet-stream but not safetensors;
                   the header X-Cut-Tokens has the number of truncated tokens of each prompt
    GET /health    {"model": ..., "width": W, "length": L}, without a token

Errors are answered with a status and {"error": "a sentence"}. Prompts are not logged, but recent prompts are cached in
memory with their contexts. One request is encoded at a time and a few wait; further ones are refused (503,
Retry-After).

`models/remote_text.py` is the client; `models/tensor_codec.py` implements the formats.
"""

from __future__ import annotations

import hmac
import io
import ipaddress
import json
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from typing import Any, Protocol
from urllib.parse import urlsplit

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.text.encoder import EncodedPrompts, open_text_encoder
from flux2_studio.errors import OutOfMemory, StudioError
from flux2_studio.models import tensor_codec
from flux2_studio.models.checkpoint_files import is_safe_to_mmap
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.memory.available import is_out_of_memory
from flux2_studio.models.memory.choices import choose_device, choose_dtype, choose_storage
from flux2_studio.models.prompt_cache import PromptCache
from flux2_studio.request import MAX_PROMPT
from flux2_studio.settings import Settings

DEFAULT_HOST, PORT = "127.0.0.1", 7870
MAX_PROMPTS = 8  # per request; a run of the studio needs at most two
# JSON may write one character in 12 bytes: \ud83e\udd8a
MAX_ENCODE_REQUEST_BYTES = 1024 + MAX_PROMPTS * MAX_PROMPT * 12
MAX_WAITING_REQUESTS = 8  # in addition to the one being encoded
RETRY_AFTER_SECONDS = 5
MAX_CONNECTIONS = 64  # open at once, each with its own thread
WRITE_CHUNK_BYTES = 2**20  # a client must receive each chunk within `EncodeRequestHandler.timeout`


class PromptEncoder(Protocol):
    """The interface that the server needs from a text encoder."""

    def encode(self, prompts: Sequence[str]) -> EncodedPrompts: ...


class RequestRefused(Exception):
    """The request is answered with an error status."""

    def __init__(self, status: int, sentence: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(sentence)
        self.status = status
        self.headers = headers or {}


class EncodeServer(ThreadingTCPServer):
    """An HTTP server for one text encoder.

    The constructor binds the address, so that a taken port fails before weights are loaded. Connections are accepted
    after `accept_connections`. Leaving the context manager finishes the requests in progress. Raises `StudioError` for
    an address that cannot be used, and for one that other machines can reach if no token is set.
    """

    allow_reuse_address = True
    daemon_threads = False  # closing the server waits for requests in progress
    request_queue_size = 64

    def __init__(self, host: str, port: int, token: str | None) -> None:
        self.address_family, address = _resolve_address(host, port)
        if token is None and not ipaddress.ip_address(address[0].partition("%")[0]).is_loopback:
            raise StudioError(
                f"Whoever can reach {host} could use this machine's text encoder: set FLUX2_ENCODE_TOKEN to a secret "
                f"of your own, and FLUX2_TEXT_ENCODER_TOKEN to the same on the machines that ask."
            )
        super().__init__(address, EncodeRequestHandler, bind_and_activate=False)
        try:
            self.server_bind()
        except OSError as error:
            self.server_close()
            raise StudioError(
                f"Port {port} at {host} cannot be used ({error.strerror}): choose another with --port, or one of this "
                f"machine's own addresses with --host."
            ) from error
        self.token = token
        self.encode_lock = threading.Lock()
        self.prompt_cache = PromptCache()
        self.request_slots = threading.BoundedSemaphore(1 + MAX_WAITING_REQUESTS)
        self._counting = threading.Lock()
        self._connection_count = 0  # counted here, because the process has other threads too

    def accept_connections(self, encoder: PromptEncoder, checkpoint: Checkpoint, width: int) -> None:
        """Starts to listen. `encoder` is the text encoder of `checkpoint`; its contexts have `width` features.

        Connections are answered while `serve_forever` runs.
        """
        self.encoder = encoder
        self.checkpoint = checkpoint
        self.width = width
        self.server_activate()

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://[{host!s}]:{port}/" if self.address_family == socket.AF_INET6 else f"http://{host!s}:{port}/"

    def verify_request(self, request: object, client_address: object) -> bool:
        """Returns whether the connection is within `MAX_CONNECTIONS`; otherwise the base class closes it."""
        with self._counting:
            self._connection_count += 1
            return self._connection_count <= MAX_CONNECTIONS

    def shutdown_request(self, request: Any) -> None:
        """Ends a connection. Called exactly once for each accepted connection, answered or refused."""
        with self._counting:
            self._connection_count -= 1
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs the error, unless the client has merely disconnected."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _DeadlineReader(io.RawIOBase):
    """Reads from a connection until `deadline`, a time of `time.monotonic`. With a timeout for each read alone, a
    client that sends a byte now and then could occupy a thread forever."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError("the request did not come in time")
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


class EncodeRequestHandler(BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: EncodeServer
    timeout = 20.0  # seconds to receive the whole request, and to send each chunk of the response

    def setup(self) -> None:
        super().setup()
        self.rfile.close()
        self.rfile = io.BufferedReader(_DeadlineReader(self.connection, time.monotonic() + self.timeout))

    def do_GET(self) -> None:
        if urlsplit(self.path).path != "/health":
            self.send_error(404)
            return
        server = self.server
        info = {"model": server.checkpoint.name, "width": server.width, "length": server.checkpoint.recipe.length}
        self.send_body(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def do_POST(self) -> None:
        try:
            # Read the body before refusing: a client that is still sending would not see the response.
            body = self.read_body()
            prompts = self.parse_prompts(body)
            if not self.server.request_slots.acquire(blocking=False):
                raise RequestRefused(
                    503, "Too many prompts wait already: come back.", {"Retry-After": f"{RETRY_AFTER_SECONDS}"}
                )
        except RequestRefused as refused:
            self.refuse(refused)
            return
        try:
            self.encode(prompts)
        finally:
            self.server.request_slots.release()

    def encode(self, prompts: list[str]) -> None:
        server = self.server
        try:
            with server.encode_lock:
                encoded = server.prompt_cache.get_or_encode(server.checkpoint.text, prompts, server.encoder.encode)
            media_type = _choose_media_type(self.headers.get("Accept", ""))
            packed = tensor_codec.pack_tensor(encoded.context, media_type)
        except Exception as error:
            reason = "its memory does not suffice" if is_out_of_memory(error) else "its log says why"
            self.refuse(RequestRefused(500, f"The text encoder could not read the prompt: {reason}."))
            raise  # for the log
        truncated = ",".join(str(count) for count in encoded.truncated_tokens)
        self.send_body(200, packed, {"Content-Type": media_type, tensor_codec.TRUNCATED_TOKENS_HEADER: truncated})

    def read_body(self) -> bytes:
        length = self.headers.get("Content-Length", "")
        if not length.isascii() or not length.isdigit() or len(length) > 12:
            raise RequestRefused(411, "Say in Content-Length how long the request is.")
        body = self.rfile.read(min(int(length), MAX_ENCODE_REQUEST_BYTES))
        if int(length) > MAX_ENCODE_REQUEST_BYTES:
            raise RequestRefused(413, f"The request is too long: send at most {MAX_ENCODE_REQUEST_BYTES:,} bytes.")
        return body

    def parse_prompts(self, body: bytes) -> list[str]:
        """Validates the request and returns its prompts. Raises `RequestRefused`."""
        if urlsplit(self.path).path != "/":
            raise RequestRefused(404, "There is nothing at that path: POST prompts to /.")
        if not self.is_authorised():
            raise RequestRefused(
                401, "Send this server's token, as `Authorization: Bearer ...`.", {"WWW-Authenticate": "Bearer"}
            )
        # Blocks requests from other sites' pages: browsers send JSON across origins only after a CORS preflight.
        if self.headers.get_content_type() != "application/json":
            raise RequestRefused(415, "Send JSON, with `Content-Type: application/json`.")
        try:
            fields = json.loads(body)
        except (ValueError, RecursionError) as error:
            raise RequestRefused(400, "The request is not JSON: it is damaged, or cut off.") from error
        if not isinstance(fields, dict) or fields.keys() != {"prompt"}:
            raise RequestRefused(400, 'Send {"prompt": "..."} or {"prompt": ["...", "..."]}, and nothing else.')
        prompts = [fields["prompt"]] if isinstance(fields["prompt"], str) else fields["prompt"]
        if not isinstance(prompts, list) or not all(isinstance(prompt, str) for prompt in prompts):
            raise RequestRefused(400, "A prompt is text, or a list of texts.")
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise RequestRefused(400, f"Send between 1 and {MAX_PROMPTS} prompts at once, not {len(prompts)}.")
        for prompt in prompts:
            if len(prompt) > MAX_PROMPT:
                raise RequestRefused(
                    400, f"A prompt has {len(prompt):,} characters; shorten it to {MAX_PROMPT:,} at most."
                )
            if any("\ud800" <= character <= "\udfff" for character in prompt):
                raise RequestRefused(400, "A prompt holds broken characters (lone surrogates): type or paste it again.")
        return prompts

    def is_authorised(self) -> bool:
        token = self.server.token
        if token is None:
            return True
        kind, _, sent_token = self.headers.get("Authorization", "").partition(" ")
        # Compares in constant time, so that the duration does not reveal a partly correct guess.
        return hmac.compare_digest(sent_token.strip().encode(), token.encode()) and kind.lower() == "bearer"

    def send_body(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.connection.settimeout(self.timeout)
        with suppress(ConnectionError, TimeoutError):  # the client has disconnected
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            for start in range(0, len(body), WRITE_CHUNK_BYTES):
                self.wfile.write(body[start : start + WRITE_CHUNK_BYTES])

    def refuse(self, refused: RequestRefused) -> None:
        body = json.dumps({"error": str(refused)}).encode()
        self.send_body(refused.status, body, {"Content-Type": "application/json", **refused.headers})

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers with JSON. The base class calls this for malformed requests."""
        self.refuse(RequestRefused(code, "This server answers POST / and GET /health."))

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        """Logs the method and the status, not the path, which may contain a secret."""
        self.log_message("%s %s", self.command or "?", int(code))


def open_server(
    settings: Settings, name: str | None, host: str | None, port: int | None, progress: ProgressCallback
) -> EncodeServer:
    """Loads the text encoder of checkpoint `name` (None: the default one) and returns its listening server.

    Raises `StudioError` for an address that cannot be used, and for weights that are missing or do not fit.
    """
    checkpoint = settings.checkpoint(name)
    device = choose_device(settings.device)
    server = EncodeServer(host or DEFAULT_HOST, PORT if port is None else port, settings.encode_token)
    try:
        part = checkpoint.text
        files = Hub(settings).find_or_download(part, progress)
        text = open_text_encoder(files.weights, files.tokenizer or files.weights, checkpoint.recipe)
        progress(f"Loading the text encoder of {checkpoint.label}", None)
        encoder = text.load(
            device=device,
            dtype=choose_dtype(settings.dtype, device, checkpoint, part),
            storage=choose_storage(settings.quantize, settings.dtype, device, part),
            use_mmap=is_safe_to_mmap(part, settings),
        )
        server.accept_connections(encoder, checkpoint, text.width)
    except BaseException as error:
        server.server_close()
        if is_out_of_memory(error):
            raise OutOfMemory(
                f"The text encoder of {checkpoint.label} does not fit into the memory of {device}. Set "
                f"FLUX2_QUANTIZE=int8 to hold it in 8 bits, or FLUX2_DEVICE to another device."
            ) from error
        raise
    return server


def serve_until_interrupted(server: EncodeServer) -> None:
    """Serves until Ctrl-C or SIGTERM, then finishes the requests in progress."""
    with server:
        # Installed before the server announces itself, because a reader of that line may send SIGTERM at once.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            sys.stdout.write(f"the text encoder of {server.checkpoint.label} is open at {server.url}\n")
            sys.stdout.flush()
            server.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            sys.stderr.write("stopping\n")


def _resolve_address(host: str, port: int) -> tuple[socket.AddressFamily, tuple[str, int]]:
    """Resolves the address to listen on. Raises `StudioError`."""
    if not 0 <= port <= 65535:
        raise StudioError(f"There is no port {port}: choose one from 1 to 65535, or 0 for any that is free.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise StudioError(
            f"{host} is not an address of this machine: choose 127.0.0.1, 0.0.0.0 or one of its own with --host."
        ) from error
    return family, (str(address[0]), int(address[1]))


def _choose_media_type(accept: str) -> str:
    """Returns the response format for an Accept header: torch.save's only if it names that and not safetensors."""
    accepted = {kind.partition(";")[0].strip().lower() for kind in accept.split(",")}
    return (
        tensor_codec.TORCH_MEDIA_TYPE
        if tensor_codec.TORCH_MEDIA_TYPE in accepted and tensor_codec.SAFETENSORS_MEDIA_TYPE not in accepted
        else tensor_codec.SAFETENSORS_MEDIA_TYPE
    )
