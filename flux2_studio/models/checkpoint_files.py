"""Opens a checkpoint's files: checks headers and measures sizes without reading any weights.

A header is read again only if its file has changed. So planning a request usually opens no file.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from flux2_studio.checkpoints import Checkpoint, LocalWriter, Part
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import AutoencoderParams, TextRecipe, TransformerParams
from flux2_studio.engine.text.encoder import TEXT_ENCODER_FOLDER, TextEncoderFile, open_text_encoder
from flux2_studio.engine.text.writer import Writer, WriterFile, open_writer
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.weights.loading import (
    AUTOENCODER_FOLDER,
    TRANSFORMER_FOLDER,
    WeightFile,
    WeightStorage,
    open_autoencoder,
    open_tiny_decoder,
    open_transformer,
)
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.part_files import PartFiles
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.memory.choices import choose_dtype, choose_storage
from flux2_studio.models.memory.plan import ModelFootprint, PartWeightBytes, count_weight_bytes
from flux2_studio.request import SIZE_MULTIPLE
from flux2_studio.settings import Settings

PartStamp = tuple[tuple[str, int, int, int], ...]  # path, inode, size and modification time of each file
# Subfolder of a part's folder that may contain its files; otherwise they are in the folder itself.
PART_SUBFOLDERS = {"flow": TRANSFORMER_FOLDER, "autoencoder": AUTOENCODER_FOLDER, "text": TEXT_ENCODER_FOLDER}
# Suffixes of the files that are read from a folder. Other files are ignored.
STAMPED_SUFFIXES = (".safetensors", ".json", ".model", ".jinja", "merges.txt")
# Tokens of one conversation with a language model: system message and chat template (under 700), a prompt of about
# 2,000 words (far more than the 512 tokens that are encoded for drawing), and a long answer.
MAX_CONVERSATION_TOKENS = 4096
VISION_IMAGE_SIZE = (768, 768)  # largest picture, in pixels, that a language model is asked about


@dataclass(frozen=True)
class PartKey:
    """Identifies a part in memory. Equal keys share the same loaded part.

    recipe: of text encoders only. is_whole_model: whether the part is the complete language model, which can write too.
    """

    part: Part
    dtype: torch.dtype
    storage: WeightStorage
    stamp: PartStamp
    recipe: TextRecipe | None = None
    is_whole_model: bool = False

    @property
    def context_key(self) -> PartKey:
        """Cache key of prompt contexts: a text encoder and its complete model return bit-identical contexts."""
        return replace(self, is_whole_model=False)

    @property
    def shared_with(self) -> PartKey | None:
        """The key of the complete model for a text encoder, and vice versa; None for other parts."""
        return None if self.recipe is None else replace(self, is_whole_model=not self.is_whole_model)


@dataclass(frozen=True, kw_only=True)
class CheckpointFiles:
    """The opened files of a checkpoint, checked to match each other.

    `text` is None if another machine encodes prompts, and a `WriterFile` if the complete language model is loaded
    instead of the text encoder. `tiny` is None if the autoencoder decodes previews itself or no decoder is used.
    """

    checkpoint: Checkpoint
    flow: WeightFile[Transformer]
    autoencoder: WeightFile[Autoencoder]
    text: TextEncoderFile | WriterFile | None
    tiny: WeightFile[TinyDecoder] | None
    keys: dict[str, PartKey]  # by kind of part: text, flow, autoencoder, tiny
    footprint: ModelFootprint
    notes: tuple[str, ...]
    mapped: frozenset[str]  # kinds of the parts whose files are never modified in place
    on_unreadable: Callable[[PartKey], None]

    def load(self, kind: str, device: torch.device, on_progress: Callable[[float], None] | None = None) -> Any:
        """Reads the part of that kind onto `device`.

        on_progress: called with the fraction read; may raise to cancel. Raises what `WeightFile.load` raises; after a
        `WeightsError`, the header is read again next time.
        """
        parts: dict[str, Any] = {
            "text": self.text, "flow": self.flow, "autoencoder": self.autoencoder, "tiny": self.tiny
        }  # fmt: skip
        key = self.keys[kind]
        try:
            return parts[kind].load(
                device=device,
                dtype=key.dtype,
                storage=key.storage,
                use_mmap=kind in self.mapped,
                on_progress=on_progress,
            )
        except WeightsError:
            self.on_unreadable(key)
            raise


@dataclass(frozen=True, kw_only=True)
class LocalWriterFiles:
    """The opened files of a language model.

    extra_bytes: bytes of its weights that the text encoder alone does not load. writing_bytes: returns the activation
    bytes for a number of tokens and the (height, width) of each picture, see `WriterFile.writing_bytes`.
    """

    model: LocalWriter
    writer_file: WriterFile
    key: PartKey
    weights: PartWeightBytes
    extra_bytes: int
    writing_bytes: Callable[[int, tuple[tuple[int, int], ...]], int]
    mapped: bool
    on_unreadable: Callable[[PartKey], None]

    def load(self, device: torch.device, on_progress: Callable[[float], None] | None = None) -> Writer:
        """Reads the model onto `device`; see `CheckpointFiles.load`."""
        key = self.key
        try:
            return self.writer_file.load(
                device=device, dtype=key.dtype, storage=key.storage, use_mmap=self.mapped, on_progress=on_progress
            )
        except WeightsError:
            self.on_unreadable(key)
            raise


class CheckpointOpener:
    """Opens checkpoints and language models for a device. Thread-safe."""

    def __init__(self, settings: Settings, hub: Hub, device: torch.device) -> None:
        self._settings = settings
        self._hub = hub
        self._device = device
        self._lock = threading.Lock()
        self._headers: dict[tuple[Part, TextRecipe | None, bool], tuple[PartStamp, Any]] = {}
        # The latest, by checkpoint name and whether its text encoder is the complete language model.
        self._footprints: dict[tuple[str, bool], tuple[tuple[PartKey, ...], ModelFootprint]] = {}
        self._writers: dict[str, LocalWriterFiles] = {}  # the latest, by name
        self._unavailable: dict[Part, str] = {}  # tiny autoencoders with the error message; not retried at every run

    def parts(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """Returns the parts of `checkpoint` that must be on this machine."""
        remote = self._settings.uses_remote_text_encoder(checkpoint)
        return tuple(part for part in checkpoint.parts if not (remote and part.kind == "text"))

    def open(
        self, checkpoint: Checkpoint, progress: ProgressCallback, *, fetch_preview_decoder: bool = True
    ) -> CheckpointFiles:
        """Opens and checks `checkpoint`'s files, downloading missing ones. `progress` may raise to cancel.

        fetch_preview_decoder: whether to download a missing preview decoder too.

        Raises `WeightsError` for files that are missing, damaged or do not belong to this checkpoint.
        """
        # Gated parts first: a refusal comes before gigabytes are downloaded.
        parts_by_gate = sorted(self.parts(checkpoint), key=lambda part: not part.gated)
        files: dict[str, PartFiles] = {part.kind: self._hub.find_or_download(part, progress) for part in parts_by_gate}
        stamps = {kind: stamp_part(kind, found) for kind, found in files.items()}
        if not self._checked_parts() >= {(part, stamps[part.kind]) for part in self.parts(checkpoint)}:
            progress(f"Checking the files of {checkpoint.label}", None)
        flow = self._get_header(checkpoint.flow, stamps["flow"], lambda: open_transformer(files["flow"].weights))
        autoencoder = self._get_header(
            checkpoint.autoencoder, stamps["autoencoder"], lambda: open_autoencoder(files["autoencoder"].weights)
        )
        text: TextEncoderFile | None = None
        if text_files := files.get("text"):
            encoder_files = text_files
            text = self._get_header(
                checkpoint.text,
                stamps["text"],
                lambda: open_text_encoder(
                    encoder_files.weights, encoder_files.tokenizer or encoder_files.weights, checkpoint.recipe
                ),
                checkpoint.recipe,
            )
        check_parts_match(
            checkpoint,
            {kind: found.weights.name for kind, found in files.items()},
            flow.params,
            autoencoder.params,
            text.width if text else flow.params.context_width,
        )
        tiny, notes = self._open_tiny_decoder(checkpoint, stamps, progress, fetch_preview_decoder)
        parts = {"flow": checkpoint.flow, "autoencoder": checkpoint.autoencoder}
        if text is not None:
            parts["text"] = checkpoint.text
        if tiny is not None:
            parts["tiny"] = checkpoint.tiny_autoencoder
        keys = {
            kind: PartKey(
                part,
                choose_dtype(self._settings.dtype, self._device, checkpoint, part),
                choose_storage(self._settings.quantize, self._settings.dtype, self._device, part),
                stamps[kind],
                checkpoint.recipe if kind == "text" else None,
            )
            for kind, part in parts.items()
        }
        return CheckpointFiles(
            checkpoint=checkpoint,
            flow=flow,
            autoencoder=autoencoder,
            text=text,
            tiny=tiny,
            keys=keys,
            footprint=self._get_footprint(checkpoint, flow, autoencoder, text, tiny, keys),
            notes=notes,
            mapped=frozenset(kind for kind, part in parts.items() if is_safe_to_mmap(part, self._settings)),
            on_unreadable=self._forget,
        )

    def writer(self, model: LocalWriter, progress: ProgressCallback) -> LocalWriterFiles:
        """Opens and checks the files of `model`, downloading missing ones. `progress` may raise to cancel.

        Raises `WeightsError` for files that are missing, damaged or of a model that cannot write.
        """
        part = model.part
        files = self._hub.find_or_download(part, progress)
        stamp = stamp_part("text", files)
        key = PartKey(
            part,
            choose_dtype(self._settings.dtype, self._device, None, part),
            choose_storage(self._settings.quantize, self._settings.dtype, self._device, part),
            stamp,
            model.recipe,
            is_whole_model=True,
        )
        with self._lock:
            cached = self._writers.get(model.name)
        if cached is not None and (cached.key, cached.model) == (key, model):
            return cached
        progress(f"Checking the files of {model.label}", None)
        writer_file: WriterFile = self._get_header(
            part,
            stamp,
            lambda: open_writer(files.weights, files.tokenizer or files.weights, model.recipe),
            model.recipe,
            is_whole_model=True,
        )
        opened = self._opened_writer(model, writer_file, key)
        with self._lock:
            self._writers[model.name] = opened
        return opened

    def with_whole_model(
        self, opened: CheckpointFiles, model: LocalWriter, progress: ProgressCallback
    ) -> CheckpointFiles:
        """Returns `opened` with `model`, the complete language model of its text encoder, in place of the encoder.

        Raises what `writer` raises.
        """
        writer = self.writer(model, progress)
        keys = {**opened.keys, "text": writer.key}
        return replace(
            opened,
            text=writer.writer_file,
            keys=keys,
            footprint=self._get_footprint(
                opened.checkpoint, opened.flow, opened.autoencoder, writer.writer_file, opened.tiny, keys
            ),
        )

    def _opened_writer(self, model: LocalWriter, checked: WriterFile, key: PartKey) -> LocalWriterFiles:
        dtype, quantized = key.dtype, _is_quantized(checked, key)
        sizes = checked.tensor_bytes(dtype=dtype, storage=key.storage)

        @lru_cache
        def writing_bytes(tokens: int, pictures: tuple[tuple[int, int], ...]) -> int:
            return checked.writing_bytes(dtype=dtype, tokens=tokens, pictures=pictures, quantized=quantized)

        return LocalWriterFiles(
            model=model,
            writer_file=checked,
            key=key,
            weights=count_weight_bytes(sizes, checked.block_prefixes),
            extra_bytes=sum(sizes.values())
            - sum(checked.text_encoder.tensor_bytes(dtype=dtype, storage=key.storage).values()),
            writing_bytes=writing_bytes,
            mapped=is_safe_to_mmap(model.part, self._settings),
            on_unreadable=self._forget,
        )

    def _checked_parts(self) -> set[tuple[Part, PartStamp]]:
        with self._lock:
            return {
                (part, stamp) for (part, _, is_whole_model), (stamp, _) in self._headers.items() if not is_whole_model
            }

    def _get_header(
        self,
        part: Part,
        stamp: PartStamp,
        read: Callable[[], Any],
        recipe: TextRecipe | None = None,
        *,
        is_whole_model: bool = False,
    ) -> Any:
        with self._lock:
            cached_stamp, opened = self._headers.get((part, recipe, is_whole_model), (None, None))
            if cached_stamp != stamp:
                opened = read()
                self._headers[part, recipe, is_whole_model] = stamp, opened
            return opened

    def _forget(self, key: PartKey) -> None:
        """Drops everything cached about the files of `key`, which may have changed."""
        with self._lock:
            self._headers.pop((key.part, key.recipe, key.is_whole_model), None)
            self._footprints = {name: cached for name, cached in self._footprints.items() if key not in cached[0]}
            self._writers = {name: cached for name, cached in self._writers.items() if cached.key != key}

    def _open_tiny_decoder(
        self,
        checkpoint: Checkpoint,
        stamps: dict[str, PartStamp],
        progress: ProgressCallback,
        fetch_preview_decoder: bool,
    ) -> tuple[WeightFile[TinyDecoder] | None, tuple[str, ...]]:
        part = checkpoint.tiny_autoencoder
        if self._settings.preview != "tiny" or part == checkpoint.autoencoder:
            return None, ()
        if not fetch_preview_decoder and not self._hub.is_on_disk(part):
            return None, ()
        if part not in self._unavailable or self._hub.is_on_disk(part):
            try:
                files = self._hub.find_or_download(part, progress)
                stamps["tiny"] = stamp_part("tiny", files)
                return self._get_header(part, stamps["tiny"], lambda: open_tiny_decoder(files.weights)), ()
            except WeightsError as error:
                self._unavailable[part] = str(error)
        return None, (f"Previews show rough colours only: {self._unavailable[part]}",)

    def _get_footprint(
        self,
        checkpoint: Checkpoint,
        flow: WeightFile[Transformer],
        autoencoder: WeightFile[Autoencoder],
        text: TextEncoderFile | WriterFile | None,
        tiny: WeightFile[TinyDecoder] | None,
        keys: dict[str, PartKey],
    ) -> ModelFootprint:
        """Returns `_measure_footprint`, cached until the files change."""
        part_keys = tuple(keys.values())
        cache_key = checkpoint.name, isinstance(text, WriterFile)
        with self._lock:
            cached_keys, footprint = self._footprints.get(cache_key, ((), None))
            if footprint is None or cached_keys != part_keys:
                footprint = self._measure_footprint(checkpoint, flow, autoencoder, text, tiny, keys)
                self._footprints[cache_key] = part_keys, footprint
            return footprint

    def _measure_footprint(
        self,
        checkpoint: Checkpoint,
        flow: WeightFile[Transformer],
        autoencoder: WeightFile[Autoencoder],
        text: TextEncoderFile | WriterFile | None,
        tiny: WeightFile[TinyDecoder] | None,
        keys: dict[str, PartKey],
    ) -> ModelFootprint:
        def weight_bytes(opened: WeightFile[Any] | TextEncoderFile | WriterFile, kind: str) -> PartWeightBytes:
            sizes = opened.tensor_bytes(dtype=keys[kind].dtype, storage=keys[kind].storage)
            return count_weight_bytes(sizes, opened.block_prefixes)

        text_activations = _no_activations
        if text is not None:
            quantized = _is_quantized(text, keys["text"])
            text_activations = lru_cache(partial(_text_activation_bytes, text, keys["text"].dtype, quantized))
        return ModelFootprint(
            label=checkpoint.label,
            flow=weight_bytes(flow, "flow"),
            transformer_params=flow.params,
            flow_dtype=keys["flow"].dtype,
            flow_quantized=_is_quantized(flow, keys["flow"]),
            autoencoder=weight_bytes(autoencoder, "autoencoder"),
            autoencoder_params=autoencoder.params,
            autoencoder_dtype=keys["autoencoder"].dtype,
            text=weight_bytes(text, "text") if text is not None else None,
            text_activations=text_activations,
            text_length=checkpoint.recipe.length,
            tiny=weight_bytes(tiny, "tiny") if tiny is not None else None,
            tiny_dtype=keys["tiny"].dtype if tiny is not None else torch.float32,
            decodes_previews=self._settings.preview != "off" and (tiny is not None or decodes_own_previews(checkpoint)),
            caches_reference_kv=checkpoint.caches_reference_kv,
        )


def is_safe_to_mmap(part: Part, settings: Settings) -> bool:
    """Returns whether the files of `part` may be memory-mapped because nothing modifies them in place.

    True for files in the hub cache and those that ship with the studio; users may overwrite their own files.
    """
    if part.path_variable is not None and part.path_variable in settings.path_overrides:
        return False
    return part.repo is not None or not Path(part.path).is_absolute()


def decodes_own_previews(checkpoint: Checkpoint) -> bool:
    """Returns whether `checkpoint` decodes previews with its full autoencoder."""
    return checkpoint.tiny_autoencoder == checkpoint.autoencoder


def _text_activation_bytes(
    text: TextEncoderFile | WriterFile, dtype: torch.dtype, quantized: bool, prompts: int
) -> int:
    """Returns the peak activation bytes of encoding `prompts` prompts, or of asking the model about a picture."""
    encoding = text.activation_bytes(dtype=dtype, prompts=prompts, quantized=quantized)
    if isinstance(text, WriterFile) and text.has_vision:
        answering = text.writing_bytes(
            dtype=dtype, tokens=MAX_CONVERSATION_TOKENS, pictures=[VISION_IMAGE_SIZE], quantized=quantized
        )
        return max(encoding, answering)
    return encoding


def _is_quantized(opened: WeightFile[Any] | TextEncoderFile | WriterFile, key: PartKey) -> bool:
    """Returns whether weights take fewer bytes in memory than in the compute dtype."""
    stored_bytes = sum(opened.tensor_bytes(dtype=key.dtype, storage=key.storage).values())
    return stored_bytes < sum(opened.tensor_bytes(dtype=key.dtype).values())


def _no_activations(prompts: int) -> int:
    return 0


def stamp_part(kind: str, files: PartFiles) -> PartStamp:
    """Returns the stamp of all files that are read for a part of that kind. It changes if one of them changes.

    Raises `WeightsError` for files that cannot be accessed.
    """
    folders = [files.weights]
    if kind in PART_SUBFOLDERS:
        folders.append(files.weights / PART_SUBFOLDERS[kind])
    if files.tokenizer is not None:
        folders.append(files.tokenizer)
    try:
        if not files.weights.is_dir():
            stat = files.weights.stat()
            return ((str(files.weights), stat.st_ino, stat.st_size, stat.st_mtime_ns),)
        return tuple(
            sorted(stamp for folder in dict.fromkeys(folders) if folder.is_dir() for stamp in _iterate_stamps(folder))
        )
    except OSError as error:
        raise WeightsError(
            f"{files.weights} cannot be read ({error.strerror or error}): put it back, or download it again."
        ) from error


def _iterate_stamps(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Yields the stamps of the files directly in `folder`. Subfolders are skipped, since they may contain anything."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(STAMPED_SUFFIXES):
                continue
            try:
                stat = entry.stat()
            except OSError:  # deleted, or a dangling link: opening the part reports it if needed
                continue
            yield entry.path, stat.st_ino, stat.st_size, stat.st_mtime_ns


def check_parts_match(
    checkpoint: Checkpoint,
    names: dict[str, str],
    transformer: TransformerParams,
    autoencoder: AutoencoderParams,
    text_width: int,
) -> None:
    """Raises `WeightsError` if the parts do not match. names: the file or folder name of each kind of part."""
    flow, label = names["flow"], checkpoint.label
    own = f"{label}'s own file{_path_variable_hint(checkpoint.flow)}"
    if transformer.context_width != text_width:
        raise WeightsError(
            f"{flow} reads text of width {transformer.context_width}, but the text encoder of {label} in "
            f"{names['text']} gives {text_width}: one of them is another checkpoint's. Give {label} its own "
            f"transformer{_path_variable_hint(checkpoint.flow)} and text encoder{_path_variable_hint(checkpoint.text)}."
        )
    embeds = checkpoint.guidance_mode == "embedded"
    if transformer.guidance_embedding != embeds:
        raise WeightsError(
            f"{flow} {'has a' if transformer.guidance_embedding else 'lacks the'} guidance embedding, which {label} "
            f"{'has' if embeds else 'does not have'}: the file is another checkpoint's. Choose {own}."
        )
    if autoencoder.patch != SIZE_MULTIPLE or 4 * autoencoder.latent_channels != transformer.in_channels:
        raise WeightsError(
            f"{names['autoencoder']} makes latents of {4 * autoencoder.latent_channels} channels, one for "
            f"{autoencoder.patch} x {autoencoder.patch} pixels, but {flow} reads {transformer.in_channels} channels, "
            f"one for {SIZE_MULTIPLE} x {SIZE_MULTIPLE}. Choose {label}'s own "
            f"autoencoder{_path_variable_hint(checkpoint.autoencoder)}."
        )


def _path_variable_hint(part: Part) -> str:
    return f" ({part.path_variable})" if part.path_variable else ""
