"""Downloads single files from the hub into the cache, with resume and hash verification.

Received bytes go straight to `blobs/ETAG.incomplete`, so a killed program loses nothing: the next one hashes the
partial file and requests the rest with a Range header. huggingface_hub's own downloads would restart from zero (they
write to a random name, so that two programs without a working lock never write to the same file). Here the hash
protects the file: if it is wrong after a resume, the download restarts. The hash of the contents is also the file
name, so a file that changed on the hub has another name and is never mixed with old bytes.

Files in xet storage are downloaded over plain HTTPS too, which the hub always offers: hf_xet can neither resume after a
kill nor be stopped through a public API. It would only be faster for data already on disk, which is rare for weights.
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

from httpx2 import Response, TransportError  # huggingface_hub's HTTP client; its errors pass through
from huggingface_hub import HfApi, constants, get_hf_file_metadata, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

from flux2_studio import __version__
from flux2_studio.models.hub.cache import HubCache, RemoteFile
from flux2_studio.models.hub.part_files import RepoSelection

TransferCallback = Callable[[str, int], None]  # the activity and the number of bytes it has processed

DOWNLOADING, CHECKING, WAITING, RETRYING = "Downloading", "Checking", "Waiting", "Retrying"
# Delays between consecutive attempts that receive no new bytes; progress resets the count.
DOWNLOAD_RETRY_DELAYS_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0)
MAX_RANGE_BYTES = 8 * 10**9  # per request; the hub's CDN serves at most 50 GB (MAX_HTTP_DOWNLOAD_SIZE)
READ_BLOCK_BYTES = 2**20
HTTP_RETRYABLE = (408, 429, 500, 502, 503, 504)
HTTP_PARTIAL_CONTENT = 206
HTTP_RANGE_NOT_SATISFIABLE = 416  # the file ends before the range begins


class DownloadStopped(Exception):
    """The download was stopped because nobody waits for it any more."""


class CorruptDownload(Exception):
    """The received data does not match the announced size or hash, or the hub's metadata is invalid."""


class Transfer:
    """Downloads from the hub at `endpoint` into `cache`.

    timeout: seconds to wait for the hub's response and for each further read. retry_delays: seconds before each retry.
    range_bytes: largest number of bytes per request.
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
        """Returns the files of `pick` in the latest commit, smallest first, and makes that commit the current one.

        Raises what huggingface_hub and its client raise, and `OSError` if the cache cannot be written.
        """
        api = HfApi(endpoint=self._endpoint, library_name="flux2-studio", library_version=__version__)
        info = api.model_info(
            pick.repo, revision=constants.DEFAULT_REVISION, files_metadata=True, timeout=self._patience
        )
        siblings = {it.rfilename: it for it in info.siblings or () if _is_safe_path(it.rfilename)}
        if not _is_safe_path(info.sha):
            raise CorruptDownload(pick.repo)
        described = {
            name: _file_from_sibling(pick.repo, info.sha, sibling)
            for name, sibling in siblings.items()
            if _has_metadata(sibling)
        }
        chosen = {
            name: described.get(name) or self._request_metadata(pick.repo, info.sha, name)
            for name in pick.filter_names(siblings.keys())
        }
        listing = described if len(described) == len(siblings) else chosen
        self._cache.set_current_commit(pick.repo, info.sha, listing)
        return sorted(chosen.values(), key=lambda file: (file.size, file.name))

    def fetch(self, file: RemoteFile, stop: threading.Event, on_progress: TransferCallback) -> None:
        """Downloads `file` into the cache if it is missing. Raises `DownloadStopped` soon after `stop` is set,
        `CorruptDownload`, and what `list_files` raises."""
        if self._cache.is_complete(file):
            return
        partial = self._cache.partial_path(file)
        partial.parent.mkdir(parents=True, exist_ok=True)

        def on_wait() -> None:
            if stop.is_set():
                raise DownloadStopped
            on_progress(WAITING, self._cache.bytes_on_disk(file))

        with self._cache.exclusive_access(file, on_wait):
            if self._cache.is_complete(file):  # another program has finished it meanwhile
                return
            blob = self._cache.blob_path(file)
            if not blob.exists() or blob.stat().st_size != file.size:
                self._download_verified(file, partial, stop, on_progress)
                partial.replace(blob)
            self._cache.link_into_snapshot(file)

    def _request_metadata(self, repo: str, commit: str, name: str) -> RemoteFile:
        """Requests the metadata of a file whose listing has only its name, as on some mirrors."""
        metadata = get_hf_file_metadata(
            self._url(repo, commit, name), timeout=self._patience, endpoint=self._endpoint, headers=_headers()
        )
        if metadata.size is None or metadata.etag is None or not _is_safe_path(metadata.etag):
            raise CorruptDownload(f"{repo}/{name}")
        return RemoteFile(
            repo=repo,
            commit=commit,
            name=name,
            size=metadata.size,
            etag=metadata.etag,
            digest=None,
            git_id=metadata.etag,
        )

    def _download_verified(
        self, file: RemoteFile, partial: Path, stop: threading.Event, on_progress: TransferCallback
    ) -> None:
        """Completes `partial` and verifies its hash. After a corrupt resume, restarts once from the beginning."""
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
            resumed = False  # the old partial file may have been corrupt: retry once from the start

    def _append_missing(
        self, file: RemoteFile, out: BinaryIO, stop: threading.Event, on_progress: TransferCallback
    ) -> str | None:
        """Appends the missing bytes of `file` to `out` and syncs it to disk.

        Returns the hash of the whole file, None if `file.digest` is None.
        """
        hasher = _make_hasher(file)
        out.seek(0)
        done = 0
        while block := out.read(READ_BLOCK_BYTES):
            if stop.is_set():
                raise DownloadStopped
            hasher.update(block)
            done += len(block)
            on_progress(CHECKING, done)
        if done > file.size:
            raise CorruptDownload(file.label)
        furthest, failures = done, 0
        while done < file.size:
            if stop.is_set():
                raise DownloadStopped
            last_error: Exception = CorruptDownload(file.label)  # raised if the response ends early without an error
            try:
                with self._open_stream(file, done) as response:
                    # A server without support for ranges sends the whole file again.
                    if done and response.status_code != HTTP_PARTIAL_CONTENT:
                        out.truncate(0)
                        hasher, done = _make_hasher(file), 0
                    for block in response.iter_bytes():
                        if stop.is_set():
                            raise DownloadStopped
                        out.write(block)
                        out.flush()  # a killed program loses its buffers
                        hasher.update(block)
                        done += len(block)
                        if done > file.size:
                            raise CorruptDownload(file.label)
                        on_progress(DOWNLOADING, done)
            except TransportError as error:
                last_error = error
            except HfHubHTTPError as error:
                if error.response.status_code not in HTTP_RETRYABLE:
                    raise
                last_error = error
            if done > furthest:
                furthest, failures = done, 0
            elif done < file.size:
                if failures == len(self._pauses):
                    raise last_error
                on_progress(RETRYING, done)
                stop.wait(self._pauses[failures])
                failures += 1
        os.fsync(out.fileno())  # before the rename: a power cut could otherwise leave a named file with holes
        return None if file.digest is None else hasher.hexdigest()

    @contextmanager
    def _open_stream(self, file: RemoteFile, start: int) -> Iterator[Response]:
        """Opens the hub's response for the range from byte `start`, limited to one request."""
        # Always requests the hub's own URL, because its redirect to the CDN is only valid for an hour.
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
            content_range = response.headers.get("Content-Range", "")
            if response.status_code == HTTP_PARTIAL_CONTENT and not content_range.startswith(f"bytes {start}-"):
                raise CorruptDownload(file.label)
            yield response

    def _url(self, repo: str, commit: str, name: str) -> str:
        return hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)


def _headers() -> dict[str, str]:
    """Returns headers with the token of the environment or the hub login. Redirects to other hosts do not get it."""
    return build_hf_headers(library_name="flux2-studio", library_version=__version__)


def _has_metadata(sibling: RepoSibling) -> bool:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return sibling.size is not None and sibling.blob_id is not None and etag is not None and _is_safe_path(etag)


def _is_safe_path(name: str | None) -> TypeGuard[str]:
    """Returns whether the path `name`, which comes from the hub, stays inside its folder."""
    return (
        name is not None and all(part not in ("", ".", "..") for part in re.split(r"[/\\]", name)) and ":" not in name
    )


def _file_from_sibling(repo: str, commit: str, sibling: RepoSibling) -> RemoteFile:
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


def _make_hasher(file: RemoteFile) -> Any:
    """Returns the hash object that yields the etag. A git id is the SHA-1 of a header and the contents."""
    if file.digest == "git":
        return hashlib.sha1(b"blob %d\0" % file.size, usedforsecurity=False)
    return hashlib.sha256()
