"""Reads and writes the Hugging Face cache on disk, in the documented layout, so that other tools share the files.

    models--OWNER--NAME/
      refs/main                  the current commit
      snapshots/COMMIT/FILE      links to the blobs
      blobs/ETAG                 file contents; the etag is the sha256 of a large file, the git id of a small one
      blobs/ETAG.incomplete      a partial download; older versions of huggingface_hub use the same name
      trees/COMMIT.json          the commit's files with sizes and hashes, to check a snapshot for completeness
    .locks/models--OWNER--NAME/ETAG.lock

Two internals of huggingface_hub are used, so its version is pinned: the tree listings (`_tree_cache`, to know which
files are missing; huggingface_hub itself writes them only in `snapshot_download`, which cannot resume), and
`_create_symlink`, which also works on systems without symbolic links.
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
from flux2_studio.files.atomic import SHARED, atomic_write
from flux2_studio.models.hub.part_files import RepoSelection

DigestKind = Literal["sha256", "git"]  # the hash that the hub reports for large files (Git LFS), and for small ones


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """One file of a repository at one commit.

    size: in bytes. etag: the name of the blob. digest: which hash of the contents the etag is, None if unknown.
    git_id: the file's git id; for a large file, that of its LFS pointer.
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
    """The cache in folder `root`. lock_timeout: seconds of one attempt to get a lock that another program holds."""

    def __init__(self, root: Path, lock_timeout: float = 0.2) -> None:
        self.root = root
        self._patience = lock_timeout

    # --- reading the cache -----------------------------------------------------------------------------------------

    def snapshot(self, repo: str) -> Path | None:
        """Returns the folder of the current commit, None if nothing of `repo` is in the cache."""
        try:
            commit = (self._folder(repo) / "refs" / constants.DEFAULT_REVISION).read_text("utf-8").strip()
        except OSError:
            return None
        folder = self._folder(repo) / "snapshots" / commit
        return folder if commit and folder.is_dir() else None

    def list_files(self, repo: str) -> dict[str, RemoteFile] | None:
        """Returns the files of the current commit by name, None if the cache has no listing of it."""
        snapshot = self.snapshot(repo)
        entries = read_tree_cache(str(self._folder(repo)), snapshot.name) if snapshot else None
        if snapshot is None or entries is None:
            return None
        return {name: _file_from_tree(repo, snapshot.name, name, entry) for name, entry in entries.items()}

    def find_complete(self, pick: RepoSelection) -> Path | None:
        """Returns the current snapshot's folder, None if it lacks a listed file of `pick`."""
        snapshot = self.snapshot(pick.repo)
        if snapshot is None:
            return None
        names = pick.filter_names(self.list_files(pick.repo) or ())
        return snapshot if all((snapshot / name).is_file() for name in names) else None

    def is_complete(self, file: RemoteFile) -> bool:
        return _size(self.snapshot_path(file)) == file.size

    def bytes_on_disk(self, file: RemoteFile) -> int:
        """Returns the bytes of `file` on disk, including an unfinished download."""
        return file.size if self.is_complete(file) else min(_size(self.partial_path(file)) or 0, file.size)

    def bytes_of_selection(self, pick: RepoSelection) -> int:
        """Returns the bytes of `pick` on disk, including unfinished downloads."""
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

    # --- writing ---------------------------------------------------------------------------------------------------

    def set_current_commit(self, repo: str, commit: str, files: Mapping[str, RemoteFile]) -> None:
        """Makes `commit` the current one. Links blobs that are already on disk into its snapshot and deletes partial
        downloads of files that it no longer has."""
        previous_files = self.list_files(repo)
        snapshot = self._folder(repo) / "snapshots" / commit
        snapshot.mkdir(parents=True, exist_ok=True)
        if files and all(file.digest for file in files.values()):
            write_tree_cache(str(self._folder(repo)), commit, {name: _tree_entry(file) for name, file in files.items()})
        for file in files.values():
            if not self.is_complete(file) and _size(self.blob_path(file)) == file.size:
                self.link_into_snapshot(file)
        reference = self._folder(repo) / "refs" / constants.DEFAULT_REVISION
        reference.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(reference, SHARED) as out:
            out.write(commit.encode())
        new_etags = {file.etag for file in files.values()}
        for file in (previous_files or {}).values():
            if file.etag not in new_etags:
                with suppress(WeightsError):  # another program is still downloading it
                    self._drop_partial(file)

    def link_into_snapshot(self, file: RemoteFile) -> None:
        """Links the blob of `file` into its snapshot."""
        pointer = self.snapshot_path(file)
        pointer.parent.mkdir(parents=True, exist_ok=True)
        temporary = pointer.with_name(
            f".{uuid.uuid4().hex[:8]}.tmp"
        )  # replaced atomically, so the file never disappears
        _create_symlink(str(self.blob_path(file)), str(temporary), new_blob=True)
        temporary.replace(pointer)

    @contextmanager
    def exclusive_access(self, file: RemoteFile, on_wait: Callable[[], None]) -> Iterator[None]:
        """Locks `file` against other threads and other programs that download it. If a program dies, its lock is freed.

        on_wait: called after each failed attempt to get the lock; may raise to cancel.
        """
        with ExitStack() as stack:
            while True:
                try:
                    stack.enter_context(self._lock(file))
                    break
                except TimeoutError:
                    on_wait()
            yield

    # --- deleting --------------------------------------------------------------------------------------------------

    def remove(self, picks: Sequence[RepoSelection], keep: Sequence[RepoSelection]) -> int:
        """Deletes the files of `picks` at every commit, except those also in `keep`, and unused blobs.

        Returns the freed bytes. Raises `WeightsError` if files cannot be deleted or are being downloaded.
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
            cache_info = scan_cache_dir(self.root)
        except CacheNotFound:
            return freed
        repos = {repo.repo_id: repo for repo in cache_info.repos if repo.repo_type == "model"}
        for pick in picks:
            if pick.repo not in repos and self._folder(pick.repo).is_dir():
                raise WeightsError(
                    f"{self._folder(pick.repo)} is damaged and cannot be sorted out: delete this folder yourself."
                )
        files_to_delete = {
            file
            for repo in repos.values()
            for revision in repo.revisions
            for file in revision.files
            for name in [file.file_path.relative_to(revision.snapshot_path).as_posix()]
            if _is_selected(picks, repo.repo_id, name) and not _is_selected(keep, repo.repo_id, name)
        }
        try:
            strategy = cache_info.delete_files(*files_to_delete)
            freed += strategy.expected_freed_size
            strategy.execute()
            for folder in {self._folder(pick.repo) for pick in picks}:
                remaining_files = [
                    path for part in ("blobs", "snapshots") for path in folder.glob(f"{part}/**/*") if path.is_file()
                ]
                if folder.is_dir() and not remaining_files:
                    shutil.rmtree(folder)
        except OSError as error:
            raise WeightsError(f"{error.filename} cannot be deleted: allow writing there, or delete it.") from error
        for file in files_to_delete:
            if os.path.lexists(file.file_path):  # huggingface_hub only logs failed deletions
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
        """Deletes links to missing blobs: otherwise huggingface_hub would reject the whole repository."""
        for path in self._folder(repo).glob("snapshots/**/*"):
            if path.is_symlink() and not path.exists():
                with suppress(OSError):
                    path.unlink()

    @contextmanager
    def _lock(self, file: RemoteFile) -> Iterator[None]:
        """Holds huggingface_hub's lock of the blob. Raises `TimeoutError` if it is held elsewhere."""
        path = self.root / ".locks" / self._folder(file.repo).name / f"{file.etag}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with WeakFileLock(path, timeout=self._patience):
            yield

    def _folder(self, repo: str) -> Path:
        return self.root / repo_folder_name(repo_id=repo, repo_type="model")


def _file_from_tree(repo: str, commit: str, name: str, entry: TreeCacheEntry) -> RemoteFile:
    is_large = entry.lfs_sha256 is not None
    return RemoteFile(
        repo=repo,
        commit=commit,
        name=name,
        size=entry.size if entry.lfs_size is None else entry.lfs_size,
        etag=entry.lfs_sha256 or entry.blob_id,
        digest="sha256" if is_large else "git",
        git_id=entry.blob_id,
    )


def _tree_entry(file: RemoteFile) -> TreeCacheEntry:
    is_large = file.digest == "sha256"
    return TreeCacheEntry(
        size=file.size,
        blob_id=file.git_id,
        lfs_sha256=file.etag if is_large else None,
        lfs_size=file.size if is_large else None,
    )


def _is_selected(picks: Iterable[RepoSelection], repo: str, name: str) -> bool:
    return any(pick.repo == repo and pick.filter_names([name]) for pick in picks)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
