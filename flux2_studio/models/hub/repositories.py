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
from flux2_studio.models.hub.cache import Cache
from flux2_studio.models.hub.downloads import Downloads, Progress, Reached
from flux2_studio.models.hub.hub_errors import Refusals
from flux2_studio.models.hub.part_files import PartFiles, has_tokenizer, has_weights, own_copy, picks
from flux2_studio.models.hub.transfer import Transfer
from flux2_studio.settings import Settings

__all__ = ["Hub", "PartFiles", "Progress", "Reached", "Removed"]


@dataclass(frozen=True, kw_only=True)
class Removed:
    """What `Hub.remove` did. `kept`: parts that stay, each with the checkpoints on this machine that need it."""

    freed: int  # bytes
    kept: tuple[tuple[Part, tuple[Checkpoint, ...]], ...]


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
        patience: float = constants.HF_HUB_ETAG_TIMEOUT,
        free_space: Callable[[Path], int] | None = None,
    ) -> None:
        endpoint = endpoint or constants.ENDPOINT
        self._settings = settings
        self._endpoint = endpoint
        self._cache = Cache(cache or Path(constants.HF_HUB_CACHE))
        self._refusals = Refusals(endpoint, self._cache.root)
        self._downloads = Downloads(
            self._cache, Transfer(endpoint, self._cache, patience), self._refusals, free_space=free_space
        )

    def on_disk(self, part: Part) -> bool:
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

    def from_hub(self, part: Part) -> bool:
        """Whether `part` is the hub's: neither the user's own copy nor what ships with the studio."""
        return part.repo is not None and not (part.override and part.override in self._settings.overrides)

    def size_on_disk(self, part: Part) -> int:
        """Bytes that the cache holds of `part`, those of a broken-off download too."""
        return sum(self._cache.size(pick) for pick in picks(part)) if self.from_hub(part) else 0

    def reached(self, part: Part) -> Reached | None:
        """How far `part` is; None unless somebody in this program is downloading it."""
        return self._downloads.reached(part)

    def room(self) -> tuple[Path, int]:
        """The folder where downloads go, and the bytes that are free there."""
        return self._cache.root, self._downloads.free()

    def page(self, part: Part) -> str:
        """The address of the repository of `part`, where its licence is accepted."""
        return f"{self._endpoint}/{part.repo}"

    def locate(self, part: Part, progress: Progress) -> PartFiles:
        """The files of `part`, downloaded if need be. What `progress` raises ends the download and is passed on.

        Raises `WeightsError` for a local copy that is not there, `DownloadError` for what the hub does not give.
        """
        files = self.find(part)
        if files is None:
            self._downloads.download(part, progress)
            files = self._cached(part)
        if files is None:
            raise DownloadError(self._refusals.missing(part))
        return files

    def download(self, checkpoint: Checkpoint, parts: Sequence[Part], progress: Progress) -> None:
        """Have `parts` of `checkpoint` on this machine. Room for all of them is looked for before the first begins.

        Raises as `locate` does.
        """
        missing = [part for part in parts if not self.on_disk(part)]
        # By the table's sizes, which are about right; each part's own are looked at again when it begins.
        needed = sum(max(part.size - self.size_on_disk(part), 0) for part in missing if self.from_hub(part))
        self._downloads.check_room(checkpoint.label, needed)
        for part in sorted(missing, key=lambda part: not part.gated):  # a gate refuses before gigabytes have come
            self.locate(part, progress)

    def remove(self, checkpoint: Checkpoint, wanted: Collection[Checkpoint] = ()) -> Removed:
        """Delete from the cache what only `checkpoint` needs of the checkpoints that are complete on this machine, and
        of those that are `wanted` though they are not.

        Users' own copies are never touched. Raises `WeightsError` where files cannot be deleted, or are on their way.
        """
        others = [
            other
            for other in self._settings.checkpoints
            if other.name != checkpoint.name and (other in wanted or all(self.on_disk(part) for part in other.parts))
        ]
        needed = {part for other in others for part in parts_of(other)}
        there = [part for part in parts_of(checkpoint) if self.from_hub(part) and self.size_on_disk(part)]
        going = [part for part in there if part not in needed]
        for part in going:
            if self.reached(part):
                raise WeightsError(f"{part.repo}/{part.path} is being downloaded at the moment: stop that first.")
        freed = self._cache.remove(
            [pick for part in going for pick in picks(part)],
            [pick for part in needed if self.from_hub(part) for pick in picks(part)],
        )
        return Removed(
            freed=freed,
            kept=tuple(
                (part, tuple(other for other in others if part in parts_of(other))) for part in there if part in needed
            ),
        )

    def _local(self, part: Part) -> PartFiles | None:
        """The user's own copy or the studio's, None where `part` is the hub's. Raises `WeightsError`."""
        if part.override and (path := self._settings.overrides.get(part.override)):
            return own_copy(part, path)
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
            (pick,) = picks(part)
            snapshot = self._cache.complete(pick)
            file = snapshot / pick.path if snapshot else None
            return PartFiles(weights=file, tokenizer=None) if file and file.is_file() else None
        folders = []
        for pick in picks(part):
            snapshot = self._cache.complete(pick)
            if snapshot is None:
                return None
            folders.append(snapshot / pick.path)
        weights, tokenizer = folders
        if not has_weights(weights) or not has_tokenizer(tokenizer):
            return None
        return PartFiles(weights=weights, tokenizer=tokenizer)


def parts_of(checkpoint: Checkpoint) -> tuple[Part, ...]:
    """All that `checkpoint` uses, each once: the previews' small decoder may be its autoencoder."""
    return tuple(dict.fromkeys((*checkpoint.parts, checkpoint.tiny_autoencoder)))
