"""Checkpoints ready to run: files opened, a plan made to fit the memory, parts brought in as a run's stages ask.

`open` reads nothing but headers and decides how the request will fit; the `Session` that it gives brings each part to
the device when its stage comes. Parts are shared by what they are, so a swap between two checkpoints moves only what
differs, and as much of both stays in memory as fits.
"""

from __future__ import annotations

import contextlib
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2_studio.checkpoints import GB, Checkpoint, LocalWriter
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora import adapters as lora
from flux2_studio.engine.runtime.compiling import Compiler, variants
from flux2_studio.engine.runtime.graphs import Record
from flux2_studio.engine.text.decoder import Tower
from flux2_studio.engine.text.encoder import Encoded, TextEncoder
from flux2_studio.engine.text.writer import CheckedWriter, Writer
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.vae.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.errors import OutOfMemory, StudioError, WeightsError
from flux2_studio.images.tensors import pixels_from_image
from flux2_studio.models.checkpoint_files import SUBFOLDERS, TOKENS, Key, Opened, Opener, draws_itself
from flux2_studio.models.compiled import CompiledBlocks
from flux2_studio.models.hub.fingerprint import Fingerprints
from flux2_studio.models.hub.repositories import Hub, Progress
from flux2_studio.models.loras import Applied, Loras
from flux2_studio.models.memory import available as memory
from flux2_studio.models.memory.choices import choose_device
from flux2_studio.models.memory.plan import (
    DECODING,
    DRAWING,
    PROMPT,
    REFERENCES,
    Plan,
    Workload,
    leaner_decoding,
    make_plan,
    spread,
)
from flux2_studio.models.memory.processors import keep_to_quota, quota
from flux2_studio.models.memory.residency import Residency, empty_cache, release
from flux2_studio.models.prompt_cache import RememberingReferences, RememberingText
from flux2_studio.models.remote_text import RemoteText
from flux2_studio.models.replayed import ReplayedRuns
from flux2_studio.models.writers import WriterOffer, Writing, make_place, offers, writer_of
from flux2_studio.request import LoraChoice
from flux2_studio.settings import Settings

HOST = torch.device("cpu")
RAN_OUT = "memory ran out"
HOST_SHARE = 0.5  # of main memory, for weights that have left the device
LEANER = 0.75  # of what a plan was to take that turned out to be too much
_LABELS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder", "tiny": "preview decoder"}


class ModelManager:
    """Opens checkpoints. One run at a time: sessions are not made for concurrent use; `outlook` may be asked any time.

    host_budget: bytes of main memory for weights that have left the device. streaming: whether blocks may wait there;
    both by default only where the device has a memory of its own. compiler: torch's by default.
    """

    def __init__(
        self,
        settings: Settings,
        hub: Hub,
        *,
        host_budget: int | None = None,
        streaming: bool | None = None,
        compiler: Compiler | None = None,
        record: Record | None = None,
    ) -> None:
        self._settings = settings
        self._hub = hub
        self.device = choose_device(settings.device)
        keep_to_quota(quota())
        apart = self.device.type == "cuda"
        if host_budget is None:
            host_budget = int(HOST_SHARE * memory.whole_memory(HOST)) if apart else 0
        self._streaming = apart if streaming is None else streaming
        self.loras = Loras(settings)
        self._opener = Opener(settings, hub, self.device)
        self._residency: Residency[Key] = Residency(self.device, host_budget, leaving=self._strip)
        self._too_much: dict[tuple[str, Workload], int] = {}  # peaks of plans that ran out of memory all the same
        self._contexts = RememberingText()
        self._latents = RememberingReferences()
        self.compiled = CompiledBlocks(settings.compile, self.device, compiler or Compiler(cache=settings.compiled))
        self.replayed = ReplayedRuns(settings.graphs, self.device, record)
        self._fingerprints = Fingerprints(settings.home / "hashes.json")

    def on_disk(self, checkpoint: Checkpoint) -> bool:
        """Whether `checkpoint` can be loaded without a download."""
        return all(self._hub.on_disk(part) for part in self._opener.parts(checkpoint))

    def open(
        self,
        checkpoint: Checkpoint,
        workload: Workload,
        progress: Progress,
        *,
        loras: Sequence[LoraChoice] = (),
        after: Plan | None = None,
        whole: bool = False,
    ) -> Session:
        """`checkpoint` for a request of `workload`, from disk or the hub. `progress` may raise to give up.

        after: the plan that ran out of memory, to be leaner than. whole: whether to load all of the text encoder's
        language model in place of the encoder where that sees pictures, so that it can be asked about them; where that
        cannot be, the session's notes say so. Without it, too, prompts are read with the whole model while it is on
        the device, having written, unless drawing would be slower for that. So `writer` goes before `open`.

        Raises `WeightsError` for files that are missing, damaged or not of this checkpoint, and LoRAs that are not;
        `OutOfMemory` where no plan fits.
        """
        opened = self._opener.open(checkpoint, progress)
        self.loras.check(loras, checkpoint, opened.flow.params)
        opened, plan = self._planned(opened, workload, loras, after, whole, progress)
        return self._session(opened, plan, workload, loras)

    def outlook(
        self, checkpoint: Checkpoint, workload: Workload, loras: Sequence[LoraChoice] = (), *, whole: bool = False
    ) -> Plan:
        """The plan for a request, of a checkpoint that is on disk. Arguments and errors as for `open`."""
        opened = self._opener.open(checkpoint, _silent, fetch=False)
        return self._planned(opened, workload, loras, None, whole, _silent)[1]

    def writer(
        self,
        model: LocalWriter,
        progress: Progress,
        pictures: Sequence[tuple[int, int]] = (),
        *,
        tokens: int = TOKENS,
    ) -> Writing:
        """`model` on the device, from disk or the hub, with room for what writing takes; other parts leave for it.

        pictures: (height, width) in pixels of each that it is to see, as it will be shown. tokens: of the whole
        conversation, the answer included. `progress` may raise to give up. The writer is the device's until another
        part needs its room: have it write before anything else is opened.

        Raises `WeightsError` for files that are missing, damaged or cannot write, `OutOfMemory` where nothing fits.
        """
        opened = self._opener.writer(model, progress)
        place = make_place(
            opened,
            self._budget(),
            self.device,
            tokens=tokens,
            pictures=pictures,
            host=self._host(),
            streaming=self._streaming,
        )
        key, words = opened.key, f"Loading {model.label}"
        _part_from_twin(self._residency, key)
        self._residency.make_room(place.peak - self._residency.on_device(key), place.limit, keep=[key])
        if not self._residency.on_device(key):
            progress(words, None)
        writer: Writer = self._residency.bring(
            key,
            partial(opened.load, told=partial(progress, words)),
            _module_of,
            blocks=_blocks(place.streamed),
        )
        return Writing(writer=writer, notes=place.notes(model.label))

    def writers(self, checkpoint: Checkpoint) -> tuple[WriterOffer, ...]:
        """The language models on this machine that may enrich prompts for `checkpoint`, its own first. Uses no network.

        There are none for the toys.
        """
        return offers(checkpoint, self._settings, self._hub, self._opener)

    def hash_of(self, checkpoint: Checkpoint) -> str | None:
        """The SHA-256 of the transformer's weights if it is known or read in a moment, see `hashing`; None otherwise,
        and where they are not on this machine. Uses no network. Raises `WeightsError` for files that cannot be read.
        """
        if not self._hub.on_disk(checkpoint.flow):
            return None
        files = self._hub.find(checkpoint.flow)
        return self._fingerprints.known(files.weights, SUBFOLDERS["flow"]) if files else None

    def hashing(self, checkpoint: Checkpoint, progress: Progress) -> str:
        """The SHA-256 of the transformer's weights; of a folder's, that of its files' lines "name hash", sorted. What
        is not known by now is read whole, once. `progress` may raise to give up. Raises `WeightsError`."""
        files = self._hub.locate(checkpoint.flow, progress)
        return self._fingerprints.read(files.weights, progress, SUBFOLDERS["flow"])

    def loaded(self, checkpoint: Checkpoint) -> bool:
        """Whether the transformer of `checkpoint`, which is on disk, is in memory. Raises `WeightsError`."""
        return self._residency.holds(self._opener.open(checkpoint, _silent, fetch=False).keys["flow"])

    @property
    def device_name(self) -> str:
        """The device as one tells it from others: how long something takes depends on it."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"{self.device.type} of {platform.machine()} with {torch.get_num_threads()} threads"

    @property
    def place(self) -> str:
        """What the memory belongs to, in words."""
        return "the card" if self.device.type == "cuda" else "this machine"

    @property
    def capacity(self) -> int:
        """Bytes of the device's memory that there are, or that the studio may take."""
        limit = self._settings.memory
        whole = memory.whole_memory(self.device)
        return whole if limit is None else min(whole, int(limit * GB))

    def release_scratch(self) -> None:
        """Give memory that no weight occupies back to the device, which ran out of it."""
        self.replayed.give_up(RAN_OUT)
        release(self.device)

    def release_all(self) -> None:
        """Forget all weights."""
        self.replayed.clear()
        self._residency.clear()

    def _planned(
        self,
        opened: Opened,
        workload: Workload,
        loras: Sequence[LoraChoice],
        after: Plan | None,
        whole: bool,
        progress: Progress,
    ) -> tuple[Opened, Plan]:
        """The plan, and what to read prompts with: the text encoder, or the whole language model that it is part of.

        The latter where it is asked for and fits. If it just is on the device, it is used as long as drawing is no
        slower for it: to load the encoder beside it would take longer than anything that its size costs the prompt.
        """
        model = writer_of(opened.checkpoint) if "text" in opened.keys else None
        there = model is not None and self._residency.on_device(replace(opened.keys["text"], whole=True)) > 0
        wanted = model is not None and model.sees and whole
        if model is None or not (there or wanted):
            return opened, self._plan(opened, workload, loras, after)
        try:
            entire = self._opener.whole(opened, model, progress)
            plan = self._plan(entire, workload, loras, after)
        except (OutOfMemory, WeightsError) as error:
            plain = self._plan(opened, workload, loras, after)  # which raises where that does not fit either
            return replace(opened, notes=(*opened.notes, _unasked(model, error))) if wanted else opened, plain
        if wanted:
            return entire, plan
        with contextlib.suppress(OutOfMemory):
            plain = self._plan(opened, workload, loras, after)
            if not plan.draws_like(plain):
                return opened, plain
        return entire, plan

    def _plan(self, opened: Opened, workload: Workload, loras: Sequence[LoraChoice], after: Plan | None) -> Plan:
        needs = replace(opened.needs, loras=self.loras.size(loras, opened.needs.flow_dtype.itemsize))
        host = self._host()
        asked = opened.checkpoint.name, workload
        if after is not None:
            self._too_much[asked] = after.peak
            self.replayed.give_up(RAN_OUT)

        def plan(within: int | None) -> Plan:
            budget = self._budget()
            return make_plan(needs, workload, budget, self.device, within=within, host=host, streaming=self._streaming)

        too_much = self._too_much.get(asked)
        if too_much is None:
            return plan(None)
        with contextlib.suppress(OutOfMemory):
            return plan(int(LEANER * too_much))
        return plan(too_much - 1)  # then anything leaner will do

    def _budget(self) -> int:
        """Bytes of the device's memory that weights and activations may take, all in all."""
        held = memory.returnable(self.device, self._residency.device_bytes)
        return min(memory.free_memory(self.device) + held, self.capacity)

    def _host(self) -> int | None:
        """Bytes of main memory for parts whose blocks are streamed; None where the device has no memory of its own."""
        return memory.free_host_memory() + self._residency.host_bytes if self.device.type == "cuda" else None

    def _session(self, opened: Opened, plan: Plan, workload: Workload, loras: Sequence[LoraChoice]) -> Session:
        remote = None
        if opened.text is None:
            assert self._settings.text_encoder_url is not None
            remote = RemoteText(
                self._settings.text_encoder_url,
                self._settings.text_encoder_token,
                opened.checkpoint.recipe,
                opened.flow.params.context_width,
                opened.checkpoint.label,
            )
        return Session(
            opened=opened,
            plan=plan,
            workload=workload,
            preview=self._settings.preview,
            loras=self.loras,
            chosen=tuple(loras),
            remote=remote,
            residency=self._residency,
            contexts=self._contexts,
            latents=self._latents,
            compiled=self.compiled,
            replayed=self.replayed,
            streaming=self._streaming,
        )

    def _strip(self, model: Any) -> None:
        """Take off a part that leaves the device what is not its own."""
        self.replayed.forget(model)
        if isinstance(model, Transformer):
            lora.apply(model, [])


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a picture is drawn with, on the device. `applied`: the LoRAs on the transformer. `previewer` is None where
    previews are off. `compiled`: whether the blocks run compiled. `notes`: what the user should know of that."""

    transformer: Transformer
    previewer: Previewer | None
    applied: tuple[Applied, ...]
    compiled: bool
    notes: tuple[str, ...]


class Session:
    """A checkpoint under a plan. Each method brings what it needs to the device, telling `progress`, which may raise
    to give up. Build it with `ModelManager.open`.

    loading: seconds that went into reading weights from their files so far. remembered: whether a prompt or a reference
    needed no reading, for it was known.
    """

    def __init__(
        self,
        *,
        opened: Opened,
        plan: Plan,
        workload: Workload,
        preview: str,
        loras: Loras,
        chosen: Sequence[LoraChoice],
        remote: RemoteText | None,
        residency: Residency[Key],
        contexts: RememberingText,
        latents: RememberingReferences,
        compiled: CompiledBlocks,
        replayed: ReplayedRuns,
        streaming: bool,
    ) -> None:
        self.checkpoint = opened.checkpoint
        self.plan = plan
        self.notes = opened.notes
        self.loading = 0.0
        self.remembered = False
        self._opened = opened
        self._preview = preview
        self._loras = loras
        self._chosen = chosen
        self._remote = remote
        self._residency = residency
        self._contexts = contexts
        self._latents = latents
        self._workload = workload
        self._compiled = compiled
        self._replayed = replayed
        self._streaming = streaming

    def encode(self, prompts: Sequence[str], progress: Progress) -> Encoded:
        """The contexts of `prompts`; only those that are not remembered are read."""
        known = True

        def read(missing: Sequence[str]) -> Encoded:
            nonlocal known
            known = False
            if self._remote is not None:
                progress("Sending the prompt to the text encoder", None)
                return self._remote.encode(missing, progress)
            text: TextEncoder | Writer = self._bring(PROMPT, progress)["text"]
            progress("Reading the prompt", None)
            encoder = text.encoder if isinstance(text, Writer) else text
            self._replay(encoder.tower)
            return encoder.encode(missing)

        key = self._opened.keys.get("text")
        encoded = self._contexts.encode(key.reading if key else self._remote, prompts, read)
        self.remembered |= known
        return encoded

    def asking(self, progress: Progress | None = None) -> Writer | None:
        """The language model that the prompts are read with, to be asked about what it sees, with room for that; None
        where it is not whole or has no eyes, or is not on the device.

        progress: brings it to the device as the prompt's stage would, which is worth it before that stage; without,
        nothing is loaded. Nothing else must be computing meanwhile.
        """
        key = self._opened.keys.get("text")
        if key is None or not key.whole or not isinstance(text := self._opened.text, CheckedWriter) or not text.sees:
            return None
        if progress is not None:
            brought: Writer = self._bring(PROMPT, progress)["text"]
            return brought
        writer: Writer | None = self._residency.held(key)
        if writer is not None:
            stage = self.plan.stage(PROMPT)
            self._residency.make_room(stage.activations, self.plan.limit, keep=list(self._opened.keys.values()))
        return writer

    def encode_reference(self, image: Image.Image, progress: Progress) -> Tensor:
        """The latent [1, 128, h, w] of `image`, whose sides are multiples of 16, unless it is remembered."""
        known = True

        def read(picture: Image.Image) -> Tensor:
            nonlocal known
            known = False
            autoencoder: Autoencoder = self._bring(REFERENCES, progress)["autoencoder"]
            stage = self.plan.stage(REFERENCES)
            return autoencoder.encode(pixels_from_image(picture), stage.rows, HOST if stage.store else None)

        latent = self._latents.encode(self._opened.keys["autoencoder"], image, read)
        self.remembered |= known
        return latent

    def draw(self, progress: Progress, pictures: int = 1) -> Drawn:
        """Transformer and previews' decoder, and the LoRAs that the request chose on the former. pictures: how many are
        drawn together."""
        parts = self._bring(DRAWING, progress)
        transformer: Transformer = parts["flow"]
        applied = self._loras.put_on(transformer, self._chosen)
        cached = self.checkpoint.reference_cache and bool(self._workload.references)
        needed = variants(pictures * (2 if self._workload.guided else 1), reference_cache=cached)
        compiled = self._compiled.use(transformer, self.checkpoint.flow.size, needed)
        self._replay(transformer)
        return Drawn(
            transformer=transformer,
            previewer=self._previewer(parts),
            applied=tuple(applied),
            compiled=compiled,
            notes=(*self._compiled.notes(), *self._replayed.notes()),
        )

    def _replay(self, model: Transformer | Tower) -> None:
        self._replayed.use(model, resident=self.plan.resident, compiling=self._compiled.busy)

    def decode(self, latent: Tensor, progress: Progress) -> Tensor:
        """Pixels [1, 3, H, W] of a latent [1, 128, h, w]."""
        autoencoder: Autoencoder = self._bring(DECODING, progress)["autoencoder"]
        progress("Decoding", None)
        stage = self.plan.stage(DECODING)
        return autoencoder.decode(latent, stage.rows, HOST if stage.store else None)

    def decode_leaner(self) -> bool:
        """Have `decode` take less memory from now on, after it ran out. False where it cannot."""
        leaner = leaner_decoding(self.plan, self._workload.height, streaming=self._streaming)
        if leaner is None:
            return False
        self.plan = leaner
        self._replayed.give_up(RAN_OUT)
        release(self._residency.device)
        return True

    def preload(self, progress: Progress) -> None:
        """Bring in what fits at once: all, or what the first stage needs."""
        for stage in self.plan.stages if self.plan.resident else self.plan.stages[:1]:
            if stage.name != REFERENCES:
                self._bring(stage.name, progress)

    def _previewer(self, parts: dict[str, Any]) -> Previewer | None:
        if self._preview == "off":
            return None
        if draws_itself(self.checkpoint):
            return AutoencoderPreview(parts["autoencoder"])
        return TinyPreview(parts["tiny"]) if "tiny" in parts else LinearPreview()

    def _bring(self, name: str, progress: Progress) -> dict[str, Any]:
        """The parts of a stage on the device, by kind, and room beside them for what it computes."""
        stage = self.plan.stage(name)
        together = [self._opened.keys[kind] for kind in stage.together]
        for kind in stage.parts:
            _part_from_twin(self._residency, self._opened.keys[kind])
        there = sum(self._residency.on_device(key) for key in together)
        self._residency.make_room(stage.peak - there, self.plan.limit, keep=together)
        found = {}
        for kind in stage.parts:
            key, words = self._opened.keys[kind], f"Loading {self.checkpoint.label}: {_LABELS[kind]}"
            if not self._residency.on_device(key):
                progress(words, None)
            found[kind] = self._residency.bring(
                key,
                partial(self._load, kind, told=partial(progress, words)),
                _module_of,
                blocks=_blocks(stage.streamed) if kind == stage.parts[0] else None,
            )
        return found

    def _load(self, kind: str, device: torch.device, told: Callable[[float], None]) -> Any:
        began = time.monotonic()
        try:
            return self._opened.load(kind, device, told)
        finally:
            self.loading += time.monotonic() - began


def _part_from_twin(residency: Residency[Key], key: Key) -> None:
    """Before the part under `key` comes to the device: if it is a text encoder and the whole language model with the
    same weights is there, or the other way round, the latter leaves. No weights are held twice: the whole model
    replaces the encoder wherever that is; it waits in main memory itself, where there is room, to write again."""
    if (twin := key.twin) is not None:
        if not key.whole:
            residency.leave(twin)
        elif residency.drop(twin):
            empty_cache(residency.device)


def _module_of(model: Any) -> nn.Module:
    if isinstance(model, TextEncoder):
        return model.tower
    module: nn.Module = model.model if isinstance(model, Writer) else model
    return module


def _blocks(streamed: int) -> Callable[[Any], list[nn.Module]] | None:
    """Which blocks of a part are streamed, so many of them; None for none."""
    if not streamed:
        return None

    def chosen(model: Any) -> list[nn.Module]:
        if isinstance(model, TextEncoder | Writer):
            tower: Any = model.tower if isinstance(model, TextEncoder) else model.model.decoder
            blocks = list(tower.layers)
        else:
            blocks = [*model.double_blocks, *model.single_blocks]
        return [blocks[i] for i in spread(streamed, len(blocks))]

    return chosen


def _unasked(model: LocalWriter, error: StudioError) -> str:
    return (
        f"{model.label} is not loaded as a whole, so it is not asked about protected characters, logos and public "
        f"figures: {error}"
    )


def _silent(text: str, fraction: float | None) -> None:
    pass
