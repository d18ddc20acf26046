"""Enhancing prompts: what is sent, each way in which a server or a model can fail, and that the key is nowhere."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import copy
import io
import json
import logging
import pickle
import socket
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS, DEV, KLEIN_4B, LOCAL_WRITERS, NANO, LocalWriter, list_local_writers
from flux2_studio.errors import StudioError, UpsampleError
from flux2_studio.prompting.instructions import EDIT, GENERATE, PromptMode, build_instructions
from flux2_studio.prompting.openai_server import (
    CHAT_RETRY_DELAYS_SECONDS,
    MULTI_REFERENCE_SIDE,
    REMOTE_MODELS,
    SINGLE_REFERENCE_SIDE,
    ApiKey,
    ChatServerUpsampler,
    LocalUpsampler,
    PromptUpsampler,
    SamplingParams,
    unseen_references_note,
    upsample_prompt,
)
from flux2_studio.prompting.replies import ParsedReply
from flux2_studio.settings import Settings
from tests.fake_openai import FakeOpenAI, Reply, breaks_off, chunk, fails_inside, gives, refuses, says, silent

if TYPE_CHECKING:
    from tests.tiny import Toys

QWEN3, MISTRAL = LOCAL_WRITERS[0], LOCAL_WRITERS[-1]
KEY = "sk-or-v1-0123456789abcdef"
PROMPT = "A red fox sleeps on a mossy log."
WAY_OUT = "or generate without enhancing."


@dataclass
class Told:
    """What a run gave: the pieces, and the answer (None once cancelled) or the error."""

    pieces: list[str] = field(default_factory=list)
    answer: ParsedReply | None = None


@pytest.fixture(autouse=True)
def no_loop_of_the_browser() -> Iterator[None]:
    """Playwright leaves its event loop, which sleeps between the browser tests, standing as the running one."""
    sleeping = asyncio._get_running_loop()
    asyncio._set_running_loop(None)
    yield
    asyncio._set_running_loop(sleeping)


@pytest.fixture(autouse=True)
def nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert not [record for record in caplog.records if record.name == "asyncio" and record.levelno >= logging.WARNING]


def never() -> bool:
    return False


def run(
    upsampler: PromptUpsampler,
    prompt: str = "a fox",
    references: Sequence[Image.Image] = (),
    mode: PromptMode = "generate",
    *,
    seed: int = 7,
    cancelled: Callable[[], bool] = never,
) -> Told:
    told = Told()
    pieces = upsample_prompt(upsampler, prompt, references, mode, seed=seed, cancelled=cancelled)
    while True:
        try:
            told.pieces.append(next(pieces))
        except StopIteration as stop:
            told.answer = stop.value
            return told


class Slept:
    """Stands in for asyncio.sleep, and remembers how long it would have taken."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


def router(server: FakeOpenAI, *, key: str | None = KEY, model: str = "toy/model", **more: Any) -> ChatServerUpsampler:
    more.setdefault("sleep", Slept())
    return ChatServerUpsampler(server.url, model, ApiKey(key) if key else None, **more)


def failure(*replies: Reply, **more: Any) -> str:
    with FakeOpenAI(*replies) as server, pytest.raises(UpsampleError) as caught:
        run(router(server, **more))
    assert str(caught.value).endswith(WAY_OUT)
    return str(caught.value)


def picture(width: int = 1600, height: int = 800) -> Image.Image:
    image = Image.new("RGBA", (width, height), (200, 30, 30, 255))
    image.info = {"comment": b"taken at home", "exif": b"secret place"}
    return image


# --- what is sent, and what comes ---


def test_pieces_come_one_by_one_and_the_whole_is_the_prompt() -> None:
    with FakeOpenAI(says("A red fox", " sleeps on", " a mossy log.")) as server:
        told = run(router(server))
    assert told.pieces == ["A red fox", " sleeps on", " a mossy log."]
    assert told.answer == ParsedReply(prompt=PROMPT)


def test_what_a_server_is_asked() -> None:
    with FakeOpenAI(says(PROMPT)) as server:
        run(router(server, sampling=SamplingParams(temperature=0.6, top_p=0.9, max_tokens=300)), seed=2**32 - 1)
    (asked,) = server.asked
    assert asked.path == "/v1/chat/completions"
    assert asked.headers["authorization"] == f"Bearer {KEY}"
    assert asked.body == {
        "model": "toy/model",
        "messages": [{"role": "system", "content": GENERATE}, {"role": "user", "content": "a fox"}],
        "temperature": 0.6,
        "top_p": 0.9,
        "max_tokens": 300,
        "seed": 2**31 - 1,
        "stream": True,
    }


def test_nothing_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is there for OpenAI is not for others, and nobody needs to know our system."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-someone-else")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Mine: of-someone-else\nAuthorization: of-someone-else")
    with FakeOpenAI(says(PROMPT)) as server:
        run(router(server))
        run(router(server, key=None))
    first, second = server.asked
    assert "of-someone-else" not in str(server.asked)
    assert not [name for name in first.headers if name.startswith(("x-", "openai"))]
    assert "authorization" in first.headers
    assert "authorization" not in second.headers


def test_references_are_sent_small_and_bare() -> None:
    with FakeOpenAI(says("Turn the red wall in image 1 green.")) as server:
        run(router(server), "green", [picture()], "edit")
        run(router(server), "green", [picture(), picture(300, 600)], "edit")
    for asked, sizes in zip(
        server.asked,
        (
            [(SINGLE_REFERENCE_SIDE, SINGLE_REFERENCE_SIDE // 2)],
            [(MULTI_REFERENCE_SIDE, MULTI_REFERENCE_SIDE // 2), (MULTI_REFERENCE_SIDE // 2, MULTI_REFERENCE_SIDE)],
        ),
        strict=True,
    ):
        system, user = asked.body["messages"]
        assert system["content"].startswith(EDIT)
        assert "comes with the reference pictures, image 1" in system["content"]
        assert user["content"][-1] == {"type": "text", "text": "green"}
        labels = [part["text"] for part in user["content"][:-1:2]]
        assert labels == [f"Image {number}:" for number in range(1, len(sizes) + 1)]
        for part, size in zip(user["content"][1::2], sizes, strict=True):
            start, data = part["image_url"]["url"].split(",")
            assert start == "data:image/jpeg;base64"
            raw = base64.b64decode(data)
            image = Image.open(io.BytesIO(raw))
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", size)
            assert b"home" not in raw and b"secret" not in raw and b"Exif" not in raw


def test_a_small_reference_is_not_blown_up() -> None:
    with FakeOpenAI(says(PROMPT)) as server:
        run(router(server), "green", [picture(64, 48)], "edit")
    url = server.asked[0].body["messages"][1]["content"][1]["image_url"]["url"]
    assert Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).size == (64, 48)


@pytest.mark.parametrize(
    "reply",
    [
        says(PROMPT, done=False),
        says(PROMPT, events=({"id": "1", "choices": [], "prompt_filter_results": [{"a": 1}]},)),
        says(PROMPT, events=({"choices": None}, {"object": "keepalive"}, {"choices": [{"index": 0}]})),
        says(PROMPT, events=(chunk("", role="assistant", reasoning="I think", reasoning_content="so"),)),
        says(PROMPT, events=({**chunk(""), "system_fingerprint": None, "timings": {"n": 3}, "extra": [1]},)),
        says(PROMPT, after=({"id": "1", "choices": [], "usage": {"total_tokens": 3}},)),
        says("", PROMPT, ""),
    ],
    ids=["no [DONE]", "no choices", "odd events", "thoughts aside", "more fields", "usage last", "empty pieces"],
)
def test_what_servers_add_and_leave_out(reply: Reply) -> None:
    with FakeOpenAI(reply) as server:
        assert run(router(server)).answer == ParsedReply(prompt=PROMPT)


def test_what_was_taken_off_is_told() -> None:
    with FakeOpenAI(says("```\n", PROMPT, "\n```")) as server:
        told = run(router(server))
    assert told.answer is not None
    assert told.answer.prompt == PROMPT
    assert told.answer.notes == ("A code fence around the prompt was taken off.",)


# --- whom and with which key ---


def test_settings_say_whom_to_ask(tmp_path: Path) -> None:
    with FakeOpenAI(says(PROMPT)) as server:
        settings = Settings(home=tmp_path, openrouter_url=server.url, openrouter_key=KEY, openrouter_model="mine:8b")
        run(ChatServerUpsampler.from_settings(settings))
        run(ChatServerUpsampler.from_settings(settings, "typed/model", ApiKey("sk-typed")))
    first, second = server.asked
    assert (first.body["model"], first.headers["authorization"]) == ("mine:8b", f"Bearer {KEY}")
    assert (second.body["model"], second.headers["authorization"]) == ("typed/model", "Bearer sk-typed")
    assert ChatServerUpsampler.from_settings(Settings(home=tmp_path, openrouter_key=KEY)).label == REMOTE_MODELS[0].name


def test_models_are_named_once() -> None:
    names = [model.name for model in REMOTE_MODELS]
    assert len(set(names)) == len(names) >= 3
    assert all("/" in name and name == name.lower() for name in names)


def test_openrouter_needs_a_key_and_others_may_not(tmp_path: Path) -> None:
    with pytest.raises(UpsampleError, match=r"OpenRouter needs an API key: get one at .* or set OPENROUTER_API_KEY"):
        ChatServerUpsampler.from_settings(Settings(home=tmp_path))
    with FakeOpenAI(says(PROMPT)) as server:
        run(ChatServerUpsampler.from_settings(Settings(home=tmp_path, openrouter_url=server.url)))
    assert "authorization" not in server.asked[0].headers


@pytest.mark.parametrize("model", ["  ", "a\nb", "m" * 201])
def test_a_model_has_a_name(model: str) -> None:
    with pytest.raises(UpsampleError, match="Choose a language model"):
        ChatServerUpsampler("http://127.0.0.1:1/v1", model, None)


@pytest.mark.parametrize(
    "values", [{"temperature": 2.5}, {"temperature": float("nan")}, {"top_p": 0.0}, {"max_tokens": 1}]
)
def test_sampling_has_limits(values: dict[str, float]) -> None:
    with pytest.raises(UpsampleError, match=f"Set {next(iter(values))} to a number from"):
        SamplingParams(**values)  # type: ignore[arg-type]


# --- what goes wrong ---


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "does not take the request (HTTP 400): toy/model may not see pictures"),
        (401, "does not accept the API key: type the right one"),
        (402, "the key has no credit left"),
        (403, "its moderation objects to the prompt or a reference"),
        (404, "has no model called toy/model"),
        (408, "gave up waiting for toy/model"),
        (413, "the request is too large: use fewer references"),
        (422, "does not take the request (HTTP 422)"),
        (429, "too much to do for this key or model"),
        (500, "or toy/model has trouble (HTTP 500)"),
        (503, "or toy/model has trouble (HTTP 503)"),
        (504, "gave up waiting for toy/model (HTTP 504)"),
    ],
)
def test_each_refusal_has_its_own_words(status: int, says: str) -> None:
    """Said at once, or by OpenRouter once it has said 200; never in the server's own words."""
    for reply in (refuses(status, "my own words"), fails_inside(status)):
        text = failure(reply)
        assert text.startswith("The server at 127.0.0.1:")
        assert says in text
        assert "my own words" not in text and KEY not in text


def test_a_key_is_asked_for() -> None:
    assert "asks for an API key: type it on the page, or set OPENROUTER_API_KEY" in failure(refuses(401), key=None)


def test_redirects_are_not_followed() -> None:
    with FakeOpenAI(says(PROMPT)) as elsewhere:
        text = failure(refuses(307, Location=f"{elsewhere.url}/chat/completions"))
    assert not elsewhere.asked
    assert "sends us on to another address" in text


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_a_busy_server_is_asked_again(status: int) -> None:
    slept = Slept()
    with FakeOpenAI(refuses(status), fails_inside(status), says(PROMPT)) as server:
        assert run(router(server, sleep=slept)).answer == ParsedReply(prompt=PROMPT)
    assert slept.seconds == list(CHAT_RETRY_DELAYS_SECONDS)
    assert len({json.dumps(asked.body) for asked in server.asked}) == 1 and len(server.asked) == 3


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404])
def test_nobody_else_is(status: int) -> None:
    slept = Slept()
    with FakeOpenAI(refuses(status)) as server, pytest.raises(UpsampleError):
        run(router(server, sleep=slept))
    assert (len(server.asked), slept.seconds) == (1, [])


def test_it_is_given_up_in_the_end() -> None:
    slept = Slept()
    failure(refuses(503), sleep=slept)
    assert slept.seconds == list(CHAT_RETRY_DELAYS_SECONDS)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", [3.0, CHAT_RETRY_DELAYS_SECONDS[1]]),
        ("0.5", [0.5, CHAT_RETRY_DELAYS_SECONDS[1]]),
        ("soon", list(CHAT_RETRY_DELAYS_SECONDS)),
        ("Wed, 21 Oct 2015 07:28:00 GMT", [0.0, CHAT_RETRY_DELAYS_SECONDS[1]]),
    ],
)
def test_a_server_says_when_to_come_back(header: str, seconds: list[float]) -> None:
    slept = Slept()
    with FakeOpenAI(refuses(429, Retry_After=header), refuses(429), says(PROMPT)) as server:
        run(router(server, sleep=slept))
    assert slept.seconds == seconds


def test_but_not_in_an_hour() -> None:
    slept = Slept()
    assert "try again later" in failure(refuses(429, Retry_After="3600"), sleep=slept)
    assert slept.seconds == []


def test_what_has_begun_is_not_begun_again() -> None:
    slept = Slept()
    with FakeOpenAI(fails_inside(502, "A red"), says(PROMPT)) as server, pytest.raises(UpsampleError, match="trouble"):
        run(router(server, sleep=slept))
    assert (len(server.asked), slept.seconds) == (1, [])


@pytest.mark.parametrize("code", [None, "server_error", 200, "overloaded"])
def test_failures_without_a_status(code: Any) -> None:
    assert "has trouble (HTTP 500)" in failure(fails_inside(code))


@pytest.mark.parametrize("reply", [silent(begins=False), silent(), silent("A red")])
def test_a_silent_server(reply: Reply) -> None:
    assert "did not answer within 0 s: try again, choose a faster model" in failure(reply, idle_timeout=0.2)


def test_a_server_that_drips() -> None:
    """Signs of life alone are not enough."""

    def drips(handler: Any) -> None:
        handler.begin()
        while not handler.fake.closing.wait(0.02):
            handler.say(chunk("."))

    assert "did not answer within" in failure(drips, total_timeout=0.2)


def test_nobody_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for url, says_ in (
        (f"http://127.0.0.1:{port}/v1", f"The server at 127.0.0.1:{port} is not running: start it"),
        ("http://no-such-host.invalid/v1", "The server at no-such-host.invalid cannot be found"),
    ):
        with pytest.raises(UpsampleError) as caught:
            run(ChatServerUpsampler(url, "toy", None))
        assert says_ in str(caught.value) and str(caught.value).endswith(WAY_OUT)


def test_plain_http_behind_https() -> None:
    with FakeOpenAI(says(PROMPT)) as server, pytest.raises(UpsampleError, match="does not speak HTTPS"):
        run(ChatServerUpsampler(server.url.replace("http:", "https:"), "toy", None))


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        (breaks_off("A red fox"), "broke off in the middle of its answer"),
        (breaks_off(), "broke off in the middle of its answer"),
        (says(PROMPT, finish=None), "broke off in the middle of its answer"),
        (says(PROMPT, finish="length"), "toy/model was not done after 768 tokens"),
        (says("A red fox", finish="content_filter"), "toy/model refused to answer"),
        (says(finish="stop", events=(chunk(refusal="No."),)), "toy/model refused to answer"),
        (says("A red fox", finish="error"), "has trouble (HTTP 502)"),
        (says(), "an empty answer"),
        (says(" ", "\n"), "an empty answer"),
        (says(finish="tool_calls"), "an empty answer"),
        (says("I'm sorry, ", "I can't help with that."), "The language model refused"),
        (says("Sure! Here is", " a prompt"), "talked about the prompt"),
        (says(finish="stop", events=(chunk([{"type": "thinking"}]),)), "something that is not text"),
        (says(events=("{not json",)), "does not answer as an OpenAI-compatible server does"),
        (gives(b"<html>It works!</html>", "text/html"), "does not answer as an OpenAI-compatible server does"),
        (gives(b'{"choices": [{"message": {"content": "a fox"}}]}', "application/json"), "OpenAI-compatible server"),
        (gives(b"data: \xff\xfe\n\n", "text/event-stream"), "does not answer as an OpenAI-compatible server does"),
    ],
)
def test_answers_that_are_none(reply: Reply, says: str) -> None:
    assert says in failure(reply)


def test_ten_thousand_words_are_not_listened_to() -> None:
    """The stream is left as soon as it is too long."""

    def endless(handler: Any) -> None:
        handler.begin()
        while not handler.fake.closing.is_set():
            handler.say(chunk("word " * 100))

    with FakeOpenAI(endless) as server:
        with pytest.raises(UpsampleError, match="where a prompt has 4,000 at most"):
            run(router(server))
        assert server.gone.wait(60), "the connection was closed"


def test_each_piece_may_be_asked_for_by_another_thread() -> None:
    """As web servers do, which read a generator from a pool."""
    got: list[str] = []
    with FakeOpenAI(says("A red fox", " sleeps on", " a mossy log.")) as server:
        pieces = upsample_prompt(router(server), "a fox", seed=1)
        while True:
            thread = threading.Thread(target=lambda: got.append(next(pieces, "")))
            thread.start()
            thread.join()
            if not got[-1]:
                break
    assert "".join(got) == PROMPT


def test_whoever_asks_may_run_an_event_loop() -> None:
    """As a notebook does."""

    async def ask(server: FakeOpenAI) -> str:
        return "".join(upsample_prompt(router(server), "a fox", seed=1))

    with FakeOpenAI(says("A red fox", " sleeps on", " a mossy log.")) as server:
        assert asyncio.run(ask(server)) == PROMPT
    assert "upsampling" not in [thread.name for thread in threading.enumerate()]


# --- stopping ---


class After:
    """Says stop when asked for the n-th time."""

    def __init__(self, times: int) -> None:
        self.left = times

    def __call__(self) -> bool:
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("reply", [silent(begins=False), silent(), silent("A red", " fox")])
def test_a_silent_server_does_not_keep_us(reply: Reply) -> None:
    """Nor we it: the connection is closed, so that it can stop computing."""
    with FakeOpenAI(reply) as server:
        told = run(router(server), cancelled=After(4))
        assert told.answer is None
        assert server.gone.wait(60)


def test_a_busy_server_does_not_keep_us() -> None:
    with FakeOpenAI(refuses(503, Retry_After="25")) as server:
        upsampler = ChatServerUpsampler(server.url, "toy", None)  # which really waits
        assert run(upsampler, cancelled=After(4)).answer is None
    assert len(server.asked) == 1


def test_who_stops_first_asks_nobody() -> None:
    with FakeOpenAI(says(PROMPT)) as server:
        assert run(router(server), cancelled=lambda: True) == Told()
    assert not server.asked


def test_leaving_closes_the_connection() -> None:
    with FakeOpenAI(silent("A red")) as server:
        pieces = upsample_prompt(router(server), "a fox", seed=1)
        assert next(pieces) == "A red"
        pieces.close()
        assert server.gone.wait(60)


# --- the key is nowhere ---


def chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    waiting = [error]
    while waiting:
        if (current := waiting.pop()) is not None and current not in found:
            found.append(current)
            waiting += [current.__cause__, current.__context__]
    return found


@pytest.mark.parametrize(
    "reply",
    [
        says(PROMPT),
        refuses(401, "Incorrect API key provided:"),
        refuses(500),
        fails_inside(402),
        breaks_off("A red"),
        silent(),
        gives(KEY.encode(), "text/plain"),
        says(events=("{" + KEY,)),
        says("Your key is ", KEY[:9], KEY[9:], "!"),
    ],
    ids=["well", "bad key", "trouble", "inside", "broken", "silent", "as text", "as JSON", "as the answer"],
)
def test_the_key_is_nowhere(reply: Reply, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    """Not in the logs of whatever library at any level, not in an error nor in what led to it, not in what is shown."""
    caplog.set_level(logging.DEBUG)
    for name in ("openai", "httpx2", "httpcore2", "httpx", "httpcore", "asyncio"):
        caplog.set_level(logging.DEBUG, name)
    shown: list[Any] = []
    with FakeOpenAI(reply) as server:
        upsampler = router(server, idle_timeout=0.3)
        try:
            shown.append(run(upsampler))
        except StudioError as error:
            shown += [(repr(it), str(it), it.args, vars(it)) for it in chain(error)]
            assert len(chain(error)) == 1, "nothing of the package's errors, which hold the request, hangs on to ours"
    assert server.asked[0].headers["authorization"] == f"Bearer {KEY}", "it was used"
    assert any(record.name.startswith("openai") for record in caplog.records), "the test looks at the wrong logs"
    out, err = capfd.readouterr()
    logged = "".join(f"{record.getMessage()} {record.args} {record.exc_text}" for record in caplog.records)
    for text in (logged, out, err, repr(shown), repr(upsampler), str(vars(upsampler))):
        assert KEY not in text
        assert KEY[:12] not in text or "Your key is" in text


def test_a_key_is_kept_from_whatever_prints_or_stores() -> None:
    key = ApiKey(f" {KEY}\n")
    assert key.reveal() == KEY
    assert KEY not in f"{key} {key!r} {[key]}"
    assert not hasattr(key, "__dict__")
    assert copy.copy(key) is key and copy.deepcopy({"key": key})["key"] is key
    with pytest.raises(TypeError, match="not written down"):
        pickle.dumps(key)
    with pytest.raises(TypeError):
        json.dumps(key)


@pytest.mark.parametrize("text", ["", "  ", "two words", "schlüssel", "a\x00b"])
def test_what_is_no_key(text: str) -> None:
    with pytest.raises(UpsampleError, match="That is no API key: copy it again") as caught:
        ApiKey(text)
    assert not text.strip() or text not in str(caught.value)


# --- a model on this machine ---


class Scripted:
    """Stands where an engine.writer.Writer would, and remembers what it was told."""

    def __init__(self, *pieces: str, has_vision: bool = True, ends: bool = True) -> None:
        self.pieces, self.has_vision, self.ends = pieces, has_vision, ends
        self.told: list[tuple[Any, ...]] = []

    def write(self, system: str, message: str, images: Sequence[Any] = (), **how: Any) -> Generator[str, None, bool]:
        self.told.append((system, message, [tuple(image.shape) for image in images], how))
        for piece in self.pieces:
            if how["cancelled"]():
                return False
            yield piece
        return self.ends


def local(writer: Scripted, **more: Any) -> LocalUpsampler:
    return LocalUpsampler(writer, QWEN3, **more)  # type: ignore[arg-type]


def test_a_local_model_is_told_the_same() -> None:
    writer = Scripted("A red fox ", "sleeps on a mossy log.")
    told = run(local(writer, sampling=SamplingParams(temperature=0.7, top_p=0.8, max_tokens=200)), seed=3)
    assert told == Told(["A red fox ", "sleeps on a mossy log."], ParsedReply(prompt=PROMPT))
    ((system, message, images, how),) = writer.told
    assert (system, message, images) == (GENERATE, "a fox", [])
    assert how.pop("cancelled") is never
    assert how == {"seed": 3, "max_tokens": 200, "temperature": 0.7, "top_p": 0.8}


def test_each_local_model_is_sampled_as_its_makers_advise() -> None:
    for model in (QWEN3, MISTRAL):
        writer = Scripted(PROMPT)
        run(LocalUpsampler(writer, model))  # type: ignore[arg-type]
        how = writer.told[0][3]
        assert (how["temperature"], how["top_p"]) == (model.temperature, model.top_p)


def test_what_is_offered_beside_a_checkpoint() -> None:
    assert [it.name for it in list_local_writers(KLEIN_4B)] == ["qwen3-4b", "mistral"]
    assert [it.name for it in list_local_writers(DEV)] == ["mistral"]
    assert list_local_writers(NANO) == (), "its text encoder cannot write"
    for checkpoint in CHECKPOINTS:
        own = list_local_writers(checkpoint)[:1]
        assert [(it.part, it.recipe) for it in own] == (
            [] if checkpoint.is_toy else [(checkpoint.text, checkpoint.recipe)]
        )


def test_a_local_model_with_eyes_gets_the_references_small() -> None:
    writer = Scripted(PROMPT)
    told = run(local(writer), "green", [picture()], "edit")
    assert writer.told[0][0] == build_instructions("edit", 1, seen=True)
    assert writer.told[0][2] == [(1, 3, SINGLE_REFERENCE_SIDE // 2, SINGLE_REFERENCE_SIDE)]
    assert told.answer == ParsedReply(prompt=PROMPT)


def test_a_local_model_without_eyes_says_so() -> None:
    writer = Scripted(PROMPT, has_vision=False)
    upsampler = local(writer)
    told = run(upsampler, "green", [picture(), picture()], "edit")
    assert writer.told[0][0] == build_instructions("edit", 2, seen=False)
    assert writer.told[0][2] == []
    assert told.answer == ParsedReply(prompt=PROMPT, notes=(unseen_references_note(upsampler),))
    assert (
        unseen_references_note(upsampler)
        == "Qwen3 4B reads text only: it enhanced the prompt without seeing the references."
    )


def test_a_local_answer_that_does_not_end() -> None:
    with pytest.raises(UpsampleError, match="Qwen3 4B was not done after 768 tokens"):
        run(local(Scripted("A red fox", ends=False)))


def test_a_local_model_is_stopped() -> None:
    told = run(local(Scripted("A", " red", " fox")), cancelled=After(2))
    assert told == Told(["A", " red"], None)


@pytest.mark.parametrize(("name", "model"), [("qwen", QWEN3), ("mistral", MISTRAL)])
def test_a_seed_decides_what_a_model_writes(toys: Toys, name: str, model: LocalWriter) -> None:
    """Toys write gibberish, which may be refused in the end, but always the same."""
    import torch

    from flux2_studio.engine.text.writer import open_writer

    folder: Path = getattr(toys, name).folder
    writer = open_writer(folder, folder, model.recipe).load(device=torch.device("cpu"), dtype=torch.float32)
    upsampler = LocalUpsampler(writer, model, SamplingParams(temperature=2.0, max_tokens=16))
    assert upsampler.has_vision == model.has_vision

    def told(seed: int) -> list[str]:
        pieces = []
        with contextlib.suppress(UpsampleError):
            for piece in upsample_prompt(upsampler, "a fox", [picture(64, 48)], "edit", seed=seed):
                pieces.append(piece)
        return pieces

    runs = {seed: told(seed) for seed in range(5)}
    wordy = max(runs, key=lambda seed: len(runs[seed]))  # what is no whole character is not told
    assert told(wordy) == runs[wordy] != []
    assert any(pieces != runs[wordy] for pieces in runs.values())


# --- what models are told ---


def test_instructions_differ_and_fit() -> None:
    assert build_instructions("generate", 0, seen=True) == GENERATE != EDIT == build_instructions("edit", 0, seen=False)
    assert "image 1 to image 3. Look at them" in build_instructions("edit", 3, seen=True)
    assert "cannot see the reference pictures, image 1." in build_instructions("edit", 1, seen=False)
    for text in (GENERATE, EDIT):
        assert 1000 < len(text) < 2600
        assert "{" not in text, "everything was filled in"
        for word in ("alone", "quotation marks", "Markdown", "never a question or an order"):
            assert word in text
