"""Prompt enhancement by a language model: one on this machine, or one behind OpenRouter or any OpenAI-compatible server
(vLLM, llama.cpp, Ollama, ...).

`upsample_prompt` yields the text in pieces and returns the prompt, or raises `UpsampleError`. Nothing falls back to the
original prompt. The server behind `ChatServerUpsampler` may be slow, gone or hostile: its error texts are not passed
on, redirects are not followed, and the key is added to each HTTP request at the last moment, out of reach of everything
that logs or prints.
"""

from __future__ import annotations

import asyncio
import base64
import io
import queue
import re
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Sequence
from contextlib import aclosing, closing, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

from PIL import Image

from flux2_studio.checkpoints import Checkpoint, LocalWriter
from flux2_studio.errors import UpsampleError
from flux2_studio.prompting.instructions import PromptMode, build_instructions
from flux2_studio.prompting.replies import (
    OR_WITHOUT_ENHANCING,
    ParsedReply,
    max_reply_characters,
    parse_reply,
    reply_too_long_error,
)
from flux2_studio.prompting.server_errors import ChatServer, ChatServerError
from flux2_studio.request import SAMPLING_LIMITS
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from flux2_studio.engine.text.writer import Writer

# Pixels of the long side of a single reference, and of each of several, as language models receive them.
SINGLE_REFERENCE_SIDE, MULTI_REFERENCE_SIDE = 768, 512
JPEG_QUALITY = 85
CHAT_CONNECT_TIMEOUT_SECONDS = 15.0  # seconds to reach a server
CHAT_IDLE_TIMEOUT_SECONDS = 120.0  # seconds without any data; a local server may load its model first
CHAT_TOTAL_TIMEOUT_SECONDS = 600.0  # seconds for a whole reply, including retries
CHAT_RETRY_DELAYS_SECONDS = (1.0, 4.0)  # seconds before a retry, without a Retry-After header
MAX_CHAT_RETRY_DELAY_SECONDS = 30.0  # seconds; a longer Retry-After is an error
CHAT_POLL_SECONDS = 0.1  # seconds between checks for cancellation

_HEADERS = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
_API_KEY_PATTERN = re.compile(r"[!-~]+")


class ApiKey:
    """An API key that printing, copying or pickling cannot expose. Raises `UpsampleError` if it is malformed."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        if not _API_KEY_PATTERN.fullmatch(self._text):
            raise UpsampleError(f"That is no API key: copy it again, without blanks, {OR_WITHOUT_ENHANCING}.")

    def reveal(self) -> str:
        """Return the key itself, for an HTTP header and nothing else."""
        return self._text

    def __repr__(self) -> str:
        return "ApiKey(...)"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError("an API key is not written down")


@dataclass(frozen=True, kw_only=True)
class RemoteModel:
    """A model offered in the list: its name at OpenRouter, and its label for users."""

    name: str
    label: str


# All of them have vision. Users may type any other name.
REMOTE_MODELS = (
    RemoteModel(name="mistralai/mistral-small-3.2-24b-instruct", label="Mistral Small 3.2, dev's own text encoder"),
    RemoteModel(name="qwen/qwen3-vl-235b-a22b-instruct", label="Qwen3-VL 235B"),
    RemoteModel(name="qwen/qwen3-vl-8b-instruct", label="Qwen3-VL 8B, small and cheap"),
    RemoteModel(name="mistralai/pixtral-large-2411", label="Pixtral Large, the official tools' choice"),
    RemoteModel(name="google/gemini-2.5-flash", label="Gemini 2.5 Flash"),
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """Sampling settings of a language model. Temperature 0 is greedy; top_p is nucleus sampling. Raises `UpsampleError`
    for values outside `SAMPLING_LIMITS`."""

    temperature: float = 0.15
    top_p: float = 1.0
    max_tokens: int = 768

    def __post_init__(self) -> None:
        for name, (low, high) in SAMPLING_LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UpsampleError(f"Set {name} to a number from {low:g} to {high:g}, {OR_WITHOUT_ENHANCING}.")


def no_local_writers_message(checkpoint: Checkpoint) -> str:
    """Return why no local language model is offered for `checkpoint`, and what to do."""
    return (
        f"{checkpoint.label} has no language model on this machine that could enhance prompts: choose OpenRouter or "
        f"your server, a checkpoint that is no toy, {OR_WITHOUT_ENHANCING}."
    )


class PromptUpsampler(Protocol):
    """A language model that enhances prompts. label: its name for users. has_vision: whether it sees references."""

    label: str
    has_vision: bool

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        mode: PromptMode,
        *,
        seed: int,
        cancelled: Callable[[], bool],
    ) -> Generator[str, None, None]:
        """Yield the reply in pieces; end silently once `cancelled`. Raises `UpsampleError`."""
        ...


def upsample_prompt(
    upsampler: PromptUpsampler,
    prompt: str,
    references: Sequence[Image.Image] = (),
    mode: PromptMode = "generate",
    *,
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[str, None, ParsedReply | None]:
    """Yield the reply to `prompt` in pieces; return the enhanced prompt, or None once `cancelled`.

    The pieces are the model's raw text; the returned prompt may lack a wrapping. Raises `UpsampleError`.
    """
    text = ""
    with closing(upsampler.stream(prompt, references, mode, seed=seed, cancelled=cancelled)) as pieces:
        for piece in pieces:
            text += piece
            if len(text) > max_reply_characters(prompt):
                raise reply_too_long_error(len(text), prompt)
            yield piece
    if cancelled():
        return None
    reply = parse_reply(text, prompt)
    if references and not upsampler.has_vision:
        return replace(reply, notes=(unseen_references_note(upsampler), *reply.notes))
    return reply


def unseen_references_note(upsampler: PromptUpsampler) -> str:
    """Return the note for users that `upsampler` cannot see their references."""
    return f"{upsampler.label} reads text only: it enhanced the prompt without seeing the references."


def shrink_references(references: Sequence[Image.Image]) -> list[Image.Image]:
    """Return copies of `references` in RGB, at the size that models receive, without metadata."""
    side = SINGLE_REFERENCE_SIDE if len(references) == 1 else MULTI_REFERENCE_SIDE
    small = []
    for reference in references:
        image = reference.convert("RGB")  # a copy
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.info.clear()
        small.append(image)
    return small


class LocalUpsampler:
    """A language model on this machine: `writer`, loaded from `model`. sampling: None for the model's defaults."""

    def __init__(self, writer: Writer, model: LocalWriter, sampling: SamplingParams | None = None) -> None:
        self.label = model.label
        self.has_vision = writer.has_vision
        self._writer = writer
        self._sampling = sampling or SamplingParams(temperature=model.temperature, top_p=model.top_p)

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        mode: PromptMode,
        *,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, None]:
        """See `PromptUpsampler`."""
        from flux2_studio.images.tensors import pixels_from_image  # imports torch

        ended = yield from self._writer.write(
            build_instructions(mode, len(references), seen=self.has_vision),
            prompt,
            [pixels_from_image(image) for image in shrink_references(references)] if self.has_vision else [],
            seed=seed,
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            cancelled=cancelled,
        )
        if not ended and not cancelled():
            raise UpsampleError(_cut_off_message(self.label, self._sampling))


class ChatServerUpsampler:
    """A language model at OpenRouter, or at any OpenAI-compatible server. Sends nothing before `stream`.

    url: http or https, with the path before /chat/completions. key: None for a server without keys. idle_timeout:
    seconds without any data; total_timeout: for the whole reply. sleep: waits the given seconds before a busy server is
    asked again. Do not use it inside an asyncio event loop. Raises `UpsampleError` for an invalid model name or a
    missing key.
    """

    has_vision = True  # the server rejects pictures if the model has no vision

    def __init__(
        self,
        url: str,
        model: str,
        key: ApiKey | None,
        sampling: SamplingParams | None = None,
        *,
        idle_timeout: float = CHAT_IDLE_TIMEOUT_SECONDS,
        total_timeout: float = CHAT_TOTAL_TIMEOUT_SECONDS,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.label = model.strip()
        self._server = ChatServer(url=url, model=self.label, has_key=key is not None)
        self._key = key
        self._sampling = sampling or SamplingParams()
        self._patience = idle_timeout
        self._longest = total_timeout
        self._sleep = sleep
        if not 0 < len(self.label) <= 200 or not self.label.isprintable():
            raise UpsampleError(f"Choose a language model or type its name, {OR_WITHOUT_ENHANCING}.")
        if key is None and self._server.is_openrouter:
            raise UpsampleError(
                f"OpenRouter needs an API key: get one at https://openrouter.ai/keys and type it on the page, or set "
                f"OPENROUTER_API_KEY, {OR_WITHOUT_ENHANCING}."
            )

    @classmethod
    def from_settings(
        cls,
        settings: Settings,
        model: str | None = None,
        key: ApiKey | None = None,
        sampling: SamplingParams | None = None,
    ) -> Self:
        """Create one for the server of `settings`. model, key: the user's own, which take precedence."""
        if key is None and settings.openrouter_key:
            key = ApiKey(settings.openrouter_key)
        model = model or settings.openrouter_model or REMOTE_MODELS[0].name
        return cls(settings.openrouter_url, model, key, sampling)

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        mode: PromptMode,
        *,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, None]:
        """See `PromptUpsampler`."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": build_instructions(mode, len(references), seen=True)},
            {"role": "user", "content": _content(prompt, references)},
        ]
        deadline = time.monotonic() + self._longest
        for piece in _iterate_async_in_thread(self._stream_with_retries(messages, seed), cancelled):
            if piece:
                yield piece
            if time.monotonic() > deadline:
                raise UpsampleError(str(self._server.timeout_error(self._longest)))

    async def _stream_with_retries(self, messages: list[dict[str, Any]], seed: int) -> AsyncGenerator[str, None]:
        """Yield the reply; retry a busy or failing server, unless it has already sent text."""
        for default_delay in (*CHAT_RETRY_DELAYS_SECONDS, None):
            has_yielded = False
            failure: ChatServerError | None = None
            try:
                async with aclosing(self._stream_once(messages, seed)) as pieces:
                    async for piece in pieces:
                        has_yielded = True
                        yield piece
            except ChatServerError as error:
                failure = error
            if failure is None:
                return
            delay = default_delay if failure.retry_delay is None else failure.retry_delay
            if (
                has_yielded
                or not failure.is_retryable
                or default_delay is None
                or delay is None
                or delay > MAX_CHAT_RETRY_DELAY_SECONDS
            ):
                raise UpsampleError(str(failure))
            await self._sleep(delay)

    async def _stream_once(self, messages: list[dict[str, Any]], seed: int) -> AsyncGenerator[str, None]:
        import openai  # takes a second, and most runs do not need it

        text, finish_reason, content_type = "", None, ""
        failure: ChatServerError | None = None
        # The package's exceptions hold the HTTP request with the key, so none of them may leave this method.
        async with self._client() as client:
            try:
                stream: Any = await client.chat.completions.create(
                    model=self.label,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=self._sampling.temperature,
                    top_p=self._sampling.top_p,
                    max_tokens=self._sampling.max_tokens,
                    seed=seed % 2**31,  # some servers reject larger seeds
                    stream=True,
                )
                content_type = stream.response.headers.get("content-type", "").partition(";")[0].strip().lower()
                async for chunk in stream:
                    piece, reason_in_chunk = _parse_chunk(chunk)
                    finish_reason = finish_reason or reason_in_chunk
                    text += piece
                    if self._key is not None and self._key.reveal() in text:
                        failure = self._server.key_leak_error()
                        break
                    if piece:
                        yield piece
            except openai.APIStatusError as error:
                failure = self._server.status_error(error.status_code, error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                failure = self._server.timeout_error(self._patience)
            except openai.APIConnectionError as error:
                failure = self._server.interrupted_error() if content_type else self._server.connection_error(error)
            except openai.APIError as error:  # OpenRouter reports errors like this after HTTP 200
                code = str(error.body.get("code")) if isinstance(error.body, dict) else ""
                failure = self._server.status_error(int(code) if re.fullmatch(r"[345]\d\d", code) else 500)
            except ValueError:  # invalid JSON or UTF-8
                failure = self._server.protocol_error()
        if failure := failure or self._check_ending(text, finish_reason, content_type):
            raise failure

    def _client(self) -> AsyncOpenAI:
        import openai

        async def rewrite_headers(request: Any) -> None:
            """Remove all but the necessary headers (the package adds some from the environment); add the key."""
            for name in list(request.headers):
                if name.lower() not in _HEADERS:
                    del request.headers[name]
            if self._key is not None:
                request.headers["Authorization"] = f"Bearer {self._key.reveal()}"

        http = openai.DefaultAsyncHttpxClient(
            timeout=openai.Timeout(self._patience, connect=min(CHAT_CONNECT_TIMEOUT_SECONDS, self._patience)),
            follow_redirects=False,
            event_hooks={"request": [rewrite_headers]},
        )
        return openai.AsyncOpenAI(api_key="put on later", base_url=self._server.url, max_retries=0, http_client=http)

    def _check_ending(self, text: str, reason: str | None, kind: str) -> ChatServerError | None:
        """Return the error of a reply that has ended; None if it is complete."""
        if reason == "length":
            return ChatServerError(_cut_off_message(self.label, self._sampling))
        if reason == "content_filter":
            return self._server.moderation_error()
        if reason == "error":
            return self._server.status_error(502)
        if not text and kind != "text/event-stream":
            return self._server.protocol_error()
        return self._server.interrupted_error() if text and reason is None else None


def _iterate_async_in_thread(
    pieces: AsyncGenerator[str, None], cancelled: Callable[[], bool]
) -> Generator[str, None, None]:
    """Yield `pieces` as they arrive, and an empty string every `CHAT_POLL_SECONDS` in between; end once `cancelled`.

    The event loop runs in its own thread, because the caller's thread may already run one (in a notebook, for example).
    However the generator ends, the request is cancelled, its connection closed and the thread joined.
    """
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None marks the end
    loop = asyncio.new_event_loop()

    async def follow() -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                arrived.put(piece)

    task = loop.create_task(follow())

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait({task}))
            # Abandoned async generators of the package get a task each that closes them.
            loop.run_until_complete(asyncio.sleep(0))
            if pending := asyncio.all_tasks(loop):
                loop.run_until_complete(asyncio.wait(pending, timeout=CHAT_POLL_SECONDS))
        finally:
            loop.close()
            arrived.put(None)

    thread = threading.Thread(target=run, name="upsampling", daemon=True)
    thread.start()
    try:
        while not cancelled():
            try:
                piece = arrived.get(timeout=CHAT_POLL_SECONDS)
            except queue.Empty:
                piece = ""
            if piece is None:
                break
            yield piece
    finally:
        with suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(task.cancel)
        thread.join()
    if not task.cancelled():
        task.result()  # raises what it failed with


def _parse_chunk(chunk: Any) -> tuple[str, str | None]:
    """Return the text in a chunk of a reply, and the finish reason if there is one.

    Servers omit and add fields: usage comes without choices; reasoning comes in its own fields, which are ignored.
    """
    choices = getattr(chunk, "choices", None)
    if not isinstance(choices, list) or not choices:
        return "", None
    delta, reason = getattr(choices[0], "delta", None), getattr(choices[0], "finish_reason", None)
    if getattr(delta, "refusal", None):
        return "", "content_filter"
    text = getattr(delta, "content", None) or ""
    return (text if isinstance(text, str) else "\ufffd"), (reason if isinstance(reason, str) else None)


def _content(prompt: str, references: Sequence[Image.Image]) -> str | list[dict[str, Any]]:
    if not references:
        return prompt  # servers without vision accept only a string
    parts: list[dict[str, Any]] = []
    for number, image in enumerate(shrink_references(references), start=1):
        parts.append({"type": "text", "text": f"Image {number}:"})
        parts.append({"type": "image_url", "image_url": {"url": _data_url(image)}})
    return [*parts, {"type": "text", "text": prompt}]


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _cut_off_message(label: str, sampling: SamplingParams) -> str:
    return (
        f"{label} was not done after {sampling.max_tokens} tokens, so the prompt would end in the middle: allow it "
        f"more of them, choose another model, {OR_WITHOUT_ENHANCING}."
    )
