"""A text encoder on another machine: prompts go there over HTTP, contexts come back.

It is asked as the service is that Hugging Face runs for FLUX.2 dev (diffusers' `Flux2RemoteTextEncoderStep` is its
reference): POST {"prompt": [...]} with a bearer token, and a tensor [B, L, W] comes back as torch.save writes it. Our
own `remote/text_server.py` gives safetensors instead, which we prefer, and tells how much of a prompt it left out.

The other side may be slow, gone, someone else's, or hostile. Its answer is read up to the size that a context can have,
looked at before it is used, and not followed anywhere: a redirect would take the token along. Nothing of its words, nor
of an error's own text, is passed on: they may hold the token.
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

ENCODE_TIMEOUT_SECONDS = 120.0  # seconds for one answer: an encoder of 24B on a processor takes about as long
ENCODE_RETRY_DELAYS_SECONDS = (2.0, 5.0)  # seconds before asking a busy service again, where it does not say itself
MAX_ENCODE_RETRY_DELAY_SECONDS = 30.0  # seconds; whoever asks for more is not waited for
ENCODE_POLL_SECONDS = 0.1  # seconds between two looks at whether the run was stopped
READ_CHUNK_BYTES = 2**16  # bytes

_ENCODE_LOCALLY_HINT = "unset FLUX2_TEXT_ENCODER_URL to read prompts on this machine"  # the way out of every error

OK, REDIRECTS, BUSY = 200, range(300, 400), (429, 503)  # HTTP


@dataclass(frozen=True)
class _HttpResponse:
    status: int
    headers: Message
    body: bytes


class _ResponseTooLarge(Exception):
    """More comes than a context can have."""


class _ResponseTruncated(Exception):
    """Less came than was announced."""


def _ignore_progress(text: str, fraction: float | None) -> None:
    pass


@dataclass(frozen=True)
class RemoteTextEncoder:
    """The text encoder at `url`, used like an `engine.text.TextEncoder`. Asks nothing before the first prompt.

    url: http or https. token: sent as a bearer token, None for none. recipe: of the checkpoint, which reads contexts of
    `width`; label: what to call it. timeout: seconds for one answer, from connecting to its last byte. sleep: sleeps
    for so many seconds. Those that are equal give the same contexts.
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
        """Where it is, as users are told: without a name and password, and without a query."""
        return urlsplit(self.url).netloc.rpartition("@")[2]

    def encode(self, prompts: Sequence[str], progress: ProgressCallback = _ignore_progress) -> EncodedPrompts:
        """The context of each prompt [B, L, width], on the CPU, in the precision in which it came (16 or 32 bits).

        `cut` is known of our own server only; 0 stands for services that do not tell. `progress` is called while we
        wait, and may raise to give up. Raises `RemoteTextError`.
        """
        for wait in (*ENCODE_RETRY_DELAYS_SECONDS, None):
            answer = self._post(prompts, progress)
            if answer.status not in BUSY or wait is None:
                break
            asked = _parse_retry_after(answer.headers.get("Retry-After"))
            if asked is not None and asked > MAX_ENCODE_RETRY_DELAY_SECONDS:
                raise RemoteTextError(
                    f"The text encoder at {self.host} is too busy, and asks to come back in {asked:.0f} s: do so, or "
                    f"{_ENCODE_LOCALLY_HINT}."
                )
            self._wait(wait if asked is None else asked, progress)
        if answer.status != OK:
            raise RemoteTextError(self._refusal(answer))
        return self._parse_context(answer, len(prompts))

    def _post(self, prompts: Sequence[str], progress: ProgressCallback) -> _HttpResponse:
        """One request, in a thread of its own: however slow the other side is, stopping takes effect at once."""
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
        most = tensor_codec.max_packed_bytes(len(prompts), self.recipe.length, self.width)
        came: queue.SimpleQueue[_HttpResponse | BaseException] = queue.SimpleQueue()
        abandoned = threading.Event()

        def exchange() -> None:
            try:
                with _opener().open(request, timeout=self.timeout) as response:
                    body = _read(response, most, abandoned) if response.status == OK else b""
                    came.put(_HttpResponse(response.status, response.headers, body))
            except BaseException as error:  # noqa: BLE001 -- whoever waits gets it
                came.put(error)

        # A daemon: what is abandoned ends with its socket's patience, and nobody waits for that.
        threading.Thread(target=exchange, name="flux2-remote-text", daemon=True).start()
        deadline = time.monotonic() + self.timeout
        try:
            while True:
                progress(f"Waiting for the text encoder at {self.host}", None)
                try:
                    answer = came.get(timeout=ENCODE_POLL_SECONDS)
                except queue.Empty:
                    if time.monotonic() < deadline:
                        continue
                    answer = TimeoutError()
                if isinstance(answer, _HttpResponse):
                    return answer
                if not isinstance(
                    answer, OSError | HTTPException | UnicodeError | _ResponseTooLarge | _ResponseTruncated
                ):
                    raise answer
                raise RemoteTextError(self._failure(answer)) from None
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
            found = "a web page" if answer.body.lstrip().startswith(b"<") else error
            raise RemoteTextError(
                f"What answers at {self.host} gave {found} instead of a prompt's context: set FLUX2_TEXT_ENCODER_URL "
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
        cut = answer.headers.get(tensor_codec.TRUNCATED_TOKENS_HEADER, ",".join("0" * prompts))
        if not re.fullmatch(r"\d{1,9}(,\d{1,9})*", cut) or len(cut.split(",")) != prompts:
            raise RemoteTextError(
                f"The text encoder at {self.host} counts the tokens that it left out in a way we do not know: is it "
                f"another version of flux2-studio? Install the same one on both machines."
            )
        return EncodedPrompts(context, tuple(int(count) for count in cut.split(",")))

    def _refusal(self, answer: _HttpResponse) -> str:
        """Any status but 200, in words."""
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
        """What kept an answer from coming, in words."""
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
        if isinstance(reason, socket.gaierror | UnicodeError):  # the latter: no name that a machine can have
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


def _opener() -> OpenerDirector:
    """Neither follows redirects nor raises for a status; proxies are the environment's, as everywhere."""
    opener = OpenerDirector()
    for handler in (ProxyHandler(), HTTPHandler(), HTTPSHandler()):
        opener.add_handler(handler)
    return opener


def _read(response: HTTPResponse, most: int, abandoned: threading.Event) -> bytes:
    """The body. Raises `_ResponseTooLarge` beyond `most` bytes, `_ResponseTruncated` where it ends too early."""
    announced = response.length
    if announced is not None and announced > most:
        raise _ResponseTooLarge
    body = bytearray()
    while not abandoned.is_set() and (chunk := response.read1(READ_CHUNK_BYTES)):
        body += chunk
        if len(body) > most:
            raise _ResponseTooLarge
    if announced is not None and len(body) < announced:
        raise _ResponseTruncated
    return bytes(body)


def _parse_retry_after(retry_after: str | None) -> float | None:
    """Retry-After in seconds: a number or a date (RFC 9110, 10.2.3); None where it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None
