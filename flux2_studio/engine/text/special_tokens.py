"""What users type must not turn into special tokens: a typed [IMG] has no picture, an end mark ends the message."""

from __future__ import annotations

from collections.abc import Sequence


def remove_special_tokens(text: str, tokens: Sequence[str]) -> str:
    """`text` without any of `tokens`, nor what would become one once another is gone: [IM[IMG]G] leaves nothing.

    Each is removed where its last character comes, so one pass is enough: what is kept so far never holds any.
    """
    by_end: dict[str, list[str]] = {}
    for token in sorted(tokens, key=len, reverse=True):
        by_end.setdefault(token[-1:], []).append(token)
    kept: list[str] = []
    for character in text:
        kept.append(character)
        for token in by_end.get(character, ()):
            if "".join(kept[-len(token) :]) == token:
                del kept[-len(token) :]
                break
    return "".join(kept)
