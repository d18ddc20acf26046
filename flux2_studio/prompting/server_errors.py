"""An OpenAI-compatible server, OpenRouter or the user's own: its name for users, and its errors in words.

Error texts of the server are never passed on: they may contain the key, or anything else.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from socket import gaierror
from urllib.parse import urlsplit

from flux2_studio.prompting.replies import OR_WITHOUT_ENHANCING


class ChatServerError(Exception):
    """An error of the server, in words. is_retryable: whether a retry may help; retry_delay: the seconds to wait first,
    if the server says so."""

    def __init__(self, text: str, *, is_retryable: bool = False, retry_delay: float | None = None) -> None:
        super().__init__(text)
        self.is_retryable = is_retryable
        self.retry_delay = retry_delay


@dataclass(frozen=True, kw_only=True)
class ChatServer:
    """A server and the model used there.

    url: up to the path before /chat/completions. has_key: whether requests carry a key.
    """

    url: str
    model: str
    has_key: bool

    @property
    def is_openrouter(self) -> bool:
        host = (urlsplit(self.url).hostname or "").lower()
        return host == "openrouter.ai" or host.endswith(".openrouter.ai")

    @property
    def name(self) -> str:
        """The name for users, without the URL's path and credentials, which may be secret."""
        return "OpenRouter" if self.is_openrouter else f"The server at {urlsplit(self.url).netloc.rpartition('@')[2]}"

    def status_error(self, status: int, retry_after: str | None = None) -> ChatServerError:
        """Return the error for any HTTP status but 200. retry_after: the header of that name."""
        return ChatServerError(
            self._refusal(status),
            is_retryable=status == 429 or status >= 500,
            retry_delay=_parse_retry_after(retry_after),
        )

    def connection_error(self, error: BaseException) -> ChatServerError:
        """Return the error for a server that `error` made unreachable."""
        causes = list(_iterate_causes(error))
        if any(isinstance(cause, gaierror | UnicodeError) for cause in causes):
            return ChatServerError(
                f"{self.name} cannot be found: check FLUX2_OPENROUTER_URL and the network, {OR_WITHOUT_ENHANCING}."
            )
        if any(isinstance(cause, ssl.SSLError) for cause in causes):
            return ChatServerError(
                f"{self.name} cannot be reached safely: its certificate is not valid, or it does not speak HTTPS. "
                f"Check FLUX2_OPENROUTER_URL, {OR_WITHOUT_ENHANCING}."
            )
        if any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            return ChatServerError(
                f"{self.name} is not running: start it, correct FLUX2_OPENROUTER_URL, {OR_WITHOUT_ENHANCING}."
            )
        return ChatServerError(
            f"{self.name} cannot be reached: check the network and FLUX2_OPENROUTER_URL, {OR_WITHOUT_ENHANCING}."
        )

    def timeout_error(self, seconds: float) -> ChatServerError:
        return ChatServerError(
            f"{self.name} did not answer within {seconds:.0f} s: try again, choose a faster model, "
            f"{OR_WITHOUT_ENHANCING}."
        )

    def interrupted_error(self) -> ChatServerError:
        return ChatServerError(f"{self.name} broke off in the middle of its answer: try again, {OR_WITHOUT_ENHANCING}.")

    def protocol_error(self) -> ChatServerError:
        """Return the error for a server that does not speak the OpenAI protocol."""
        return ChatServerError(
            f"{self.name} does not answer as an OpenAI-compatible server does: set FLUX2_OPENROUTER_URL to the address "
            f"of one (it usually ends in /v1), {OR_WITHOUT_ENHANCING}."
        )

    def moderation_error(self) -> ChatServerError:
        return ChatServerError(
            f"{self.model} refused to answer. Change the prompt, choose another model, {OR_WITHOUT_ENHANCING}."
        )

    def key_leak_error(self) -> ChatServerError:
        return ChatServerError(
            f"{self.name} put your API key into its answer: do not use it any more, and replace the key, "
            f"{OR_WITHOUT_ENHANCING}."
        )

    def _refusal(self, status: int) -> str:
        who = self.name
        if status == 401 and not self.has_key:
            return (
                f"{who} asks for an API key: type it on the page, or set OPENROUTER_API_KEY to it, "
                f"{OR_WITHOUT_ENHANCING}."
            )
        if status == 401:
            return (
                f"{who} does not accept the API key: type the right one, check OPENROUTER_API_KEY, "
                f"{OR_WITHOUT_ENHANCING}."
            )
        if status == 402:
            return (
                f"{who} says that the key has no credit left: add some there (at OpenRouter under "
                f"https://openrouter.ai/credits), use another key, {OR_WITHOUT_ENHANCING}."
            )
        if status == 403:
            return (
                f"{who} does not let this through: its moderation objects to the prompt or a reference, or the key may "
                f"not use {self.model}. Change the prompt, choose another model, {OR_WITHOUT_ENHANCING}."
            )
        if status == 404:
            return (
                f"{who} has no model called {self.model} that can read this, or no such address: check the name and "
                f"FLUX2_OPENROUTER_URL (it usually ends in /v1), with references choose a model that sees pictures, "
                f"{OR_WITHOUT_ENHANCING}."
            )
        if status == 413:
            return f"{who} says that the request is too large: use fewer references, {OR_WITHOUT_ENHANCING}."
        if status == 429:
            return (
                f"{who} has too much to do for this key or model (HTTP 429): try again later, {OR_WITHOUT_ENHANCING}."
            )
        if 300 <= status < 400:
            return (
                f"{who} sends us on to another address, where we do not take the key: look where it leads, and set "
                f"FLUX2_OPENROUTER_URL to that if you trust it, {OR_WITHOUT_ENHANCING}."
            )
        if status in (408, 504):
            return (
                f"{who} gave up waiting for {self.model} (HTTP {status}): choose another model, {OR_WITHOUT_ENHANCING}."
            )
        if status >= 500:
            return (
                f"{who} or {self.model} has trouble (HTTP {status}): try again, choose another model, "
                f"{OR_WITHOUT_ENHANCING}."
            )
        return (
            f"{who} does not take the request (HTTP {status}): {self.model} may not see pictures, or not know these "
            f"sampling settings. Choose another model, {OR_WITHOUT_ENHANCING}."
        )


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield `error` and everything that led to it."""
    pending: list[BaseException | None] = [error]
    visited: set[int] = set()
    while pending:
        if (current := pending.pop()) is not None and id(current) not in visited:
            visited.add(id(current))
            yield current
            pending += [current.__cause__, current.__context__, *getattr(current, "exceptions", ())]


def _parse_retry_after(retry_after: str | None) -> float | None:
    """Return the seconds in a Retry-After header: a number or a date (RFC 9110, 10.2.3); None if it is neither."""
    if retry_after is None:
        return None
    if re.fullmatch(r"\d{1,9}(\.\d{1,9})?", retry_after.strip()):
        return float(retry_after)
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError, TypeError):
        return None
