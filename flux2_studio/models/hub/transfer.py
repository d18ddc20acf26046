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
from flux2_studio.models.hub.cache import Cache, RemoteFile
from flux2_studio.models.hub.part_files import Pick

Report = Callable[[str, int], None]  # what is being done with a file, and how many of its bytes that has reached

DOWNLOADING, CHECKING, WAITING, RETRYING = "Downloading", "Checking", "Waiting", "Retrying"
PAUSES = (1.0, 2.0, 4.0, 8.0, 15.0)  # seconds before each new attempt, as long as no attempt brings anything new
STRETCH = 8 * 10**9  # bytes asked for at once: the hub's CDN gives no more than 50 GB (MAX_HTTP_DOWNLOAD_SIZE)
READ = 2**20  # bytes
PASSING = (408, 429, 500, 502, 503, 504)  # HTTP: worth asking again
PARTIAL = 206  # HTTP: the range that was asked for
NOT_SATISFIABLE = 416  # HTTP: the file ends before the range begins


class Stopped(Exception):
    """Nobody waits for the download any more."""


class Damaged(Exception):
    """What the hub sends is not what it announced."""


class Transfer:
    """Fetches from the hub at `endpoint` into `cache`.

    patience: seconds within which the hub must begin to answer, and go on. pauses: seconds before each new attempt.
    stretch: bytes asked for at once.
    """

    def __init__(
        self,
        endpoint: str,
        cache: Cache,
        patience: float,
        pauses: tuple[float, ...] = PAUSES,
        stretch: int = STRETCH,
    ) -> None:
        self._endpoint = endpoint
        self._cache = cache
        self._patience = patience
        self._pauses = pauses
        self._stretch = stretch

    def listing(self, pick: Pick) -> list[RemoteFile]:
        """The files of `pick` that the repository holds now, smallest first; their commit is the one that counts then.

        Raises what huggingface_hub and its client raise, and `OSError` where the cache cannot be written.
        """
        api = HfApi(endpoint=self._endpoint, library_name="flux2-studio", library_version=__version__)
        info = api.model_info(
            pick.repo, revision=constants.DEFAULT_REVISION, files_metadata=True, timeout=self._patience
        )
        siblings = {it.rfilename: it for it in info.siblings or () if _plain(it.rfilename)}
        if not _plain(info.sha):
            raise Damaged(pick.repo)
        described = {
            name: _remote(pick.repo, info.sha, sibling) for name, sibling in siblings.items() if _described(sibling)
        }
        chosen = {
            name: described.get(name) or self._ask(pick.repo, info.sha, name) for name in pick.of(siblings.keys())
        }
        whole = described if len(described) == len(siblings) else chosen
        self._cache.turn_to(pick.repo, info.sha, whole)
        return sorted(chosen.values(), key=lambda file: (file.size, file.name))

    def fetch(self, file: RemoteFile, stop: threading.Event, report: Report) -> None:
        """Have `file` in the cache. Raises `Stopped` soon after `stop` is set, `Damaged`, and what `listing` raises."""
        if self._cache.here(file):
            return
        partial = self._cache.partial(file)
        partial.parent.mkdir(parents=True, exist_ok=True)

        def waiting() -> None:
            if stop.is_set():
                raise Stopped
            report(WAITING, self._cache.arrived(file))

        with self._cache.alone(file, waiting):
            if self._cache.here(file):  # another program has finished it meanwhile
                return
            blob = self._cache.blob(file)
            if not blob.exists() or blob.stat().st_size != file.size:
                self._complete(file, partial, stop, report)
                partial.replace(blob)
            self._cache.link(file)

    def _ask(self, repo: str, commit: str, name: str) -> RemoteFile:
        """A file that the listing only names, as mirrors' listings do."""
        found = get_hf_file_metadata(
            self._url(repo, commit, name), timeout=self._patience, endpoint=self._endpoint, headers=_headers()
        )
        if found.size is None or found.etag is None or not _plain(found.etag):
            raise Damaged(f"{repo}/{name}")
        return RemoteFile(
            repo=repo, commit=commit, name=name, size=found.size, etag=found.etag, digest=None, git_id=found.etag
        )

    def _complete(self, file: RemoteFile, partial: Path, stop: threading.Event, report: Report) -> None:
        """Have all of `file` in `partial`, and its hash right."""
        resumed = partial.exists()
        while True:
            try:
                with partial.open("a+b") as out:
                    digest = self._fill(file, out, stop, report)
                if digest is not None and digest != file.etag:
                    raise Damaged(file.what)
                return
            except Damaged:
                partial.unlink(missing_ok=True)
                if not resumed:
                    raise
            resumed = False  # what was there may have been to blame: once more, from the start

    def _fill(self, file: RemoteFile, out: BinaryIO, stop: threading.Event, report: Report) -> str | None:
        """Append to `out` what it lacks of `file`, and flush it to the disk. Returns the hash of it all."""
        hashed = _hash(file)
        out.seek(0)
        done = 0
        while block := out.read(READ):
            if stop.is_set():
                raise Stopped
            hashed.update(block)
            done += len(block)
            report(CHECKING, done)
        if done > file.size:
            raise Damaged(file.what)
        most, failures = done, 0
        while done < file.size:
            if stop.is_set():
                raise Stopped
            trouble: Exception = Damaged(file.what)  # if the answer just ends too early
            try:
                with self._open(file, done) as response:
                    if done and response.status_code != PARTIAL:  # a server that knows no ranges sends it all again
                        out.truncate(0)
                        hashed, done = _hash(file), 0
                    for block in response.iter_bytes():
                        if stop.is_set():
                            raise Stopped
                        out.write(block)
                        out.flush()  # a program that is killed takes its buffers along
                        hashed.update(block)
                        done += len(block)
                        if done > file.size:
                            raise Damaged(file.what)
                        report(DOWNLOADING, done)
            except TransportError as error:
                trouble = error
            except HfHubHTTPError as error:
                if error.response.status_code not in PASSING:
                    raise
                trouble = error
            if done > most:
                most, failures = done, 0
            elif done < file.size:
                if failures == len(self._pauses):
                    raise trouble
                report(RETRYING, done)
                stop.wait(self._pauses[failures])
                failures += 1
        os.fsync(out.fileno())  # before it gets its name: a power cut could leave the name, and holes behind it
        return None if file.digest is None else hashed.hexdigest()

    @contextmanager
    def _open(self, file: RemoteFile, start: int) -> Iterator[Response]:
        """The hub's answer, from byte `start` on as far as one request reaches."""
        # Always from the hub's own address: its redirect to where the bytes are is valid for an hour only.
        headers = _headers() | {"Accept-Encoding": "identity"}
        end = min(start + self._stretch, file.size)
        if (start, end) != (0, file.size):
            headers["Range"] = f"bytes={start}-{end - 1}"
        with get_session().stream(
            "GET", self._url(file.repo, file.commit, file.name), headers=headers, timeout=self._patience
        ) as response:
            if response.status_code == NOT_SATISFIABLE:
                raise Damaged(file.what)
            hf_raise_for_status(response)
            span = response.headers.get("Content-Range", "")
            if response.status_code == PARTIAL and not span.startswith(f"bytes {start}-"):
                raise Damaged(file.what)
            yield response

    def _url(self, repo: str, commit: str, name: str) -> str:
        return hf_hub_url(repo, name, revision=commit, endpoint=self._endpoint)


def _headers() -> dict[str, str]:
    """With the token of the environment or of the hub's login, if any; a redirect elsewhere does not get it."""
    return build_hf_headers(library_name="flux2-studio", library_version=__version__)


def _described(sibling: RepoSibling) -> bool:
    etag = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    return sibling.size is not None and sibling.blob_id is not None and etag is not None and _plain(etag)


def _plain(name: str | None) -> TypeGuard[str]:
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
