"""Where a part's files are: a local copy that the user named, what ships with the studio, or the Hugging Face hub.

The only importer of huggingface_hub, which keeps its cache and reads its own variables (HF_TOKEN, HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT). A part that is complete in the cache is used as it is, without asking the network whether
there is a newer one: the studio starts without a connection, and weights do not change under a user's feet.

Only the files that are read are downloaded: safetensors, never pickles, and of repositories that carry their weights
twice (Mistral's `consolidated.safetensors`) one copy.
"""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils._xet import abort_xet_session
from huggingface_hub.utils.tqdm import tqdm

from flux2_studio.checkpoints import Part
from flux2_studio.errors import DownloadError, WeightsError
from flux2_studio.settings import Settings

Progress = Callable[[str, float | None], None]  # what is being done, and how much of it (0..1) where that is known

WEIGHT_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "config.json",  # names the model, from which transformers knows the tokenizer's class
)
VOCABULARIES = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"))  # a tokenizer needs one
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, kw_only=True)
class PartFiles:
    """A part on disk: `weights` is a file or a folder; `tokenizer` is the folder of a text part's tokenizer."""

    weights: Path
    tokenizer: Path | None


class Hub:
    """Finds parts, and downloads those that are nowhere on this machine.

    endpoint, cache: another hub and another cache folder than huggingface_hub's own choice.
    patience: seconds within which the hub must begin to answer.
    """

    def __init__(
        self,
        settings: Settings,
        endpoint: str | None = None,
        cache: Path | None = None,
        patience: float = constants.HF_HUB_ETAG_TIMEOUT,
    ) -> None:
        self._settings = settings
        self._endpoint = endpoint or constants.ENDPOINT
        self._cache = cache or Path(constants.HF_HUB_CACHE)
        self._patience = patience

    def on_disk(self, part: Part) -> bool:
        """Whether `part` is complete on this machine. Never uses the network."""
        try:
            return (self._local(part) or self._cached(part)) is not None
        except WeightsError:
            return False

    def locate(self, part: Part, progress: Progress) -> PartFiles:
        """The files of `part`, downloaded if need be. What `progress` raises ends the download and is passed on.

        Raises `WeightsError` for a local copy that is not there, `DownloadError` for what the hub does not give.
        """
        files = self._local(part) or self._cached(part)
        if files is None:
            self._download(part, progress)
            files = self._cached(part)
        if files is None:
            raise DownloadError(
                f"{part.repo} does not hold {part.path or 'all that is needed'} (any more): look at "
                f"{self._endpoint}/{part.repo}{_or_local_copy(part)}."
            )
        return files

    def _local(self, part: Part) -> PartFiles | None:
        """The user's own copy or the studio's, None where `part` is the hub's."""
        if part.override and (path := self._settings.overrides.get(part.override)):
            return _own_text(part.override, path) if part.kind == "text" else _own_weights(part.override, path)
        if part.repo is not None:
            return None
        weights = self._settings.assets / part.path
        tokenizer = self._settings.assets / part.tokenizer[1] if part.tokenizer else None
        for path in (weights, tokenizer):
            if path is not None and not path.exists():
                raise WeightsError(f"{path} is missing, which ships with the studio: install the studio again.")
        return PartFiles(weights=weights, tokenizer=tokenizer)

    def _cached(self, part: Part) -> PartFiles | None:
        """The hub's files of `part` from the cache; None unless every one is there."""
        assert part.repo is not None
        if part.kind != "text":
            file = try_to_load_from_cache(part.repo, part.path, cache_dir=self._cache)
            return PartFiles(weights=Path(file), tokenizer=None) if isinstance(file, str) else None
        weights, tokenizer = (self._cached_folder(*folder) for folder in _folders(part))
        if weights is None or tokenizer is None or not _has_weights(weights) or not _has_tokenizer(tokenizer):
            return None
        return PartFiles(weights=weights, tokenizer=tokenizer)

    def _cached_folder(self, repo: str, folder: str, files: tuple[str, ...]) -> Path | None:
        try:
            root = snapshot_download(
                repo, allow_patterns=_patterns(folder, files), cache_dir=self._cache, local_files_only=True
            )
        except LocalEntryNotFoundError:
            return None
        return Path(root) / folder

    def _download(self, part: Part, progress: Progress) -> None:
        assert part.repo is not None
        name = _short(part.repo)
        if part.kind != "text":
            teller = _Teller(f"{name} autoencoder" if part.kind == "autoencoder" else name, progress)
            self._fetch(part, part.repo, part.path, [part.path], teller)
            return
        (repo, folder, files), tokenizer = _folders(part)
        self._fetch(part, repo, folder, _patterns(folder, files), _Teller(f"{name} text encoder", progress, part.size))
        repo, folder, files = tokenizer
        self._fetch(part, repo, folder, _patterns(folder, files), _Teller(f"{_short(repo)} tokenizer", progress))

    def _fetch(self, part: Part, repo: str, path: str, patterns: list[str], teller: _Teller) -> None:
        def download() -> None:
            # snapshot_download begins with this question too, but waits for the answer without end.
            HfApi(endpoint=self._endpoint).model_info(repo, revision=constants.DEFAULT_REVISION, timeout=self._patience)
            # For a single file too: without a connection this fails at once, hf_hub_download after half a minute.
            snapshot_download(
                repo,
                allow_patterns=patterns,
                cache_dir=self._cache,
                endpoint=self._endpoint,
                tqdm_class=teller.bar_class(),
            )

        teller.begin()
        try:
            downloaded = _in_background(download)
            while not wait([downloaded], teller.INTERVAL).done:
                teller.remind()
            downloaded.result()
        except BaseException as error:
            if teller.raised is not None:
                raise teller.raised from None
            if not isinstance(error, Exception):
                raise
            # Besides the hub's own, whatever its HTTP client, its storage client and the file system raise.
            raise DownloadError(self._explain(error, part, repo, f"{repo}/{path}".rstrip("/"))) from error
        if teller.raised is not None:  # the storage client's threads do not pass an exception on
            raise teller.raised

    def _explain(self, error: Exception, part: Part, repo: str, what: str) -> str:
        """`error` in a sentence that says what to do. Nothing of the error's own text, which may hold a secret."""
        page = f"{self._endpoint}/{repo}"
        tokens = f"{self._endpoint}/settings/tokens"
        or_local_copy = _or_local_copy(part)
        causes = list(_causes(error))
        if any(getattr(cause, "errno", None) in NO_ROOM or "os error 28" in str(cause) for cause in causes):
            return (
                f"There is no room for {what} ({_amount(part.size)}) in {self._cache}: free some space, or set HF_HOME "
                f"to a folder on a larger drive{or_local_copy}."
            )
        if isinstance(error, OSError) and error.filename is not None:  # the file system's, not a socket's
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
        if any(
            isinstance(cause, (EntryNotFoundError, RevisionNotFoundError))
            and not isinstance(cause, LocalEntryNotFoundError)
            for cause in causes
        ):
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


class _Teller:
    """Tells `progress` how a download goes: in the bytes of its files, not more often than every half second."""

    INTERVAL = 0.5  # seconds

    def __init__(self, name: str, progress: Progress, size: int = 0) -> None:
        """size: of all files together in bytes, where the hub only learns of them one after another."""
        self._text = f"Downloading {name}"
        self._progress = progress
        self._size = size
        self._told = time.monotonic()
        self._last: tuple[str, float | None] = (self._text, None)
        self._lock = threading.Lock()
        self.raised: BaseException | None = None  # by `progress`

    def begin(self) -> None:
        self._progress(*self._last)

    def remind(self) -> None:
        """Tell the same again if nothing is heard of the hub, because only when told can `progress` end the wait."""
        with self._lock:
            if self.raised is not None:
                raise self.raised
            if time.monotonic() - self._told > 2 * self.INTERVAL:
                self._tell()

    def update(self, done: int, total: int) -> None:
        """`done` of `total` bytes are on disk. Called from several threads."""
        with self._lock:
            if self.raised is not None:
                raise self.raised
            total = max(total, self._size, done, 1)
            if done < total and time.monotonic() - self._told < self.INTERVAL:
                return
            self._told = time.monotonic()
            self._last = (f"{self._text}: {_amount(total, done)}", done / total)
            self._tell()

    def _tell(self) -> None:
        try:
            self._progress(*self._last)
        except BaseException as error:
            self.raised = error
            # The storage client ignores what its callback raises, and may not be stopped from within it.
            threading.Thread(target=abort_xet_session, daemon=True).start()
            raise

    def bar_class(self) -> type[tqdm]:
        """A progress bar for huggingface_hub that draws nothing and tells of the bytes that reach the disk."""
        teller = self

        class Bar(tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:
                # Other bars count files, and bytes on the wire, of which compression makes fewer.
                self._counts = options.get("unit") == "B" and not str(options.get("name")).endswith(".transfer")
                super().__init__(*args, **(options | {"disable": True}))

            def update(self, n: float | None = 1) -> None:
                with self.get_lock():
                    self.n += n or 0
                if self._counts:
                    teller.update(int(self.n), int(self.total or 0))

        return Bar


def _in_background(work: Callable[[], None]) -> Future[None]:
    """Run `work` in a thread that can be left alone: a pool would wait for it when the program ends."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except BaseException as error:  # noqa: BLE001 -- whoever looks at the future gets it
            future.set_exception(error)

    threading.Thread(target=run, name="flux2-download", daemon=True).start()
    return future


def _own_weights(variable: str, path: Path) -> PartFiles:
    if not path.exists():
        raise WeightsError(
            f"{variable} points to {path}, where there is nothing: set it to a .safetensors file or to the folder that "
            f"holds it, or unset it."
        )
    return PartFiles(weights=path, tokenizer=None)


def _own_text(variable: str, path: Path) -> PartFiles:
    """A text encoder's folder with its tokenizer in it or beside it, or a folder with both as subfolders.

    The subfolder goes first: a whole FLUX.2 repository has safetensors of its own at the root, the transformer's.
    """
    if not path.is_dir():
        raise WeightsError(
            f"{variable} points to {path}, where there is no folder: set it to the folder that holds the text "
            f"encoder's config.json, .safetensors files and tokenizer, or unset it."
        )
    places = (path / "text_encoder", path)
    weights = next((at for at in places if (at / "config.json").is_file() and any(at.glob("*.safetensors"))), None)
    if weights is None:
        raise WeightsError(
            f"{variable} points to {path}, where there is no config.json with .safetensors files beside it, nor in "
            f"text_encoder/ in it: set it to the text encoder's folder, or unset it."
        )
    beside = (weights, weights / "tokenizer", weights.parent / "tokenizer")
    tokenizer = next((at for at in beside if _has_tokenizer(at)), None)
    if tokenizer is None:
        raise WeightsError(
            f"{variable} points to {path}, which has no tokenizer: put its tokenizer.json and tokenizer_config.json "
            f"into {weights}, or into a folder called tokenizer beside it."
        )
    return PartFiles(weights=weights, tokenizer=tokenizer)


def _folders(part: Part) -> tuple[tuple[str, str, tuple[str, ...]], tuple[str, str, tuple[str, ...]]]:
    """(repository, folder in it, files) of a text part's weights and of its tokenizer."""
    assert part.repo is not None
    repo, folder = part.tokenizer or (None, part.path)
    return (part.repo, part.path, WEIGHT_FILES), (repo or part.repo, folder, TOKENIZER_FILES)


def _patterns(folder: str, files: tuple[str, ...]) -> list[str]:
    return [f"{folder}/{file}" if folder else file for file in files]


def _has_weights(folder: Path) -> bool:
    """Whether all shards are there: what a broken-off download lacks, the index still lists."""
    if not (folder / "config.json").is_file():
        return False
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return (folder / "model.safetensors").is_file()
    try:
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        return bool(shards) and all((folder / shard).is_file() for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() and any(
        all((folder / name).is_file() for name in files) for files in VOCABULARIES
    )


def _short(repo: str) -> str:
    return repo.rpartition("/")[2]


def _or_local_copy(part: Part) -> str:
    return f", or set {part.override} to a local copy" if part.override else ""


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """`error` and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _amount(total: int, done: int | None = None) -> str:
    """'7.8 GB', or '1.2 of 7.8 GB'."""
    unit, name = (10**9, "GB") if total >= 10**9 else (10**6, "MB")
    return f"{'' if done is None else f'{done / unit:.1f} of '}{total / unit:.1f} {name}"
