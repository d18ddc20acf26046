"""Removes special tokens from user text: a typed [IMG] has no picture, and a typed end mark would end the message."""

from __future__ import annotations

from collections.abc import Sequence


def remove_special_tokens(text: str, tokens: Sequence[str]) -> str:
    """Return `text` without any of `tokens`, including those that a removal would create: [IM[IMG]G] leaves nothing.

    One pass is enough, because each token is removed at its last character: the output so far never contains one.
    """
    tokens_by_last_character: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        tokens_by_last_character.setdefault(token[-1:], []).append(token)
    output: list[str] = []
    for character in text:
        output.append(character)
        for token in tokens_by_last_character.get(character, ()):
            if "".join(output[-len(token) :]) == token:
                del output[-len(token) :]
                break
    return "".join(output)
