"""What counts as a prompt of all that language models answer, and what is taken off around it."""

from __future__ import annotations

import pytest

from flux2_studio.errors import UpsampleError
from flux2_studio.prompting.replies import (
    MAX_PROMPT_REPLY_CHARACTERS,
    max_reply_characters,
    parse_reply,
    reply_too_long_error,
)
from flux2_studio.request import MAX_PROMPT

PROMPT = "A red fox sleeps on a mossy log, soft morning light from the left, oil painting."


@pytest.mark.parametrize(
    "prompt",
    [
        PROMPT,
        "Ein roter Fuchs schläft.\n\nÖlgemälde, weiches Licht.",
        "一只红色的狐狸在睡觉，水彩画。",  # noqa: RUF001
        'A shop window with the words "Sure! Here is cake" in gold letters.',
        '"OPEN" in red neon above the door, "CLOSED" below it, "24h"',
        "Sure-footed goats climb a cliff.",
        "Great waves off a coast, woodblock print.",
        "Sorry signs and apology cards cover a notice board.",
        "Hi-fi equipment from 1974 on a walnut shelf, photograph.",
        "Okra and tomatoes on a wooden board.",
        "I can see for miles: a hand-lettered poster.",
        "Absolutely massive dragon above a tiny village.",
        "'Tis the season' written in snow, the artist's signature below it",
        "A description of the city hangs on the wall: a map with red pins.",
        "Instead of the car, a horse stands in image 1; keep the light.",
        "An option board: three doors, one of them open.",
        "A cat. Let me know is written on its collar.",
        "A robot <3 a cat, pixel art",
        "Colour #1f6f5c on the wall, #ffffff on the ceiling.",
        "A teacher asks a question. What a day! The class laughs.",
        "A [bracketed] sign {in braces}, 50 % off",
    ],
)
def test_prompts_are_left_as_they_are(prompt: str) -> None:
    answer = parse_reply(f"\n {prompt}\n", "a fox")
    assert (answer.prompt, answer.notes) == (prompt, ())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (f'"{PROMPT}"', "Quotation marks"),
        (f"“{PROMPT}”", "Quotation marks"),
        (f"«{PROMPT}»", "Quotation marks"),
        (f"'{PROMPT} It is the artist's own.'", "Quotation marks"),
        (f"```\n{PROMPT}\n```", "code fence"),
        (f"```text\n{PROMPT}\n```\n", "code fence"),
        (f"<think>The user wants a fox.\nSo:</think>\n\n{PROMPT}", "thoughts were left out"),
    ],
)
def test_a_wrapping_is_taken_off_and_told(text: str, told: str) -> None:
    answer = parse_reply(text, "a fox")
    assert answer.prompt.startswith(PROMPT)
    assert answer.prompt[-1] == "." and answer.prompt[0] == "A"
    assert len(answer.notes) == 1 and told in answer.notes[0]


def test_an_empty_block_of_thoughts_is_not_worth_telling() -> None:
    answer = parse_reply(f"<think>\n\n</think>\n\n{PROMPT}", "a fox")
    assert (answer.prompt, answer.notes) == (PROMPT, ())


def test_several_wrappings() -> None:
    answer = parse_reply(f"<think>fox</think>```\n{PROMPT}\n```", "a fox")
    assert answer.prompt == PROMPT
    assert len(answer.notes) == 2


def test_json_is_a_prompt_where_the_users_was() -> None:
    text = '{"scene": "a fox on a log", "style": "oil"}'
    assert parse_reply(f"```json\n{text}\n```", '{"scene": "a fox"}').prompt == text
    with pytest.raises(UpsampleError, match="answered with JSON, where sentences were asked for"):
        parse_reply(text, "a fox")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "an empty answer"),
        (" \n\t ", "an empty answer"),
        ("<think>I wonder</think>", "an empty answer"),
        ('""', "not text"),
        ("....!?", "not text"),
        ("12345 67", "not text"),
        ("a fox\x00\x01", "not text"),
        ("a f\ufffdx", "not text"),
        ("a fox \ud800", "not text"),
        ("\x7fELF binary", "not text"),
        ("<!DOCTYPE html><html><body>Not found</body></html>", "a web page"),
        ("I'm sorry, I can't help with that.", "refused: \"I'm sorry, I can't help"),
        ("I\u2019m sorry, but I can\u2019t assist with this request.", "refused"),
        ("I am unable to create prompts about real people.", "refused"),
        ("I cannot create this.", "refused"),
        ("As an AI language model, I do not", "refused"),
        ("Sorry, but I will not write that.", "refused"),
        ("Unfortunately, I cannot", "refused"),
        ("I apologize, but", "refused"),
        ("Es tut mir leid, dabei kann ich nicht helfen.", "refused"),
        ("Je suis désolé, mais", "refused"),
        ("抱歉，我无法", "refused"),  # noqa: RUF001
        ("Sure! Here is your prompt: a fox", "talked about the prompt"),
        ("Certainly! A fox in the woods", "talked about the prompt"),
        ("Here's an enhanced version:\n\nA fox", "talked about the prompt"),
        ("Of course, a fox", "talked about the prompt"),
        ("**Enhanced Prompt:** A fox", "talked about the prompt"),
        ("Prompt: A fox", "talked about the prompt"),
        ("FLUX.2 prompt (final):\nA fox", "talked about the prompt"),
        ("## A fox\nA fox sleeps", "talked about the prompt"),
        ("Option 1: a fox\nOption 2: a cat", "talked about the prompt"),
        ("Natürlich! Ein Fuchs", "talked about the prompt"),
        (f"{PROMPT}\n\nLet me know if you'd like changes!", "talked on after the prompt"),
        (f"{PROMPT}\n\n**Note:** I added the light.", "talked on after the prompt"),
        ("Could you please provide more details?", "asked back"),
        ("What kind of fox do you have in mind?", "asked back"),
        ("<think>The user wants a fox and so", "thought aloud"),
        (f"{PROMPT}<|im_end|>", "thought aloud"),
        (f"The picture:\n```\n{PROMPT}\n```", "code fences in it"),
        (f"```\n{PROMPT}\n```\nor\n```\na cat\n```", "code fences in it"),
        ("word " * 10_000, "4,000 characters and more, where a prompt has 4,000 at most"),
    ],
)
def test_everything_else_is_refused(text: str, says: str) -> None:
    with pytest.raises(UpsampleError) as caught:
        parse_reply(text, "a fox")
    assert says in str(caught.value)
    assert str(caught.value).endswith("or generate without enhancing.")
    assert len(str(caught.value)) < 300


def test_a_long_prompt_may_stay_long() -> None:
    asked = "a fox and a cat, " * 400
    assert len(parse_reply(asked, asked).prompt) > MAX_PROMPT_REPLY_CHARACTERS
    assert "13,600 at most" in str(reply_too_long_error(20_000, asked))


def test_what_the_prompt_itself_begins_with_is_no_label() -> None:
    asked = "Prompt: a fox"
    assert parse_reply("Prompt: a red fox", asked).prompt == "Prompt: a red fox"


def test_an_answer_is_never_longer_than_a_request_takes() -> None:
    assert max_reply_characters("a" * 15_000) == MAX_PROMPT
    assert max_reply_characters("a") == MAX_PROMPT_REPLY_CHARACTERS
