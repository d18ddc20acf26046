"""Client for a text encoder on another machine: sends prompts over HTTP and receives contexts.

The protocol is that of Hugging Face's service for FLUX.2 dev (reference: diffusers' `Flux2RemoteTextEncoderStep`):
POST {"prompt": [...]} with a bearer token returns a tensor [B, L, W] in torch.save's format. This project's own server
`remote/text_server.py` returns safetensors, which the client prefers, and also the number of truncated tokens.

The server may be slow, down, the wrong one, or hostile. The client reads at most as many bytes as a context can have
and validates the tensor. It follows no redirects, since they would forward the token. Its messages quote neither the
response nor the text of exceptions, which may contain the token.
"""

from __future__ import annotations

import json
import queue
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPResponse
from typing import TYPE_CHECKING
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request

import torch

from flux2_studio import __version__
from flux2_studio.engine.params import TextRecipe
from flux2_studio.engine.text.encoder import EncodedPrompts
from flux2_studio.errors import RemoteTextError
from flux2_studio.models import tensor_codec

if TYPE_CHECKING:
    from flux2_studio.models.hub.repositories import ProgressCallback
from flux2_studio.models.hub.downloads import ignore_progress

ENCODE_TIMEOUT_SECONDS = 120.0  # for one response: a 24B encoder on a CPU takes about as long
ENCODE_RETRY_DELAYS_SECONDS = (2.0, 5.0)  # before each retry of a busy service that sends no Retry-After
MAX_ENCODE_RETRY_DELAY_SECONDS = 30.0  # a longer Retry-After is an error
ENCODE_POLL_SECONDS = 0.1  # between two checks for cancellation
READ_CHUNK_BYTES = 2**16

_ENCODE_LOCALLY_HINT = "unset FLUX2_TEXT_ENCODER_URL to read prompts on this machine"  # ends nearly every message

OK, REDIRECTS, BUSY = 200, range(300, 400), (429, 503)  # HTTP statuses


@dataclass(frozen=True)
class _HttpResponse:
    status: int
    headers: Message
    body: bytes


class _ResponseTooLarge(Exception):
    """The response is larger than any valid context."""


class _ResponseTruncated(Exception):
    """The response is shorter than its Content-Length."""


@dataclass(frozen=True)
class RemoteTextEncoder:
    """The text encoder at `url`, with the interface of `engine.text.encoder.TextEncoder`. Sends nothing before the
    first prompt. Equal instances return equal contexts, so an instance is a cache key.

    url: http or https. token: sent as a bearer token, None for none. recipe, width, label: the text recipe, context
    width and display name of the checkpoint. timeout: seconds for one response, from connecting to its last byte.
    sleep: called with seconds.
    """

    url: str
    token: str | None = field(repr=False)
    recipe: TextRecipe
    width: int
    label: str = field(compare=False)
    timeout: float = field(default=ENCODE_TIMEOUT_SECONDS, compare=False, kw_only=True)
    sleep: Callable[[float], None] = field(default=time.sleep, compare=False, kw_only=True)

    @property
    def host(self) -> str:
        """Host and port for messages, without credentials, path and query."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def encode(self, prompts: Sequence[str], progress: ProgressCallback = ignore_progress) -> EncodedPrompts:
        """Returns the contexts [B, L, width] on the CPU, in the dtype that the server sent (16 or 32 bits).

        Only this project's own server reports `truncated_tokens`; they are 0 for other services. `progress` is called
        while waiting and may raise to cancel. Raises `RemoteTextError`.
        """
        for delay in (*ENCODE_RETRY_DELAYS_SECONDS, None):
            response = self._post(prompts, progress)
            if response.status not in BUSY or delay is None:
                break
            seconds = _parse_retry_after(response.headers.get("Retry-After"))
            if seconds is not None and seconds > MAX_ENCODE_RETRY_DELAY_SECONDS:
                raise RemoteTextError(
                    f"The text encoder at {self.host} is too busy, and asks to come back in {seconds:.0f} s: do so, or "
                    f"{_ENCODE_LOCALLY_HINT}."
                )
            self._wait(delay if seconds is None else seconds, progress)
        if response.status != OK:
            raise RemoteTextError(self._refusal(response))
        return self._parse_context(response, len(prompts))

    def _post(self, prompts: Sequence[str], progress: ProgressCallback) -> _HttpResponse:
        """Sends one request in its own thread, so that cancelling takes effect at once however slow the server is."""
        request = Request(
            self.url,
            data=json.dumps({"prompt": list(prompts)}).encode(),
            headers={
                "User-Agent": f"flux2-studio/{__version__}",
                "Content-Type": "application/json",
                "Accept": f"{tensor_codec.SAFETENSORS_MEDIA_TYPE}, {tensor_codec.TORCH_MEDIA_TYPE};q=0.5, */*;q=0.1",
            },
            method="POST",
        )
        if self.token:
            request.add_header("Authorization", f"Bearer {self.token}")
        max_bytes = tensor_codec.max_packed_bytes(len(prompts), self.recipe.length, self.width)
        results: queue.SimpleQueue[_HttpResponse | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def exchange() -> None:
            try:
                with _make_opener().open(request, timeout=self.timeout) as response:
                    body = _read_body(response, max_bytes, abandoned) if response.status == OK else b""
                    results.put(_HttpResponse(response.status, response.headers, body))
            except BaseException as error:  # noqa: BLE001 -- the waiting thread handles it
                results.put(error)

        # A daemon thread: an abandoned request ends at its socket timeout, and nothing waits for it.
        threading.Thread(target=exchange, name="flux2-remote-text", daemon=True).start()
        deadline = time.monotonic() + self.timeout
        try:
            while True:
                progress(f"Waiting for the text encoder at {self.host}", None)
                try:
                    result = results.get(timeout=ENCODE_POLL_SECONDS)
                except queue.Empty:
                    if time.monotonic() < deadline:
                        continue
                    result = TimeoutError()
                if isinstance(result, _HttpResponse):
                    return result
                if not isinstance(
                    result, OSError | HTTPException | UnicodeError | _ResponseTooLarge | _ResponseTruncated
                ):
                    raise result
                raise RemoteTextError(self._failure(result)) from None
        finally:
            abandoned.set()

    def _wait(self, seconds: float, progress: ProgressCallback) -> None:
        while seconds > 0:
            progress(f"The text encoder at {self.host} is busy: asking again in {seconds:.0f} s", None)
            self.sleep(min(ENCODE_POLL_SECONDS, seconds))
            seconds -= ENCODE_POLL_SECONDS

    def _parse_context(self, answer: _HttpResponse, prompts: int) -> EncodedPrompts:
        try:
            context = tensor_codec.unpack_tensor(answer.body)
        except tensor_codec.UnreadableTensor as error:
            got = "a web page" if answer.body.lstrip().startswith(b"<") else error
            raise RemoteTextError(
                f"What answers at {self.host} gave {got} instead of a prompt's context: set FLUX2_TEXT_ENCODER_URL "
                f"to a text encoder for FLUX.2, or {_ENCODE_LOCALLY_HINT}."
            ) from None
        length = self.recipe.length
        if context.ndim == 3 and context.shape[2] != self.width:
            raise RemoteTextError(
                f"The service encodes for another checkpoint: it gave width {context.shape[2]}, {self.label} reads "
                f"{self.width}. Set FLUX2_TEXT_ENCODER_FOR to the checkpoint that {self.host} is for, or "
                f"FLUX2_TEXT_ENCODER_URL to a service for {self.label}."
            )
        if context.shape != (prompts, length, self.width):
            raise RemoteTextError(
                f"The text encoder at {self.host} gave a tensor of shape {list(context.shape)} where {self.label} "
                f"reads {[prompts, length, self.width]}: it does not encode as FLUX.2 needs it. Set "
                f"FLUX2_TEXT_ENCODER_URL to another one, or {_ENCODE_LOCALLY_HINT}."
            )
        if not torch.isfinite(context).all():
            raise RemoteTextError(
                f"The text encoder at {self.host} gave numbers that are none (NaN or infinite), which no picture can "
                f"be drawn from: it may be broken or run at too low a precision. Restart it, or {_ENCODE_LOCALLY_HINT}."
            )
        truncated = answer.headers.get(tensor_codec.TRUNCATED_TOKENS_HEADER, ",".join("0" * prompts))
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", truncated) or len(truncated.split(",")) != prompts:
            raise RemoteTextError(
                f"The text encoder at {self.host} counts the tokens that it left out in a way we do not know: is it "
                f"another version of flux2-studio? Install the same one on both machines."
            )
        return EncodedPrompts(context, tuple(int(count) for count in truncated.split(",")))

    def _refusal(self, answer: _HttpResponse) -> str:
        """Returns the message for a status other than 200."""
        service, status = f"The text encoder at {self.host}", answer.status
        if status == 401 and self.token is None:
            return f"{service} asks for a token: set FLUX2_TEXT_ENCODER_TOKEN to it, or {_ENCODE_LOCALLY_HINT}."
        if status == 401:
            return (
                f"{service} does not accept the token in FLUX2_TEXT_ENCODER_TOKEN: set the right one, or "
                f"{_ENCODE_LOCALLY_HINT}."
            )
        if status == 403:
            return (
                f"{service} does not let you in: it may want another token (FLUX2_TEXT_ENCODER_TOKEN), or a licence "
                f"accepted first. See to that, or {_ENCODE_LOCALLY_HINT}."
            )
        if status in (404, 405):
            return (
                f"There is no text encoder at that path of {self.host} (HTTP {status}): correct "
                f"FLUX2_TEXT_ENCODER_URL (the path of flux2-studio's own encode-server is /, that of Hugging Face's "
                f"service /predict), or {_ENCODE_LOCALLY_HINT}."
            )
        if status in REDIRECTS:
            return (
                f"What answers at {self.host} sends us on to another address, where we do not take the prompt and the "
                "token: look where it leads, and set FLUX2_TEXT_ENCODER_URL to that if you trust it, or "
                f"{_ENCODE_LOCALLY_HINT}."
            )
        if status in BUSY:
            return f"{service} is too busy at the moment (HTTP {status}): try again later, or {_ENCODE_LOCALLY_HINT}."
        if status >= 500:
            return (
                f"{service} has trouble (HTTP {status}): look at its log, try again later, or {_ENCODE_LOCALLY_HINT}."
            )
        return (
            f"{service} does not take the prompt (HTTP {status}): shorten it, make sure that FLUX2_TEXT_ENCODER_URL is "
            f"a text encoder for FLUX.2, or {_ENCODE_LOCALLY_HINT}."
        )

    def _failure(self, error: Exception) -> str:
        """Returns the message for a request that failed without a response."""
        reason = error.reason if isinstance(error, URLError) else error
        service = f"The text encoder at {self.host}"
        if isinstance(reason, _ResponseTooLarge):
            return (
                f"{service} sends more than {self.label} can read, so it was not listened to any longer: it is for "
                f"another checkpoint, or no text encoder. Correct FLUX2_TEXT_ENCODER_URL or FLUX2_TEXT_ENCODER_FOR, or "
                f"{_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, TimeoutError):
            return (
                f"{service} did not answer within {self.timeout:.0f} s: it is overloaded, still starting, or behind "
                f"a firewall. Try again, look at that machine, or {_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, socket.gaierror | UnicodeError):  # UnicodeError: not a valid host name
            return (
                f"There is no machine called {self.host}, or it cannot be looked up from here: check "
                f"FLUX2_TEXT_ENCODER_URL and the network, or {_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, ssl.SSLCertVerificationError):
            return (
                f"{self.host} cannot prove that it is that machine (its certificate is not valid): check "
                f"FLUX2_TEXT_ENCODER_URL and that certificate, or {_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, ssl.SSLError):
            return (
                f"{self.host} does not speak HTTPS as it should: if it speaks plain HTTP, write http:// in "
                f"FLUX2_TEXT_ENCODER_URL, or {_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, ConnectionRefusedError):
            return (
                f"Nothing answers at {self.host}: start the text encoder there (`flux2-studio encode-server`), "
                f"correct FLUX2_TEXT_ENCODER_URL, or {_ENCODE_LOCALLY_HINT}."
            )
        if isinstance(reason, _ResponseTruncated | ConnectionError | HTTPException):
            return (
                f"The connection to {self.host} broke off before its answer was whole: try again; if that does not "
                f"help, look at that machine's log, or {_ENCODE_LOCALLY_HINT}."
            )
        return (
            f"{self.host} cannot be reached from here: check the network, the proxy and FLUX2_TEXT_ENCODER_URL, or "
            f"{_ENCODE_LOCALLY_HINT}."
        )


def _make_opener() -> OpenerDirector:
    """Returns an opener that neither follows redirects nor raises for a status, with the environment's proxies."""
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _read_body(response: HTTPResponse, max_bytes: int, abandoned: threading.Event) -> bytes:
    """Reads the body until it ends or `abandoned` is set. Raises `_ResponseTooLarge` beyond `max_bytes` bytes,
    `_ResponseTruncated` if it is shorter than its Content-Length."""
    content_length = response.length
    if content_length is not None and content_length > max_bytes:
        raise _ResponseTooLarge
    body = bytearray()
    while not abandoned.is_set() and (chunk := response.read1(READ_CHUNK_BYTES)):
        body += chunk
        if len(body) > max_bytes:
            raise _ResponseTooLarge
    if content_length is not None and len(body) < content_length:
        raise _ResponseTruncated
    return bytes(body)


def _parse_retry_after(retry_after: str | None) -> float | None:
    """Returns Retry-After (a number or a date, RFC 9110, 10.2.3) in seconds, None if it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
