"""Finds a part's files: a local copy named by the user, the files that ship with the studio, or the Hugging Face hub.

huggingface_hub, which only this package imports, reads its own variables (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT). Downloads go to its cache. A part that is complete in the cache is used without checking for a newer
version, so the studio starts without a network and weights do not change unexpectedly.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from flux2_studio.checkpoints import Checkpoint, Part
from flux2_studio.errors import DownloadError, WeightsError
from flux2_studio.models.hub.cache import HubCache
from flux2_studio.models.hub.downloads import DownloadProgress, Downloads, ProgressCallback
from flux2_studio.models.hub.hub_errors import HubErrorMessages
from flux2_studio.models.hub.part_files import PartFiles, find_local_copy, has_tokenizer, has_weights, select_repo_files
from flux2_studio.models.hub.transfer import Transfer
from flux2_studio.settings import Settings

__all__ = ["DownloadProgress", "Hub", "PartFiles", "ProgressCallback", "RemovalResult"]


@dataclass(frozen=True, kw_only=True)
class RemovalResult:
    """The result of `Hub.remove`. `kept_parts`: parts that stay, each with the checkpoints that need it."""

    freed_bytes: int
    kept_parts: tuple[tuple[Part, tuple[Checkpoint, ...]], ...]


class Hub:
    """Finds parts on this machine, downloads missing ones, and removes downloads.

    endpoint, cache: the hub and the cache folder, by default those of huggingface_hub.
    timeout: seconds within which the hub must start to respond.
    free_space: returns the free bytes of a folder.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: str | None = None,
        cache: Path | None = None,
        timeout: float = constants.HF_HUB_ETAG_TIMEOUT,
        free_space: Callable[[Path], int] | None = None,
    ) -> None:
        endpoint = endpoint or constants.ENDPOINT
        self._settings = settings
        self._endpoint = endpoint
        self._cache = HubCache(cache or Path(constants.HF_HUB_CACHE))
        self._error_messages = HubErrorMessages(endpoint, self._cache.root)
        self._downloads = Downloads(
            self._cache, Transfer(endpoint, self._cache, timeout), self._error_messages, free_space=free_space
        )

    def is_on_disk(self, part: Part) -> bool:
        """Returns whether `part` is complete on this machine. Never uses the network."""
        try:
            return self.find(part) is not None
        except WeightsError:
            return False

    def find(self, part: Part) -> PartFiles | None:
        """Returns the files of `part`, None if it is not complete on this machine. Never uses the network.

        Raises `WeightsError` for a missing local copy.
        """
        return self._local(part) or self._cached(part)

    def is_from_hub(self, part: Part) -> bool:
        """Returns whether `part` comes from the hub, not from a local copy or the studio's assets."""
        return part.repo is not None and not (
            part.path_variable and part.path_variable in self._settings.path_overrides
        )

    def size_on_disk(self, part: Part) -> int:
        """Returns the bytes of `part` in the cache, including unfinished downloads."""
        return (
            sum(self._cache.bytes_of_selection(pick) for pick in select_repo_files(part))
            if self.is_from_hub(part)
            else 0
        )

    def download_progress(self, part: Part) -> DownloadProgress | None:
        """Returns the progress of `part`, None if this process is not downloading it."""
        return self._downloads.progress_of(part)

    def free_space(self) -> tuple[Path, int]:
        """Returns the download folder and its free bytes."""
        return self._cache.root, self._downloads.free_bytes()

    def repository_url(self, part: Part) -> str:
        """Returns the URL of `part`'s repository, where its licence can be accepted."""
        return f"{self._endpoint}/{part.repo}"

    def find_or_download(self, part: Part, progress: ProgressCallback) -> PartFiles:
        """Returns the files of `part`, downloading it if it is missing. An exception from `progress` stops waiting for
        the download and is re-raised.

        Raises `WeightsError` for a missing local copy, `DownloadError` if the download fails.
        """
        files = self.find(part)
        if files is None:
            self._downloads.download(part, progress)
            files = self._cached(part)
        if files is None:
            raise DownloadError(self._error_messages.missing_file_message(part))
        return files

    def download(self, checkpoint: Checkpoint, parts: Sequence[Part], progress: ProgressCallback) -> None:
        """Downloads the missing `parts` of `checkpoint`, after checking the free space for all of them.

        Raises what `find_or_download` raises.
        """
        missing = [part for part in parts if not self.is_on_disk(part)]
        # Uses the approximate sizes of `checkpoints.py`; each download checks its exact size when it starts.
        needed = sum(max(part.size - self.size_on_disk(part), 0) for part in missing if self.is_from_hub(part))
        self._downloads.check_free_space(checkpoint.label, needed)
        for part in sorted(
            missing, key=lambda part: not part.gated
        ):  # gated parts first: a refusal comes before gigabytes are downloaded
            self.find_or_download(part, progress)

    def remove(self, checkpoint: Checkpoint, wanted: Collection[Checkpoint] = ()) -> RemovalResult:
        """Deletes the parts of `checkpoint` from the cache, except those that other checkpoints need: the checkpoints
        that are complete on this machine, and those in `wanted`.

        Never touches the user's own copies. Raises `WeightsError` if files cannot be deleted or are being downloaded.
        """
        others = [
            other
            for other in self._settings.checkpoints
            if other.name != checkpoint.name and (other in wanted or all(self.is_on_disk(part) for part in other.parts))
        ]
        needed = {part for other in others for part in list_parts(other)}
        cached_parts = [part for part in list_parts(checkpoint) if self.is_from_hub(part) and self.size_on_disk(part)]
        parts_to_remove = [part for part in cached_parts if part not in needed]
        for part in parts_to_remove:
            if self.download_progress(part):
                raise WeightsError(f"{part.repo}/{part.path} is being downloaded at the moment: stop that first.")
        freed = self._cache.remove(
            [pick for part in parts_to_remove for pick in select_repo_files(part)],
            [pick for part in needed if self.is_from_hub(part) for pick in select_repo_files(part)],
        )
        return RemovalResult(
            freed_bytes=freed,
            kept_parts=tuple(
                (part, tuple(other for other in others if part in list_parts(other)))
                for part in cached_parts
                if part in needed
            ),
        )

    def _local(self, part: Part) -> PartFiles | None:
        """Returns the user's copy or the studio's files, None if `part` comes from the hub. Raises `WeightsError`."""
        if part.path_variable and (path := self._settings.path_overrides.get(part.path_variable)):
            return find_local_copy(part, path)
        if part.repo is not None:
            return None
        weights = self._settings.assets / part.path
        tokenizer = self._settings.assets / part.tokenizer[1] if part.tokenizer else None
        for path in (weights, tokenizer):
            if path is None or path.exists():
                continue
            if Path(part.path).is_absolute():  # a file of the user's own checkpoint folder
                raise WeightsError(f"{path} is not there any more: put it back, or choose another checkpoint.")
            raise WeightsError(f"{path} is missing, which ships with the studio: install the studio again.")
        return PartFiles(weights=weights, tokenizer=tokenizer)

    def _cached(self, part: Part) -> PartFiles | None:
        """Returns the files of `part` in the hub cache, None if any is missing."""
        if part.kind != "text":
            (pick,) = select_repo_files(part)
            snapshot = self._cache.find_complete(pick)
            file = snapshot / pick.path if snapshot else None
            return PartFiles(weights=file, tokenizer=None) if file and file.is_file() else None
        folders = []
        for pick in select_repo_files(part):
            snapshot = self._cache.find_complete(pick)
            if snapshot is None:
                return None
            folders.append(snapshot / pick.path)
        weights, tokenizer = folders
        if not has_weights(weights) or not has_tokenizer(tokenizer):
            return None
        return PartFiles(weights=weights, tokenizer=tokenizer)


def list_parts(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """Returns all parts of `checkpoint` without duplicates: its preview decoder may be its autoencoder."""
    return tuple(dict.fromkeys((*checkpoint.parts, checkpoint.tiny_autoencoder)))
