"""What users are told of a server; what it says itself is tested where it is asked, in test_upsample.py."""

from __future__ import annotations

import pytest

from flux2_studio.prompting.server_errors import ChatServer


def server(url: str) -> ChatServer:
    return ChatServer(url=url, model="toy", has_key=True)


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://openrouter.ai/api/v1", "OpenRouter"),
        ("https://OpenRouter.ai/api/v1", "OpenRouter"),
        ("https://eu.openrouter.ai/api/v1", "OpenRouter"),
        ("https://openrouter.ai.example/api/v1", "The server at openrouter.ai.example"),
        ("https://notopenrouter.ai/v1", "The server at notopenrouter.ai"),
        ("http://localhost:11434/v1/secret-path?key=secret", "The server at localhost:11434"),
        ("http://[::1]:8000/v1", "The server at [::1]:8000"),
    ],
)
def test_names(url: str, name: str) -> None:
    assert server(url).name == name
    assert server(url).is_openrouter == (name == "OpenRouter")
    assert "secret" not in str(server(url).status_error(404)) + str(server(url).protocol_error())


def test_only_what_passes_is_worth_asking_again() -> None:
    passing = [status for status in range(300, 600) if server("http://a/v1").status_error(status).is_retryable]
    assert passing == [429, *range(500, 600)]


def test_every_status_has_a_sentence_with_a_way_out() -> None:
    for status in range(300, 600):
        assert str(server("http://a/v1").status_error(status)).endswith(", or generate without enhancing.")
