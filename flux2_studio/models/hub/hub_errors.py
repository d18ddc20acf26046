"""Explains failed downloads in sentences that say what to do: the page to open, the variable to set.

The messages never include the text of the original error, which may contain a secret.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from flux2_studio.checkpoints import Part
from flux2_studio.models.hub.transfer import CorruptDownload

DISK_FULL_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class HubErrorMessages:
    """Writes messages for errors of the hub at `endpoint` and of the cache folder `cache`."""

    def __init__(self, endpoint: str, cache: Path) -> None:
        self._endpoint = endpoint
        self._cache = cache

    def explain(self, error: Exception, part: Part, repo: str, what: str) -> str:
        """Returns the message for `error`, raised for the files `what` of `repo` during the download of `part`."""
        page = f"{self._endpoint}/{repo}"
        tokens = f"{self._endpoint}/settings/tokens"
        or_local_copy = local_copy_hint(part)
        causes = list(_iterate_causes(error))
        if any(getattr(cause, "errno", None) in DISK_FULL_ERRNOS for cause in causes):
            return (
                f"There is no room for {what} ({format_size(part.size)}) in {self._cache}: free some space, or set "
                "HF_HOME "
                f"to a folder on a larger drive{or_local_copy}. What has arrived is kept."
            )
        if isinstance(error, CorruptDownload):
            return (
                f"What the hub sends as {what} is not what it announced (its size or hash is wrong), so it was thrown "
                f"away: try again; if that does not help, look for a proxy that changes downloads, and at {page}"
                f"{or_local_copy}."
            )
        if isinstance(error, OSError) and error.filename is not None:  # from the file system, not from a socket
            return (
                f"{what} cannot be stored in {self._cache}: allow writing there, or set HF_HOME to another folder"
                f"{or_local_copy}."
            )
        response = next((cause.response for cause in causes if isinstance(cause, HfHubHTTPError)), None)
        status = response.status_code if response is not None else None
        signed_in = response is not None and "authorization" in response.request.headers
        gated = part.gated or any(isinstance(cause, GatedRepoError) for cause in causes)
        if status == 401 and signed_in:
            return (
                f"The hub does not accept this machine's token: make a new one at {tokens} and set HF_TOKEN to it, or "
                f"remove the old one{or_local_copy}."
            )
        if status == 401 and gated:
            return (
                f"{repo} is only for those who have accepted its licence: sign in at {page} and accept it, then make "
                f"a token at {tokens} and set HF_TOKEN to it{or_local_copy}."
            )
        if status == 403:
            return (
                f"Your account has no access to {repo} yet: accept its licence at {page} (and let a fine-grained token "
                f"read gated repositories, at {tokens}), then try again{or_local_copy}."
            )
        if any(isinstance(cause, RepositoryNotFoundError) for cause in causes):
            return f"The hub has no repository {repo}, or hides it: look at {page}{or_local_copy}."
        if any(isinstance(cause, (EntryNotFoundError, RevisionNotFoundError)) for cause in causes):
            return f"The hub does not hold {what} (any more): look at {page}{or_local_copy}."
        if constants.is_offline_mode():
            return (
                f"{what} is not on this machine, and HF_HUB_OFFLINE forbids downloading it: unset that variable"
                f"{or_local_copy}."
            )
        if status is not None:
            return f"The hub has trouble at the moment (HTTP {status}): try again later{or_local_copy}."
        return (
            f"{what} could not be downloaded, because {self._endpoint} cannot be reached or the connection broke: "
            f"check it and try again{or_local_copy}."
        )

    def missing_file_message(self, part: Part) -> str:
        """Returns the message for a repository that lacks the files of `part`."""
        return (
            f"{part.repo} does not hold {part.path or 'all that is needed'} (any more): look at "
            f"{self._endpoint}/{part.repo}{local_copy_hint(part)}."
        )

    def no_space_message(self, what: str, needed: int, free: int, margin: int, or_else: str = "") -> str:
        """Returns the message for too little space for `needed` more bytes with `margin` bytes left free."""
        return (
            f"There is no room for {what} in {self._cache}: {format_size(needed)} are still to come and "
            f"{format_size(margin)} "
            f"should stay free, but only {format_size(free)} are free. Free some space, or set HF_HOME to a folder "
            "on a "
            f"larger drive{or_else}."
        )


def local_copy_hint(part: Part) -> str:
    return f", or set {part.path_variable} to a local copy" if part.path_variable else ""


def format_size(total: int, done: int | None = None) -> str:
    """Formats bytes as '7.8 GB' or '1.2 of 7.8 GB'."""
    unit, name = (10**9, "GB") if total >= 10**9 else (10**6, "MB")
    return f"{'' if done is None else f'{done / unit:.1f} of '}{total / unit:.1f} {name}"


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yields `error` and its chain of causes."""
    visited_ids: set[int] = set()
    while error is not None and id(error) not in visited_ids:
        visited_ids.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
