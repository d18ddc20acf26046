"""Prompts enriched by a language model: one on this machine, or one behind OpenRouter or any server that speaks its
protocol (vLLM, llama.cpp, Ollama, ...).

`upsample` is the whole of it: pieces of text as they come, then the prompt, or an `UpsampleError`. Nothing falls back
to the prompt as it was. The other side of `OpenRouter` may be slow, gone or hostile: what it says in its errors is not
passed on, redirects are not followed, and the key is put on each request at the last moment, out of reach of everything
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
from flux2_studio.prompting.instructions import Mode, instructions
from flux2_studio.prompting.replies import OR_WITHOUT, Answer, most_characters, read_answer, too_long
from flux2_studio.prompting.server_errors import ChatServer, Trouble
from flux2_studio.request import SAMPLING
from flux2_studio.settings import Settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI

    from flux2_studio.engine.text.writer import Writer

ONE, SEVERAL = 768, 512  # pixels: the long side of one reference, and of each of several, as a model sees them
JPEG_QUALITY = 85
CONNECT = 15.0  # seconds to reach a server
PATIENCE = 120.0  # seconds without any sign of life: one's own server may load its model first
LONGEST = 600.0  # seconds for an answer altogether, waits included
WAITS = (1.0, 4.0)  # seconds before asking a busy server again, where it does not say itself
LONGEST_WAIT = 30.0  # seconds; a server that asks for more is not waited for
POLL = 0.1  # seconds between two looks at whether the run was stopped

_HEADERS = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
_KEY = re.compile(r"[!-~]+")


class ApiKey:
    """A key, kept from whatever prints, copies or stores objects. Raises `UpsampleError` for what is none."""

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text.strip()
        if not _KEY.fullmatch(self._text):
            raise UpsampleError(f"That is no API key: copy it again, without blanks, {OR_WITHOUT}.")

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
class Sampling:
    """How a model chooses its words. Temperature 0 takes the likeliest each time; top_p keeps those that make up so
    much of the probability. Raises `UpsampleError` for what no model takes."""

    temperature: float = 0.15
    top_p: float = 1.0
    max_tokens: int = 768

    def __post_init__(self) -> None:
        for name, (low, high) in SAMPLING.items():
            if not low <= getattr(self, name) <= high:
                raise UpsampleError(f"Set {name} to a number from {low:g} to {high:g}, {OR_WITHOUT}.")


def no_writers(checkpoint: Checkpoint) -> str:
    """Why no language model on this machine is offered for `checkpoint`, and what to do."""
    return (
        f"{checkpoint.label} has no language model on this machine that could enrich prompts: choose OpenRouter or "
        f"your server, a checkpoint that is no toy, {OR_WITHOUT}."
    )


class Upsampler(Protocol):
    """A language model that enriches prompts. label: what users call it. sees: whether it looks at references."""

    label: str
    sees: bool

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        mode: Mode,
        *,
        seed: int,
        cancelled: Callable[[], bool],
    ) -> Generator[str, None, None]:
        """The answer in pieces, as they come; it just ends once `cancelled`. Raises `UpsampleError`."""
        ...


def upsample(
    upsampler: Upsampler,
    prompt: str,
    references: Sequence[Image.Image] = (),
    mode: Mode = "generate",
    *,
    seed: int,
    cancelled: Callable[[], bool] = lambda: False,
) -> Generator[str, None, Answer | None]:
    """Yields the answer to `prompt` in pieces, as they come; returns the enriched prompt, or None once `cancelled`.

    The pieces together are what the model wrote, of which a wrapping may be taken off. Raises `UpsampleError`.
    """
    text = ""
    with closing(upsampler.stream(prompt, references, mode, seed=seed, cancelled=cancelled)) as pieces:
        for piece in pieces:
            text += piece
            if len(text) > most_characters(prompt):
                raise too_long(len(text), prompt)
            yield piece
    if cancelled():
        return None
    answer = read_answer(text, prompt)
    if references and not upsampler.sees:
        return replace(answer, notes=(unseen(upsampler), *answer.notes))
    return answer


def unseen(upsampler: Upsampler) -> str:
    """What users are told where `upsampler` cannot look at their references."""
    return f"{upsampler.label} reads text only: it enriched the prompt without seeing the references."


def shrunk(references: Sequence[Image.Image]) -> list[Image.Image]:
    """`references` at the size at which models see them, in RGB, with nothing but their pixels."""
    side = ONE if len(references) == 1 else SEVERAL
    small = []
    for reference in references:
        image = reference.convert("RGB")  # a copy
        image.thumbnail((side, side), Image.Resampling.LANCZOS)
        image.info.clear()
        small.append(image)
    return small


class Local:
    """A language model on this machine: `writer`, loaded from the files of `model`, which also says how to sample."""

    def __init__(self, writer: Writer, model: LocalWriter, sampling: Sampling | None = None) -> None:
        self.label = model.label
        self.sees = writer.sees
        self._writer = writer
        self._sampling = sampling or Sampling(temperature=model.temperature, top_p=model.top_p)

    def stream(
        self,
        prompt: str,
        references: Sequence[Image.Image],
        mode: Mode,
        *,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, None]:
        """See `Upsampler`."""
        from flux2_studio.images.tensors import pixels_from_image  # imports torch

        ended = yield from self._writer.write(
            instructions(mode, len(references), seen=self.sees),
            prompt,
            [pixels_from_image(image) for image in shrunk(references)] if self.sees else [],
            seed=seed,
            max_tokens=self._sampling.max_tokens,
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            cancelled=cancelled,
        )
        if not ended and not cancelled():
            raise UpsampleError(_cut(self.label, self._sampling))


class OpenRouter:
    """A language model at OpenRouter, or at any OpenAI-compatible server. Asks nothing before `stream`.

    url: http or https, with the path before /chat/completions. key: None for a server that wants none. patience:
    seconds without a sign of life; longest: for the whole. sleep: waits so many seconds before a busy server is asked
    again. Not to be used from inside an asyncio event loop. Raises `UpsampleError` for what cannot be asked.
    """

    sees = True  # what a model has no eyes for, its server refuses

    def __init__(
        self,
        url: str,
        model: str,
        key: ApiKey | None,
        sampling: Sampling | None = None,
        *,
        patience: float = PATIENCE,
        longest: float = LONGEST,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.label = model.strip()
        self._server = ChatServer(url=url, model=self.label, keyed=key is not None)
        self._key = key
        self._sampling = sampling or Sampling()
        self._patience = patience
        self._longest = longest
        self._sleep = sleep
        if not 0 < len(self.label) <= 200 or not self.label.isprintable():
            raise UpsampleError(f"Choose a language model or type its name, {OR_WITHOUT}.")
        if key is None and self._server.is_openrouter:
            raise UpsampleError(
                f"OpenRouter needs an API key: get one at https://openrouter.ai/keys and type it on the page, or set "
                f"OPENROUTER_API_KEY, {OR_WITHOUT}."
            )

    @classmethod
    def of(
        cls,
        settings: Settings,
        model: str | None = None,
        key: ApiKey | None = None,
        sampling: Sampling | None = None,
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
        mode: Mode,
        *,
        seed: int,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> Generator[str, None, None]:
        """See `Upsampler`."""
        messages: list[dict[str, Any]] = [
            {"role": "system", "content": instructions(mode, len(references), seen=True)},
            {"role": "user", "content": _content(prompt, references)},
        ]
        deadline = time.monotonic() + self._longest
        for piece in _driven(self._pieces(messages, seed), cancelled):
            if piece:
                yield piece
            if time.monotonic() > deadline:
                raise UpsampleError(str(self._server.too_slow(self._longest)))

    async def _pieces(self, messages: list[dict[str, Any]], seed: int) -> AsyncGenerator[str, None]:
        """The answer; a server that is busy or in trouble is asked again, unless it has begun to speak."""
        for wait in (*WAITS, None):
            spoken = False
            trouble: Trouble | None = None
            try:
                async with aclosing(self._once(messages, seed)) as pieces:
                    async for piece in pieces:
                        spoken = True
                        yield piece
            except Trouble as error:
                trouble = error
            if trouble is None:
                return
            pause = wait if trouble.after is None else trouble.after
            if spoken or not trouble.passing or wait is None or pause is None or pause > LONGEST_WAIT:
                raise UpsampleError(str(trouble))
            await self._sleep(pause)

    async def _once(self, messages: list[dict[str, Any]], seed: int) -> AsyncGenerator[str, None]:
        import openai  # takes a second, and most runs do without

        text, reason, kind = "", None, ""
        trouble: Trouble | None = None
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
                    piece, ending = _read(chunk)
                    reason = reason or ending
                    text += piece
                    if self._key is not None and self._key.reveal() in text:
                        trouble = self._server.leaked()
                        break
                    if piece:
                        yield piece
            except openai.APIStatusError as error:
                trouble = self._server.refused(error.status_code, error.response.headers.get("retry-after"))
            except openai.APITimeoutError:
                trouble = self._server.too_slow(self._patience)
            except openai.APIConnectionError as error:
                trouble = self._server.broken_off() if kind else self._server.unreachable(error)
            except openai.APIError as error:  # OpenRouter's way to fail once it has said 200
                code = str(error.body.get("code")) if isinstance(error.body, dict) else ""
                trouble = self._server.refused(int(code) if re.fullmatch(r"[345]\d\d", code) else 500)
            except ValueError:  # no JSON, no UTF-8
                trouble = self._server.foreign()
        if trouble := trouble or self._ended(text, reason, kind):
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
            timeout=openai.Timeout(self._patience, connect=min(CONNECT, self._patience)),
            follow_redirects=False,
            event_hooks={"request": [address]},
        )
        return openai.AsyncOpenAI(api_key="put on later", base_url=self._server.url, max_retries=0, http_client=http)

    def _ended(self, text: str, reason: str | None, kind: str) -> Trouble | None:
        """What is wrong with an answer that came to its end; None if nothing."""
        if reason == "length":
            return Trouble(_cut(self.label, self._sampling))
        if reason == "content_filter":
            return self._server.moderated()
        if reason == "error":
            return self._server.refused(502)
        if not text and kind != "text/event-stream":
            return self._server.foreign()
        return self._server.broken_off() if text and reason is None else None


def _driven(pieces: AsyncGenerator[str, None], cancelled: Callable[[], bool]) -> Generator[str, None, None]:
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
                loop.run_until_complete(asyncio.wait(rest, timeout=POLL))
        finally:
            loop.close()
            arrived.put(None)

    thread = threading.Thread(target=run, name="upsampling", daemon=True)
    thread.start()
    try:
        while not cancelled():
            try:
                piece = arrived.get(timeout=POLL)
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


def _read(chunk: Any) -> tuple[str, str | None]:
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
    for number, image in enumerate(shrunk(references), start=1):
        parts.append({"type": "text", "text": f"Image {number}:"})
        parts.append({"type": "image_url", "image_url": {"url": _data_url(image)}})
    return [*parts, {"type": "text", "text": prompt}]


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def _cut(label: str, sampling: Sampling) -> str:
    return (
        f"{label} was not done after {sampling.max_tokens} tokens, so the prompt would end in the middle: allow it "
        f"more of them, choose another model, {OR_WITHOUT}."
    )
