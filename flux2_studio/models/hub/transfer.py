"""One file from the hub into the cache: resumed where it broke off, and kept only if it is what the hub announced.

What arrives is written to `blobs/ETAG.incomplete` as it comes, so a program that is killed loses nothing: the next one
reads what is there, for its hash, and asks for the rest with a Range. huggingface_hub's own downloads start from zero
then (they write to a random name, lest two programs without a working lock write to the same file). Here the hash
tells: whoever finds it wrong in what was resumed starts anew. The hash, of the contents, is also the file's name, so
a file that has changed on the hub has another name and never meets the old one's bytes.

Files of repositories in xet storage come by plain HTTPS too, as the hub offers them to everybody: hf_xet can neither
go on after a kill nor be stopped by public means. It would be faster for what it finds on disk already, which weights
hardly ever are.
"""

from __future__ import annotations

import hashlib
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from httpx2 import Response, TransportError  # the client of huggingface_hub, which passes its errors on
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from flux2_studio import __version__
from flux2_studio.models.hub.cache import HubCache, RemoteFile
from flux2_studio.models.hub.part_files import RepoSelection

TransferCallback = Callable[
    [str, int], None
]  # what is being done with a file, and how many of its bytes that has reached

DOWNLOADING, CHECKING, WAITING, RETRYING = "Downloading", "Checking", "Waiting", "Retrying"
DOWNLOAD_RETRY_DELAYS_SECONDS = (
    1.0,
    2.0,
    4.0,
    8.0,
    15.0,
)  # seconds before each new attempt, as long as no attempt brings anything new
MAX_RANGE_BYTES = 8 * 10**9  # bytes asked for at once: the hub's CDN gives no more than 50 GB (MAX_HTTP_DOWNLOAD_SIZE)
READ_BLOCK_BYTES = 2**20  # bytes
HTTP_RETRYABLE = (408, 429, 500, 502, 503, 504)  # HTTP: worth asking again
HTTP_PARTIAL_CONTENT = 206  # HTTP: the range that was asked for
HTTP_RANGE_NOT_SATISFIABLE = 416  # HTTP: the file ends before the range begins


class DownloadStopped(Exception):
    """Nobody waits for the download any more."""


class CorruptDownload(Exception):
    """What the hub sends is not what it announced."""


class Transfer:
    """Fetches from the hub at `endpoint` into `cache`.

    patience: seconds within which the hub must begin to answer, and go on. pauses: seconds before each new attempt.
    stretch: bytes asked for at once.
    """

    def __init__(
        self,
        endpoint: str,
        cache: HubCache,
        timeout: float,
        retry_delays: tuple[float, ...] = DOWNLOAD_RETRY_DELAYS_SECONDS,
        range_bytes: int = MAX_RANGE_BYTES,
    ) -> None:
        self._endpoint = endpoint
        self._cache = cache
        self._patience = timeout
        self._pauses = retry_delays
        self._stretch = range_bytes

    def list_files(self, pick: RepoSelection) -> list[RemoteFile]:
        """The files of `pick` that the repository holds now, smallest first; their commit is the one that counts then.

        Raises what huggingface_hub and its client raise, and `OSError` where the cache cannot be written.
        """
        api = HfApi(endpoint=self._endpoint, library_name="flux2-studio", library_version=__version__)
        info = api.model_info(
            pick.repo, revision=constants.DEFAULT_REVISION, files_metadata=True, timeout=self._patience
        )
        siblings = {it.rfilename: it for it in info.siblings or () if _is_safe_path(it.rfilename)}
        if not _is_safe_path(info.sha):
            raise CorruptDownload(pick.repo)
        described = {
            name: _remote(pick.repo, info.sha, sibling) for name, sibling in siblings.items() if _described(sibling)
        }
        chosen = {
            name: described.get(name) or self._request_metadata(pick.repo, info.sha, name)
            for name in pick.filter_names(siblings.keys())
        }
        whole = described if len(described) == len(siblings) else chosen
        self._cache.set_current_commit(pick.repo, info.sha, whole)
        return sorted(chosen.values(), key=lambda file: (file.size, file.name))

    def fetch(self, file: RemoteFile, stop: threading.Event, on_progress: TransferCallback) -> None:
        """Have `file` in the cache. Raises `DownloadStopped` soon after `stop` is set, `CorruptDownload`, and what
        `list_files` raises."""
        if self._cache.is_complete(file):
            return
        partial = self._cache.partial_path(file)
        partial.parent.mkdir(parents=True, exist_ok=True)

        def waiting() -> None:
            if stop.is_set():
                raise DownloadStopped
            on_progress(WAITING, self._cache.bytes_on_disk(file))

        with self._cache.exclusive_access(file, waiting):
            if self._cache.is_complete(file):  # another program has finished it meanwhile
                return
            blob = self._cache.blob_path(file)
            if not blob.exists() or blob.stat().st_size != file.size:
                self._download_verified(file, partial, stop, on_progress)
                partial.replace(blob)
            self._cache.link_into_snapshot(file)

    def _request_metadata(self, repo: str, commit: str, name: str) -> RemoteFile:
        """A file that the listing only names, as mirrors' listings do."""
        found = get_hf_file_metadata(
            self._url(repo, commit, name), timeout=self._patience, endpoint=self._endpoint, headers=_headers()
        )
        if found.size is None or found.etag is None or not _is_safe_path(found.etag):
            raise CorruptDownload(f"{repo}/{name}")
        return RemoteFile(
            repo=repo, commit=commit, name=name, size=found.size, etag=found.etag, digest=None, git_id=found.etag
        )

    def _download_verified(
        self, file: RemoteFile, partial: Path, stop: threading.Event, on_progress: TransferCallback
    ) -> None:
        """Have all of `file` in `partial_path`, and its hash right."""
        resumed = partial.exists()
        while True:
            try:
                with partial.open("a+b") as out:
                    digest = self._append_missing(file, out, stop, on_progress)
                if digest is not None and digest != file.etag:
                    raise CorruptDownload(file.label)
                return
            except CorruptDownload:
                partial.unlink(missing_ok=True)
                if not resumed:
                    raise
            resumed = False  # what was there may have been to blame: once more, from the start

    def _append_missing(
        self, file: RemoteFile, out: BinaryIO, stop: threading.Event, on_progress: TransferCallback
    ) -> str | None:
        """Append to `out` what it lacks of `file`, and flush it to the disk. Returns the hash of it all."""
        hashed = _hash(file)
        out.seek(0)
        done = 0
        while block := out.read(READ_BLOCK_BYTES):
            if stop.is_set():
                raise DownloadStopped
            hashed.update(block)
            done += len(block)
            on_progress(CHECKING, done)
        if done > file.size:
            raise CorruptDownload(file.label)
        most, failures = done, 0
        while done < file.size:
            if stop.is_set():
                raise DownloadStopped
            trouble: Exception = CorruptDownload(file.label)  # if the answer just ends too early
            try:
                with self._open_stream(file, done) as response:
                    if (
                        done and response.status_code != HTTP_PARTIAL_CONTENT
                    ):  # a server that knows no ranges sends it all again
                        out.truncate(0)
                        hashed, done = _hash(file), 0
                    for block in response.iter_bytes():
                        if stop.is_set():
                            raise DownloadStopped
                        out.write(block)
                        out.flush()  # a program that is killed takes its buffers along
                        hashed.update(block)
                        done += len(block)
                        if done > file.size:
                            raise CorruptDownload(file.label)
                        on_progress(DOWNLOADING, done)
            except TransportError as error:
                trouble = error
            except HfHubHTTPError as error:
                if error.response.status_code not in HTTP_RETRYABLE:
                    raise
                trouble = error
            if done > most:
                most, failures = done, 0
            elif done < file.size:
                if failures == len(self._pauses):
                    raise trouble
                on_progress(RETRYING, done)
                stop.wait(self._pauses[failures])
                failures += 1
        os.fsync(out.fileno())  # before it gets its name: a power cut could leave the name, and holes behind it
        return None if file.digest is None else hashed.hexdigest()

    @contextmanager
    def _open_stream(self, file: RemoteFile, start: int) -> Iterator[Response]:
        """The hub's answer, from byte `start` on as far as one request reaches."""
        # Always from the hub's own address: its redirect to where the bytes are is valid for an hour only.
        headers = _headers() | {"Accept-Encoding": "identity"}
        end = min(start + self._stretch, file.size)
        if (start, end) != (0, file.size):
            headers["Range"] = f"bytes={start}-{end - 1}"
        with get_session().stream(
            "GET", self._url(file.repo, file.commit, file.name), headers=headers, timeout=self._patience
        ) as response:
            if response.status_code == HTTP_RANGE_NOT_SATISFIABLE:
                raise CorruptDownload(file.label)
            hf_raise_for_status(response)
            span = response.headers.get("Content-Range", "")
            if response.status_code == HTTP_PARTIAL_CONTENT and not span.startswith(f"bytes {start}-"):
                raise CorruptDownload(file.label)
            yield response

    def _url(self, repo: str, commit: str, name: str) -> str:
        return hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)


def _headers() -> dict[str, str]:
    """With the token of the environment or of the hub's login, if any; a redirect elsewhere does not get it."""
    return build_hf_headers(library_name="flux2-studio", library_version=__version__)


def _described(sibling: RepoSibling) -> bool:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return sibling.size is not None and sibling.blob_id is not None and etag is not None and _is_safe_path(etag)


def _is_safe_path(name: str | None) -> TypeGuard[str]:
    """Whether `name`, which a hub made up and which becomes a path, stays inside its folder."""
    return (
        name is not None and all(part not in ("", ".", "..") for part in re.split(r"[/\\]", name)) and ":" not in name
    )


def _remote(repo: str, commit: str, sibling: RepoSibling) -> RemoteFile:
    assert sibling.size is not None and sibling.blob_id is not None
    return RemoteFile(
        repo=repo,
        commit=commit,
        name=sibling.rfilename,
        size=sibling.lfs.size if sibling.lfs else sibling.size,
        etag=sibling.lfs.sha256 if sibling.lfs else sibling.blob_id,
        digest="sha256" if sibling.lfs else "git",
        git_id=sibling.blob_id,
    )


def _hash(file: RemoteFile) -> Any:
    """What makes the announced etag of the contents. Git's ids are SHA-1 over a header and the contents."""
    if file.digest == "git":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()
