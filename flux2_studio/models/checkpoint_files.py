"""A checkpoint's files, opened: headers checked, sizes known, nothing read yet.

Headers are opened once and again only where a file has changed, so that a plan for every request costs no reading.
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
from flux2_studio.engine.text.encoder import TEXT_FOLDER, CheckedText, open_text_encoder
from flux2_studio.engine.text.writer import CheckedWriter, Writer, open_writer
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.tiny_autoencoder import TinyDecoder
from flux2_studio.engine.weights.loading import (
    AUTOENCODER_FOLDER,
    TRANSFORMER_FOLDER,
    Checked,
    Storage,
    open_autoencoder,
    open_tiny_decoder,
    open_transformer,
)
from flux2_studio.errors import WeightsError
from flux2_studio.models.hub.part_files import PartFiles
from flux2_studio.models.hub.repositories import Hub, Progress
from flux2_studio.models.memory.choices import choose_dtype, choose_storage
from flux2_studio.models.memory.plan import Needs, Weights, weights_of
from flux2_studio.request import MULTIPLE
from flux2_studio.settings import Settings

Stamp = tuple[tuple[str, int, int, int], ...]  # path, inode, size and time of change of each file
# Where in the folder that is given for a part its files may be; else they are in that folder itself.
SUBFOLDERS = {"flow": TRANSFORMER_FOLDER, "autoencoder": AUTOENCODER_FOLDER, "text": TEXT_FOLDER}
# What is read of a folder, by the ends of names. Whatever else lies there is nothing to us.
SUFFIXES = (".safetensors", ".json", ".model", ".jinja", "merges.txt")
# Tokens of one conversation with a language model, the answer included: system message and chat template (under 700),
# a prompt of some 2,000 words, which is far more than the 512 tokens that are read of it to draw, and a long answer.
TOKENS = 4096
ASKED_ABOUT = (768, 768)  # pixels, at most, of a picture that a language model is asked a question about


@dataclass(frozen=True)
class Key:
    """What one part in memory is: whoever asks for the same gets the same.

    recipe: of a text encoder. whole: whether that is the whole language model, which can write as well.
    """

    part: Part
    dtype: torch.dtype
    storage: Storage
    stamp: Stamp
    recipe: TextRecipe | None = None
    whole: bool = False

    @property
    def reading(self) -> Key:
        """What a prompt's context depends on: the text encoder and the whole model of the same weights give the same
        one, to the bit."""
        return replace(self, whole=False)

    @property
    def twin(self) -> Key | None:
        """The other of these two; None for what is no text encoder."""
        return None if self.recipe is None else replace(self, whole=not self.whole)


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint whose files fit together. `text` is None where another machine encodes, and the whole language model
    where that is to be loaded in its place; `tiny` is None where the autoencoder draws previews itself or none are
    drawn by a decoder."""

    checkpoint: Checkpoint
    flow: Checked[Transformer]
    autoencoder: Checked[Autoencoder]
    text: CheckedText | CheckedWriter | None
    tiny: Checked[TinyDecoder] | None
    keys: dict[str, Key]  # by kind of part: text, flow, autoencoder, tiny
    needs: Needs
    notes: tuple[str, ...]
    mapped: frozenset[str]  # kinds of the parts whose files nobody writes over
    forget: Callable[[Key], None]

    def load(self, kind: str, device: torch.device, told: Callable[[float], None] | None = None) -> Any:
        """Read the part of that kind onto `device`. told: called with the share that has been read, and may raise to
        give up. Raises what `weights.Checked.load` does; a file that is to blame is opened anew the next time."""
        parts: dict[str, Any] = {
            "text": self.text, "flow": self.flow, "autoencoder": self.autoencoder, "tiny": self.tiny
        }  # fmt: skip
        key = self.keys[kind]
        try:
            return parts[kind].load(
                device=device, dtype=key.dtype, storage=key.storage, mapped=kind in self.mapped, told=told
            )
        except WeightsError:
            self.forget(key)
            raise


@dataclass(frozen=True, kw_only=True)
class OpenedWriter:
    """A language model whose files fit. beside: bytes of its weights that the text encoder made of them does not load.
    writing: bytes that it takes to write so many tokens beside pictures of (height, width), see
    `CheckedWriter.writing`."""

    model: LocalWriter
    checked: CheckedWriter
    key: Key
    weights: Weights
    beside: int
    writing: Callable[[int, tuple[tuple[int, int], ...]], int]
    mapped: bool
    forget: Callable[[Key], None]

    def load(self, device: torch.device, told: Callable[[float], None] | None = None) -> Writer:
        """Read it onto `device`; see `Opened.load`."""
        key = self.key
        try:
            return self.checked.load(device=device, dtype=key.dtype, storage=key.storage, mapped=self.mapped, told=told)
        except WeightsError:
            self.forget(key)
            raise


class Opener:
    """Opens checkpoints and language models for a device. May be asked from several threads."""

    def __init__(self, settings: Settings, hub: Hub, device: torch.device) -> None:
        self._settings = settings
        self._hub = hub
        self._device = device
        self._lock = threading.Lock()
        self._open: dict[tuple[Part, TextRecipe | None, bool], tuple[Stamp, Any]] = {}
        # By checkpoint, and whether its text encoder is the whole language model, as its files were last.
        self._needed: dict[tuple[str, bool], tuple[tuple[Key, ...], Needs]] = {}
        self._writers: dict[str, OpenedWriter] = {}  # by name, as their files were last
        self._not_to_be_had: dict[Part, str] = {}  # tiny autoencoders, and why: not asked for again at every run

    def parts(self, checkpoint: Checkpoint) -> tuple[Part, ...]:
        """The parts of `checkpoint` that must be on this machine."""
        remote = self._settings.reads_remotely(checkpoint)
        return tuple(part for part in checkpoint.parts if not (remote and part.kind == "text"))

    def open(self, checkpoint: Checkpoint, progress: Progress, *, fetch: bool = True) -> Opened:
        """`checkpoint`'s files, downloaded if need be and checked. `progress` may raise to give up.

        fetch: whether a decoder for previews that is not here is worth a download, too.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint.
        """
        # What may be refused comes first: the gate is met before the gigabytes.
        parts_by_gate = sorted(self.parts(checkpoint), key=lambda part: not part.gated)
        files: dict[str, PartFiles] = {part.kind: self._hub.locate(part, progress) for part in parts_by_gate}
        stamps = {kind: stamp_of(kind, found) for kind, found in files.items()}
        if not self._known() >= {(part, stamps[part.kind]) for part in self.parts(checkpoint)}:
            progress(f"Checking the files of {checkpoint.label}", None)
        flow = self._header(checkpoint.flow, stamps["flow"], lambda: open_transformer(files["flow"].weights))
        autoencoder = self._header(
            checkpoint.autoencoder, stamps["autoencoder"], lambda: open_autoencoder(files["autoencoder"].weights)
        )
        text: CheckedText | None = None
        if at := files.get("text"):
            folder = at
            text = self._header(
                checkpoint.text,
                stamps["text"],
                lambda: open_text_encoder(folder.weights, folder.tokenizer or folder.weights, checkpoint.recipe),
                checkpoint.recipe,
            )
        check_fit(
            checkpoint,
            {kind: found.weights.name for kind, found in files.items()},
            flow.params,
            autoencoder.params,
            text.width if text else flow.params.context_width,
        )
        tiny, notes = self._tiny(checkpoint, stamps, progress, fetch)
        parts = {"flow": checkpoint.flow, "autoencoder": checkpoint.autoencoder}
        if text is not None:
            parts["text"] = checkpoint.text
        if tiny is not None:
            parts["tiny"] = checkpoint.tiny_autoencoder
        keys = {
            kind: Key(
                part,
                choose_dtype(self._settings.dtype, self._device, checkpoint, part),
                choose_storage(self._settings.quantize, self._settings.dtype, self._device, part),
                stamps[kind],
                checkpoint.recipe if kind == "text" else None,
            )
            for kind, part in parts.items()
        }
        return Opened(
            checkpoint=checkpoint,
            flow=flow,
            autoencoder=autoencoder,
            text=text,
            tiny=tiny,
            keys=keys,
            needs=self._needs_of(checkpoint, flow, autoencoder, text, tiny, keys),
            notes=notes,
            mapped=frozenset(kind for kind, part in parts.items() if only_ever_replaced(part, self._settings)),
            forget=self._forget,
        )

    def writer(self, model: LocalWriter, progress: Progress) -> OpenedWriter:
        """The files of `model`, downloaded if need be and checked. `progress` may raise to give up.

        Raises `WeightsError` for files that are missing, damaged or no language model that can write.
        """
        part = model.part
        files = self._hub.locate(part, progress)
        stamp = stamp_of("text", files)
        key = Key(
            part,
            choose_dtype(self._settings.dtype, self._device, None, part),
            choose_storage(self._settings.quantize, self._settings.dtype, self._device, part),
            stamp,
            model.recipe,
            whole=True,
        )
        with self._lock:
            known = self._writers.get(model.name)
        if known is not None and (known.key, known.model) == (key, model):
            return known
        progress(f"Checking the files of {model.label}", None)
        checked: CheckedWriter = self._header(
            part,
            stamp,
            lambda: open_writer(files.weights, files.tokenizer or files.weights, model.recipe),
            model.recipe,
            whole=True,
        )
        opened = self._opened_writer(model, checked, key)
        with self._lock:
            self._writers[model.name] = opened
        return opened

    def whole(self, opened: Opened, model: LocalWriter, progress: Progress) -> Opened:
        """`opened` with all of its text encoder's language model, which is `model`, in the place of the encoder.

        Raises what `writer` does.
        """
        writer = self.writer(model, progress)
        keys = {**opened.keys, "text": writer.key}
        return replace(
            opened,
            text=writer.checked,
            keys=keys,
            needs=self._needs_of(opened.checkpoint, opened.flow, opened.autoencoder, writer.checked, opened.tiny, keys),
        )

    def _opened_writer(self, model: LocalWriter, checked: CheckedWriter, key: Key) -> OpenedWriter:
        dtype, quantized = key.dtype, _small(checked, key)
        sizes = checked.sizes(dtype=dtype, storage=key.storage)

        @lru_cache
        def writing(tokens: int, pictures: tuple[tuple[int, int], ...]) -> int:
            return checked.writing(dtype=dtype, tokens=tokens, pictures=pictures, quantized=quantized)

        return OpenedWriter(
            model=model,
            checked=checked,
            key=key,
            weights=weights_of(sizes, checked.blocks),
            beside=sum(sizes.values()) - sum(checked.text.sizes(dtype=dtype, storage=key.storage).values()),
            writing=writing,
            mapped=only_ever_replaced(model.part, self._settings),
            forget=self._forget,
        )

    def _known(self) -> set[tuple[Part, Stamp]]:
        with self._lock:
            return {(part, stamp) for (part, _, whole), (stamp, _) in self._open.items() if not whole}

    def _header(
        self,
        part: Part,
        stamp: Stamp,
        read: Callable[[], Any],
        recipe: TextRecipe | None = None,
        *,
        whole: bool = False,
    ) -> Any:
        with self._lock:
            of, opened = self._open.get((part, recipe, whole), (None, None))
            if of != stamp:
                opened = read()
                self._open[part, recipe, whole] = stamp, opened
            return opened

    def _forget(self, key: Key) -> None:
        """The header of what `key` stands for may be no longer true."""
        with self._lock:
            self._open.pop((key.part, key.recipe, key.whole), None)
            self._needed = {name: found for name, found in self._needed.items() if key not in found[0]}
            self._writers = {name: found for name, found in self._writers.items() if found.key != key}

    def _tiny(
        self, checkpoint: Checkpoint, stamps: dict[str, Stamp], progress: Progress, fetch: bool
    ) -> tuple[Checked[TinyDecoder] | None, tuple[str, ...]]:
        part = checkpoint.tiny_autoencoder
        if self._settings.preview != "tiny" or part == checkpoint.autoencoder:
            return None, ()
        if not fetch and not self._hub.on_disk(part):
            return None, ()
        if part not in self._not_to_be_had or self._hub.on_disk(part):
            try:
                at = self._hub.locate(part, progress)
                stamps["tiny"] = stamp_of("tiny", at)
                return self._header(part, stamps["tiny"], lambda: open_tiny_decoder(at.weights)), ()
            except WeightsError as error:
                self._not_to_be_had[part] = str(error)
        return None, (f"Previews show rough colours only: {self._not_to_be_had[part]}",)

    def _needs_of(
        self,
        checkpoint: Checkpoint,
        flow: Checked[Transformer],
        autoencoder: Checked[Autoencoder],
        text: CheckedText | CheckedWriter | None,
        tiny: Checked[TinyDecoder] | None,
        keys: dict[str, Key],
    ) -> Needs:
        """As `_needs`, reckoned once for the same files."""
        whose = tuple(keys.values())
        name = checkpoint.name, isinstance(text, CheckedWriter)
        with self._lock:
            of, needs = self._needed.get(name, ((), None))
            if needs is None or of != whose:
                needs = self._needs(checkpoint, flow, autoencoder, text, tiny, keys)
                self._needed[name] = whose, needs
            return needs

    def _needs(
        self,
        checkpoint: Checkpoint,
        flow: Checked[Transformer],
        autoencoder: Checked[Autoencoder],
        text: CheckedText | CheckedWriter | None,
        tiny: Checked[TinyDecoder] | None,
        keys: dict[str, Key],
    ) -> Needs:
        def held(opened: Checked[Any] | CheckedText | CheckedWriter, kind: str) -> Weights:
            sizes = opened.sizes(dtype=keys[kind].dtype, storage=keys[kind].storage)
            return weights_of(sizes, opened.blocks)

        text_activations = _nothing
        if text is not None:
            quantized = _small(text, keys["text"])
            text_activations = lru_cache(partial(_reading, text, keys["text"].dtype, quantized))
        return Needs(
            label=checkpoint.label,
            flow=held(flow, "flow"),
            transformer=flow.params,
            flow_dtype=keys["flow"].dtype,
            flow_quantized=_small(flow, keys["flow"]),
            autoencoder=held(autoencoder, "autoencoder"),
            autoencoder_params=autoencoder.params,
            autoencoder_dtype=keys["autoencoder"].dtype,
            text=held(text, "text") if text is not None else None,
            text_activations=text_activations,
            text_length=checkpoint.recipe.length,
            tiny=held(tiny, "tiny") if tiny is not None else None,
            tiny_dtype=keys["tiny"].dtype if tiny is not None else torch.float32,
            previews=self._settings.preview != "off" and (tiny is not None or draws_itself(checkpoint)),
            reference_cache=checkpoint.reference_cache,
        )


def only_ever_replaced(part: Part, settings: Settings) -> bool:
    """Whether the files of `part` are never written to in place, so that they may be mapped: those in the hub's cache
    and those that ship with the studio. Of a user's own files nobody knows."""
    if part.override is not None and part.override in settings.overrides:
        return False
    return part.repo is not None or not Path(part.path).is_absolute()


def draws_itself(checkpoint: Checkpoint) -> bool:
    """Whether the autoencoder of `checkpoint` is small enough to draw its previews."""
    return checkpoint.tiny_autoencoder == checkpoint.autoencoder


def _reading(text: CheckedText | CheckedWriter, dtype: torch.dtype, quantized: bool, prompts: int) -> int:
    """Bytes alive at once, at most, while so many prompts are encoded, or the model is asked about a picture."""
    reading = text.activations(dtype=dtype, prompts=prompts, quantized=quantized)
    if isinstance(text, CheckedWriter) and text.sees:
        asking = text.writing(dtype=dtype, tokens=TOKENS, pictures=[ASKED_ABOUT], quantized=quantized)
        return max(reading, asking)
    return reading


def _small(opened: Checked[Any] | CheckedText | CheckedWriter, key: Key) -> bool:
    """Whether weights are held in fewer bits than they are computed in."""
    as_held = sum(opened.sizes(dtype=key.dtype, storage=key.storage).values())
    return as_held < sum(opened.sizes(dtype=key.dtype).values())


def _nothing(prompts: int) -> int:
    return 0


def stamp_of(kind: str, files: PartFiles) -> Stamp:
    """By which files that have changed are known, of all that are read for a part of that kind.

    Raises `WeightsError` for what cannot be looked at.
    """
    places = [files.weights]
    if kind in SUBFOLDERS:
        places.append(files.weights / SUBFOLDERS[kind])
    if files.tokenizer is not None:
        places.append(files.tokenizer)
    try:
        if not files.weights.is_dir():
            found = files.weights.stat()
            return ((str(files.weights), found.st_ino, found.st_size, found.st_mtime_ns),)
        return tuple(sorted(stamp for place in dict.fromkeys(places) if place.is_dir() for stamp in _stamps(place)))
    except OSError as error:
        raise WeightsError(
            f"{files.weights} cannot be read ({error.strerror or error}): put it back, or download it again."
        ) from error


def _stamps(folder: Path) -> Iterator[tuple[str, int, int, int]]:
    """Of the files in `folder` itself: never of all that is below it, which may be anything."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(SUFFIXES):
                continue
            try:
                found = entry.stat()
            except OSError:  # gone, or a link to nothing: whoever needs it says so
                continue
            yield entry.path, found.st_ino, found.st_size, found.st_mtime_ns


def check_fit(
    checkpoint: Checkpoint,
    names: dict[str, str],
    transformer: TransformerParams,
    autoencoder: AutoencoderParams,
    text_width: int,
) -> None:
    """Raise `WeightsError` if the parts do not belong together. names: the file or folder of each kind of part."""
    flow, label = names["flow"], checkpoint.label
    own = f"{label}'s own file{_named(checkpoint.flow)}"
    if transformer.context_width != text_width:
        raise WeightsError(
            f"{flow} reads text of width {transformer.context_width}, but the text encoder of {label} in "
            f"{names['text']} gives {text_width}: one of them is another checkpoint's. Give {label} its own "
            f"transformer{_named(checkpoint.flow)} and text encoder{_named(checkpoint.text)}."
        )
    embeds = checkpoint.guiding == "embedded"
    if transformer.guidance_embedding != embeds:
        raise WeightsError(
            f"{flow} {'has a' if transformer.guidance_embedding else 'lacks the'} guidance embedding, which {label} "
            f"{'has' if embeds else 'does not have'}: the file is another checkpoint's. Choose {own}."
        )
    if autoencoder.patch != MULTIPLE or 4 * autoencoder.latent_channels != transformer.in_channels:
        raise WeightsError(
            f"{names['autoencoder']} makes latents of {4 * autoencoder.latent_channels} channels, one for "
            f"{autoencoder.patch} x {autoencoder.patch} pixels, but {flow} reads {transformer.in_channels} channels, "
            f"one for {MULTIPLE} x {MULTIPLE}. Choose {label}'s own autoencoder{_named(checkpoint.autoencoder)}."
        )


def _named(part: Part) -> str:
    return f" ({part.override})" if part.override else ""
