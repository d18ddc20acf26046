"""Where a part's files are: a local copy that the user named, what ships with the studio, or the Hugging Face hub.

huggingface_hub, which only this package imports, reads its own variables (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE,
HF_ENDPOINT), and its cache is where downloads go. A part that is complete in the cache is used as it is, without asking
the network whether there is a newer one: the studio starts without a connection, and weights do not change under a
user's feet.
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
    """What `Hub.remove` did. `kept_parts`: parts that stay, each with the checkpoints on this machine that need it."""

    freed_bytes: int  # bytes
    kept_parts: tuple[tuple[Part, tuple[Checkpoint, ...]], ...]


class Hub:
    """Finds parts, downloads those that are nowhere on this machine, and removes what was downloaded.

    endpoint, cache: another hub and another cache folder than huggingface_hub's own choice.
    patience: seconds within which the hub must begin to answer.
    free_space: how many bytes are free in a folder.
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
        """Whether `part` is complete on this machine. Never uses the network."""
        try:
            return self.find(part) is not None
        except WeightsError:
            return False

    def find(self, part: Part) -> PartFiles | None:
        """The files of `part` if it is complete on this machine. Never uses the network.

        Raises `WeightsError` for a local copy that is not there.
        """
        return self._local(part) or self._cached(part)

    def is_from_hub(self, part: Part) -> bool:
        """Whether `part` is the hub's: neither the user's own copy nor what ships with the studio."""
        return part.repo is not None and not (
            part.path_variable and part.path_variable in self._settings.path_overrides
        )

    def size_on_disk(self, part: Part) -> int:
        """Bytes that the cache holds of `part`, those of a broken-off download too."""
        return (
            sum(self._cache.bytes_of_selection(pick) for pick in select_repo_files(part))
            if self.is_from_hub(part)
            else 0
        )

    def download_progress(self, part: Part) -> DownloadProgress | None:
        """How far `part` is; None unless somebody in this program is downloading it."""
        return self._downloads.progress_of(part)

    def free_space(self) -> tuple[Path, int]:
        """The folder where downloads go, and the bytes that are free there."""
        return self._cache.root, self._downloads.free_bytes()

    def repository_url(self, part: Part) -> str:
        """The address of the repository of `part`, where its licence is accepted."""
        return f"{self._endpoint}/{part.repo}"

    def find_or_download(self, part: Part, progress: ProgressCallback) -> PartFiles:
        """The files of `part`, downloaded if need be. What `progress` raises ends the download and is passed on.

        Raises `WeightsError` for a local copy that is not there, `DownloadError` for what the hub does not give.
        """
        files = self.find(part)
        if files is None:
            self._downloads.download(part, progress)
            files = self._cached(part)
        if files is None:
            raise DownloadError(self._error_messages.missing_file_message(part))
        return files

    def download(self, checkpoint: Checkpoint, parts: Sequence[Part], progress: ProgressCallback) -> None:
        """Have `parts` of `checkpoint` on this machine. Room for all of them is looked for before the first begins.

        Raises as `find_or_download` does.
        """
        missing = [part for part in parts if not self.is_on_disk(part)]
        # By the table's sizes, which are about right; each part's own are looked at again when it begins.
        needed = sum(max(part.size - self.size_on_disk(part), 0) for part in missing if self.is_from_hub(part))
        self._downloads.check_free_space(checkpoint.label, needed)
        for part in sorted(missing, key=lambda part: not part.gated):  # a gate refuses before gigabytes have come
            self.find_or_download(part, progress)

    def remove(self, checkpoint: Checkpoint, wanted: Collection[Checkpoint] = ()) -> RemovalResult:
        """Delete from the cache what only `checkpoint` needs of the checkpoints that are complete on this machine, and
        of those that are `wanted` though they are not.

        Users' own copies are never touched. Raises `WeightsError` where files cannot be deleted, or are on their way.
        """
        others = [
            other
            for other in self._settings.checkpoints
            if other.name != checkpoint.name and (other in wanted or all(self.is_on_disk(part) for part in other.parts))
        ]
        needed = {part for other in others for part in list_parts(other)}
        there = [part for part in list_parts(checkpoint) if self.is_from_hub(part) and self.size_on_disk(part)]
        going = [part for part in there if part not in needed]
        for part in going:
            if self.download_progress(part):
                raise WeightsError(f"{part.repo}/{part.path} is being downloaded at the moment: stop that first.")
        freed = self._cache.remove(
            [pick for part in going for pick in select_repo_files(part)],
            [pick for part in needed if self.is_from_hub(part) for pick in select_repo_files(part)],
        )
        return RemovalResult(
            freed_bytes=freed,
            kept_parts=tuple(
                (part, tuple(other for other in others if part in list_parts(other)))
                for part in there
                if part in needed
            ),
        )

    def _local(self, part: Part) -> PartFiles | None:
        """The user's own copy or the studio's, None where `part` is the hub's. Raises `WeightsError`."""
        if part.path_variable and (path := self._settings.path_overrides.get(part.path_variable)):
            return find_local_copy(part, path)
        if part.repo is not None:
            return None
        weights = self._settings.assets / part.path
        tokenizer = self._settings.assets / part.tokenizer[1] if part.tokenizer else None
        for path in (weights, tokenizer):
            if path is None or path.exists():
                continue
            if Path(part.path).is_absolute():  # of the user's own folder
                raise WeightsError(f"{path} is not there any more: put it back, or choose another checkpoint.")
            raise WeightsError(f"{path} is missing, which ships with the studio: install the studio again.")
        return PartFiles(weights=weights, tokenizer=tokenizer)

    def _cached(self, part: Part) -> PartFiles | None:
        """The hub's files of `part` from the cache; None unless every one is there."""
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
    """All that `checkpoint` uses, each once: the previews' small decoder may be its autoencoder."""
    return tuple(dict.fromkeys((*checkpoint.parts, checkpoint.tiny_autoencoder)))
