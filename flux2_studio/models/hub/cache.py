"""The Hugging Face cache on disk, in the layout that huggingface_hub documents, so that other tools share the files.

    models--OWNER--NAME/
      refs/main                  the commit that counts
      snapshots/COMMIT/FILE      links to the blobs
      blobs/ETAG                 contents; the etag is a large file's sha256, a small one's id in git
      blobs/ETAG.incomplete      what has arrived of one: our stable name, older huggingface_hubs' too
      trees/COMMIT.json          the commit's files with sizes and hashes, by which a snapshot is known to be whole
    .locks/models--OWNER--NAME/ETAG.lock

Of huggingface_hub's internals it uses the tree listings (`_tree_cache`: written by `snapshot_download` alone, which
cannot resume; read to know what is missing), and `_create_symlink`, which copes with systems that have no links. Its
version is pinned.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from huggingface_hub import constants, scan_cache_dir
from huggingface_hub._tree_cache import TreeCacheEntry, read_tree_cache, write_tree_cache
from huggingface_hub.errors import CacheNotFound
from huggingface_hub.file_download import _create_symlink, repo_folder_name
from huggingface_hub.utils import WeakFileLock  # type: ignore[attr-defined]  # re-exported without saying so

from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.part_files import RepoSelection

DigestKind = Literal["sha256", "git"]  # what the hub gives of large files (Git LFS), and of small ones


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a repository at one commit.

    size: in bytes. etag: what names the blob; `digest` says what kind of hash of the contents it is, None if it may be
    any. git_id: the file's id in git, for a large one that of its pointer.
    """

    repo: str
    commit: str
    name: str
    size: int
    etag: str
    digest: DigestKind | None
    git_id: str

    @property
    def label(self) -> str:
        return f"{self.repo}/{self.name}"


class HubCache:
    """The cache in folder `root`. `lock_timeout`: seconds to wait for another program's lock before looking around."""

    def __init__(self, root: Path, lock_timeout: float = 0.2) -> None:
        self.root = root
        self._patience = lock_timeout

    # --- what is there ---------------------------------------------------------------------------------------------

    def snapshot(self, repo: str) -> Path | None:
        """The folder of the commit that counts, None if nothing of `repo` was ever fetched."""
        try:
            commit = (self._folder(repo) / "refs" / constants.DEFAULT_REVISION).read_text("utf-8").strip()
        except OSError:
            return None
        folder = self._folder(repo) / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def list_files(self, repo: str) -> dict[str, RemoteFile] | None:
        """The files of the commit that counts by name, None where no listing of it was kept."""
        snapshot = self.snapshot(repo)
        entries = read_tree_cache(str(self._folder(repo)), snapshot.name) if snapshot else None
        if snapshot is None or entries is None:
            return None
        return {name: _remote(repo, snapshot.name, name, entry) for name, entry in entries.items()}

    def find_complete(self, pick: RepoSelection) -> Path | None:
        """The snapshot's folder, if no file of `pick` is known to be missing from it."""
        snapshot = self.snapshot(pick.repo)
        if snapshot is None:
            return None
        names = pick.filter_names(self.list_files(pick.repo) or ())
        return snapshot if all((snapshot / name).is_file() for name in names) else None

    def is_complete(self, file: RemoteFile) -> bool:
        return _size(self.snapshot_path(file)) == file.size

    def bytes_on_disk(self, file: RemoteFile) -> int:
        """How many bytes of `file` are on disk, of a broken-off download too."""
        return file.size if self.is_complete(file) else min(_size(self.partial_path(file)) or 0, file.size)

    def bytes_of_selection(self, pick: RepoSelection) -> int:
        """Bytes that `pick` takes on disk, finished or not."""
        listing = self.list_files(pick.repo)
        if listing is not None:
            return sum(self.bytes_on_disk(listing[name]) for name in pick.filter_names(listing))
        snapshot = self.snapshot(pick.repo)
        if snapshot is None:
            return 0
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        return sum(_size(snapshot / name) or 0 for name in pick.filter_names(names))

    def snapshot_path(self, file: RemoteFile) -> Path:
        return self._folder(file.repo) / "snapshots" / file.commit / file.name

    def blob_path(self, file: RemoteFile) -> Path:
        return self._folder(file.repo) / "blobs" / file.etag

    def partial_path(self, file: RemoteFile) -> Path:
        return self._folder(file.repo) / "blobs" / f"{file.etag}.incomplete"

    # --- what comes in ---------------------------------------------------------------------------------------------

    def set_current_commit(self, repo: str, commit: str, files: Mapping[str, RemoteFile]) -> None:
        """Make `commit` the one that counts. What it has in common with the last one stays in place."""
        before = self.list_files(repo)
        snapshot = self._folder(repo) / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        if files and all(file.digest for file in files.values()):
            write_tree_cache(str(self._folder(repo)), commit, {name: _entry(file) for name, file in files.items()})
        for file in files.values():
            if not self.is_complete(file) and _size(self.blob_path(file)) == file.size:
                self.link_into_snapshot(file)
        reference = self._folder(repo) / "refs" / constants.DEFAULT_REVISION
        reference.parent.mkdir(parents=True, exist_ok=True)
        fresh = reference.with_name(f"{reference.name}.{uuid.uuid4().hex[:8]}.tmp")
        fresh.write_text(commit, "utf-8")
        fresh.replace(reference)
        wanted = {file.etag for file in files.values()}
        for file in (before or {}).values():
            if file.etag not in wanted:
                with suppress(WeightsError):  # another program still wants it: then it is that one's
                    self._drop_partial(file)

    def link_into_snapshot(self, file: RemoteFile) -> None:
        """Show `file`, whose blob is there, in its snapshot."""
        pointer = self.snapshot_path(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        fresh = pointer.with_name(f".{uuid.uuid4().hex[:8]}.tmp")  # so that nobody finds it gone for a moment
        _create_symlink(str(self.blob_path(file)), str(fresh), new_blob=True)
        fresh.replace(pointer)

    @contextmanager
    def exclusive_access(self, file: RemoteFile, on_wait: Callable[[], None]) -> Iterator[None]:
        """Keep other threads and other programs that download from `file`; a program that dies lets go of it.

        on_wait: called now and then while another one has the file; it may raise to give up.
        """
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._lock(file))
                    break
                except TimeoutError:
                    on_wait()
            yield

    # --- what goes -------------------------------------------------------------------------------------------------

    def remove(self, picks: Sequence[RepoSelection], keep: Sequence[RepoSelection]) -> int:
        """Delete the files of `picks` at every commit, except those that `keep` has too, and blobs that nothing uses.

        Returns the bytes that became free. Raises `WeightsError` where they cannot be deleted, or are on their way in.
        """
        if not picks:
            return 0
        freed = 0
        for pick in picks:
            listing = self.list_files(pick.repo) or {}
            for name in pick.filter_names(listing):
                if not _is_selected(keep, pick.repo, name):
                    freed += self._drop_partial(listing[name])
            self._drop_dangling_links(pick.repo)
        try:
            scanned = scan_cache_dir(self.root)
        except CacheNotFound:
            return freed
        repos = {repo.repo_id: repo for repo in scanned.repos if repo.repo_type == "model"}
        for pick in picks:
            if pick.repo not in repos and self._folder(pick.repo).is_dir():
                raise WeightsError(
                    f"{self._folder(pick.repo)} is damaged and cannot be sorted out: delete this folder yourself."
                )
        doomed = {
            file
            for repo in repos.values()
            for revision in repo.revisions
            for file in revision.files
            for name in [file.file_path.relative_to(revision.snapshot_path).as_posix()]
            if _is_selected(picks, repo.repo_id, name) and not _is_selected(keep, repo.repo_id, name)
        }
        try:
            strategy = scanned.delete_files(*doomed)
            freed += strategy.expected_freed_size
            strategy.execute()
            for folder in {self._folder(pick.repo) for pick in picks}:
                left = [
                    path for part in ("blobs", "snapshots") for path in folder.glob(f"{part}/**/*") if path.is_file()
                ]
                if folder.is_dir() and not left:
                    shutil.rmtree(folder)
        except OSError as error:
            raise WeightsError(f"{error.filename} cannot be deleted: allow writing there, or delete it.") from error
        for file in doomed:
            if os.path.lexists(file.file_path):  # huggingface_hub only logs what it may not delete
                raise WeightsError(f"{file.file_path} cannot be deleted: allow writing there, or delete it.")
        return freed

    def _drop_partial(self, file: RemoteFile) -> int:
        partial = self.partial_path(file)
        if not partial.exists():
            return 0
        try:
            with self._lock(file):
                size = _size(partial) or 0
                partial.unlink(missing_ok=True)
                return size
        except TimeoutError as error:
            raise WeightsError(f"{file.label} is being downloaded at the moment: stop that first.") from error

    def _drop_dangling_links(self, repo: str) -> None:
        """Links to blobs that somebody deleted by hand: huggingface_hub would refuse the whole repository."""
        for path in self._folder(repo).glob("snapshots/**/*"):
            if path.is_symlink() and not path.exists():
                with suppress(OSError):
                    path.unlink()

    @contextmanager
    def _lock(self, file: RemoteFile) -> Iterator[None]:
        """huggingface_hub's own lock of the blob. Raises `TimeoutError` while another one has it."""
        path = self.root / ".locks" / self._folder(file.repo).name / f"{file.etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path, timeout=self._patience):
            yield

    def _folder(self, repo: str) -> Path:
        return self.root / repo_folder_name(repo_id=repo, repo_type="model")


def _remote(repo: str, commit: str, name: str, entry: TreeCacheEntry) -> RemoteFile:
    large = entry.lfs_sha256 is not None
    return RemoteFile(
        repo=repo,
        commit=commit,
        name=name,
        size=entry.size if entry.lfs_size is None else entry.lfs_size,
        etag=entry.lfs_sha256 or entry.blob_id,
        digest="sha256" if large else "git",
        git_id=entry.blob_id,
    )


def _entry(file: RemoteFile) -> TreeCacheEntry:
    large = file.digest == "sha256"
    return TreeCacheEntry(
        size=file.size,
        blob_id=file.git_id,
        lfs_sha256=file.etag if large else None,
        lfs_size=file.size if large else None,
    )


def _is_selected(picks: Iterable[RepoSelection], repo: str, name: str) -> bool:
    return any(pick.repo == repo and pick.filter_names([name]) for pick in picks)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
