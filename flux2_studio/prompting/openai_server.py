"""Prompts enriched by a language model: one on this machine, or one behind OpenRouter or any server that speaks its
protocol (vLLM, llama.cpp, Ollama, ...).

`upsample_prompt` is the whole of it: pieces of text as they come, then the prompt, or an `UpsampleError`. Nothing falls
back to the prompt as it was. The other side of `ChatServerUpsampler` may be slow, gone or hostile: what it says in its
errors is not passed on, redirects are not followed, and the key is put on each request at the last moment, out of reach
of everything that logs or prints.
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

SINGLE_REFERENCE_SIDE, MULTI_REFERENCE_SIDE = (
    768,
    512,
)  # pixels: the long side of one reference, and of each of several, as a model sees them
JPEG_QUALITY = 85
CHAT_CONNECT_TIMEOUT_SECONDS = 15.0  # seconds to reach a server
CHAT_IDLE_TIMEOUT_SECONDS = 120.0  # seconds without any sign of life: one's own server may load its model first
CHAT_TOTAL_TIMEOUT_SECONDS = 600.0  # seconds for an answer altogether, waits included
CHAT_RETRY_DELAYS_SECONDS = (1.0, 4.0)  # seconds before asking a busy server again, where it does not say itself
MAX_CHAT_RETRY_DELAY_SECONDS = 30.0  # seconds; a server that asks for more is not waited for
CHAT_POLL_SECONDS = 0.1  # seconds between two looks at whether the run was stopped

_HEADERS = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
_API_KEY_PATTERN = re.compile(r"[!-~]+")


class ApiKey:
    """A key, kept from whatever prints, copies or stores objects. Raises `UpsampleError` for what is none."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        if not _API_KEY_PATTERN.fullmatch(self._text):
            raise UpsampleError(f"That is no API key: copy it again, without blanks, {OR_WITHOUT_ENHANCING}.")

    def reveal(self) -> str:
        """The key itself, for a request's header and nothing else."""
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
    """A model offered in the list: its name at OpenRouter, and what to call it."""

    name: str
    label: str


# All of them see pictures. Any other name may be typed.
REMOTE_MODELS = (
    RemoteModel(name="mistralai/mistral-small-3.2-24b-instruct", label="Mistral Small 3.2, dev's own text encoder"),
    RemoteModel(name="qwen/qwen3-vl-235b-a22b-instruct", label="Qwen3-VL 235B"),
    RemoteModel(name="qwen/qwen3-vl-8b-instruct", label="Qwen3-VL 8B, small and cheap"),
    RemoteModel(name="mistralai/pixtral-large-2411", label="Pixtral Large, the official tools' choice"),
    RemoteModel(name="google/gemini-2.5-flash", label="Gemini 2.5 Flash"),
)


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a model chooses its words. Temperature 0 takes the likeliest each time; top_p keeps those that make up so
    much of the probability. Raises `UpsampleError` for what no model takes."""

    temperature: float = 0.15
    top_p: float = 1.0
    max_tokens: int = 768

    def __post_init__(self) -> None:
        for name, (low, high) in SAMPLING_LIMITS.items():
            if not low <= getattr(self, name) <= high:
                raise UpsampleError(f"Set {name} to a number from {low:g} to {high:g}, {OR_WITHOUT_ENHANCING}.")


def no_local_writers_message(checkpoint: Checkpoint) -> str:
    """Why no language model on this machine is offered for `checkpoint`, and what to do."""
    return (
        f"{checkpoint.label} has no language model on this machine that could enrich prompts: choose OpenRouter or "
        f"your server, a checkpoint that is no toy, {OR_WITHOUT_ENHANCING}."
    )


class PromptUpsampler(Protocol):
    """A language model that enriches prompts. label: what users call it. has_vision: whether it looks at references."""

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
        """The answer in pieces, as they come; it just ends once `cancelled`. Raises `UpsampleError`."""
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
    """Yields the answer to `prompt` in pieces, as they come; returns the enriched prompt, or None once `cancelled`.

    The pieces together are what the model wrote, of which a wrapping may be taken off. Raises `UpsampleError`.
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
    answer = parse_reply(text, prompt)
    if references and not upsampler.has_vision:
        return replace(answer, notes=(unseen_references_note(upsampler), *answer.notes))
    return answer


def unseen_references_note(upsampler: PromptUpsampler) -> str:
    """What users are told where `upsampler` cannot look at their references."""
    return f"{upsampler.label} reads text only: it enriched the prompt without seeing the references."


def shrink_references(references: Sequence[Image.Image]) -> list[Image.Image]:
    """`references` at the size at which models see them, in RGB, with nothing but their pixels."""
    side = SINGLE_REFERENCE_SIDE if len(references) == 1 else MULTI_REFERENCE_SIDE
    small = []
    for reference in references:
        image = reference.convert("RGB")  # a copy
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.info.clear()
        small.append(image)
    return small


class LocalUpsampler:
    """A language model on this machine: `writer`, loaded from the files of `model`, which also says how to sample."""

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
    """A language model at OpenRouter, or at any OpenAI-compatible server. Asks nothing before `stream`.

    url: http or https, with the path before /chat/completions. key: None for a server that wants none. patience:
    seconds without a sign of life; longest: for the whole. sleep: waits so many seconds before a busy server is asked
    again. Not to be used from inside an asyncio event loop. Raises `UpsampleError` for what cannot be asked.
    """

    has_vision = True  # what a model has no eyes for, its server refuses

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
        """The server of `settings`. model, key: a user's own, which go before those of `settings`."""
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
        """The answer; a server that is busy or in trouble is asked again, unless it has begun to speak."""
        for wait in (*CHAT_RETRY_DELAYS_SECONDS, None):
            spoken = False
            trouble: ChatServerError | None = None
            try:
                async with aclosing(self._stream_once(messages, seed)) as pieces:
                    async for piece in pieces:
                        spoken = True
                        yield piece
            except ChatServerError as error:
                trouble = error
            if trouble is None:
                return
            pause = wait if trouble.retry_delay is None else trouble.retry_delay
            if (
                spoken
                or not trouble.is_retryable
                or wait is None
                or pause is None
                or pause > MAX_CHAT_RETRY_DELAY_SECONDS
            ):
                raise UpsampleError(str(trouble))
            await self._sleep(pause)

    async def _stream_once(self, messages: list[dict[str, Any]], seed: int) -> AsyncGenerator[str, None]:
        import openai  # takes a second, and most runs do without

        text, reason, kind = "", None, ""
        trouble: ChatServerError | None = None
        # What the package raises holds its request, with the key on it: nothing of that goes on from here.
        async with self._client() as client:
            try:
                stream: Any = await client.chat.completions.create(
                    model=self.label,
                    messages=messages,  # type: ignore[arg-type]
                    temperature=self._sampling.temperature,
                    top_p=self._sampling.top_p,
                    max_tokens=self._sampling.max_tokens,
                    seed=seed % 2**31,  # more is too much for some servers
                    stream=True,
                )
                kind = stream.response.headers.get("content-type", "").partition(";")[0].strip().lower()
                async for chunk in stream:
                    piece, ending = _parse_chunk(chunk)
                    reason = reason or ending
                    text += piece
                    if self._key is not None and self._key.reveal() in text:
                        trouble = self._server.key_leak_error()
                        break
                    if piece:
                        yield piece
            except openai.APIStatusError as error:
                trouble = self._server.status_error(error.status_code, error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                trouble = self._server.timeout_error(self._patience)
            except openai.APIConnectionError as error:
                trouble = self._server.interrupted_error() if kind else self._server.connection_error(error)
            except openai.APIError as error:  # OpenRouter's way to fail once it has said 200
                code = str(error.body.get("code")) if isinstance(error.body, dict) else ""
                trouble = self._server.status_error(int(code) if re.fullmatch(r"[345]\d\d", code) else 500)
            except ValueError:  # no JSON, no UTF-8
                trouble = self._server.protocol_error()
        if trouble := trouble or self._check_ending(text, reason, kind):
            raise trouble

    def _client(self) -> AsyncOpenAI:
        import openai

        async def address(request: Any) -> None:
            """Leave only what the request needs (the package adds what it finds in the environment), and the key."""
            for name in list(request.headers):
                if name.lower() not in _HEADERS:
                    del request.headers[name]
            if self._key is not None:
                request.headers["Authorization"] = f"Bearer {self._key.reveal()}"

        http = openai.DefaultAsyncHttpxClient(
            timeout=openai.Timeout(self._patience, connect=min(CHAT_CONNECT_TIMEOUT_SECONDS, self._patience)),
            follow_redirects=False,
            event_hooks={"request": [address]},
        )
        return openai.AsyncOpenAI(api_key="put on later", base_url=self._server.url, max_retries=0, http_client=http)

    def _check_ending(self, text: str, reason: str | None, kind: str) -> ChatServerError | None:
        """What is wrong with an answer that came to its end; None if nothing."""
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
    """`pieces`, each as soon as it is there, and "" now and then while it is not; it ends once `cancelled`.

    The event loop runs in a thread of its own, for the caller's may run one already (a notebook's does). However this
    ends, what goes on ends at once, connection included, and the thread with it.
    """
    arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()  # None is the last
    loop = asyncio.new_event_loop()

    async def follow() -> None:
        async with aclosing(pieces):
            async for piece in pieces:
                arrived.put(piece)

    following = loop.create_task(follow())

    def run() -> None:
        try:
            loop.run_until_complete(asyncio.wait({following}))
            # Generators of the package's that nobody holds any more get a task each to close them.
            loop.run_until_complete(asyncio.sleep(0))
            if rest := asyncio.all_tasks(loop):
                loop.run_until_complete(asyncio.wait(rest, timeout=CHAT_POLL_SECONDS))
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
        with suppress(RuntimeError):  # closed by now: there is nothing to end
            loop.call_soon_threadsafe(following.cancel)
        thread.join()
    if not following.cancelled():
        following.result()  # or what it failed with


def _parse_chunk(chunk: Any) -> tuple[str, str | None]:
    """The text in a chunk of an answer, and why the answer ends if it does. Servers leave out and add all sorts of
    things: usage comes without choices, thoughts come in fields of their own, which are not for us."""
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
        return prompt  # servers without eyes know nothing else
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
