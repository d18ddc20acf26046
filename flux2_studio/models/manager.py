"""Checkpoints ready to run: files opened, a plan made to fit the memory, parts brought in as a run's stages ask.

`open` reads nothing but headers and decides how the request will fit; the `Session` that it gives brings each part to
the device when its stage comes. Parts are shared by what they are, so a swap between two checkpoints moves only what
differs, and as much of both stays in memory as fits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from flux2_studio.checkpoints import GB, Checkpoint
from flux2_studio.engine import lora
from flux2_studio.engine.autoencoder import Autoencoder
from flux2_studio.engine.preview import AutoencoderPreview, LinearPreview, Previewer, TinyPreview
from flux2_studio.engine.text import Encoded, TextEncoder
from flux2_studio.engine.transformer import Transformer
from flux2_studio.errors import OutOfMemory
from flux2_studio.models import memory
from flux2_studio.models.choices import choose_device
from flux2_studio.models.hub import Hub, Progress
from flux2_studio.models.loras import Applied, Loras
from flux2_studio.models.opened import Key, Opened, Opener, draws_itself
from flux2_studio.models.plan import DECODING, DRAWING, PROMPT, REFERENCES, Plan, Stage, Workload, make_plan, spread
from flux2_studio.models.remembered import RememberingReferences, RememberingText
from flux2_studio.models.remote_text import RemoteText
from flux2_studio.models.residency import Residency, release
from flux2_studio.pictures import pixels_from_image
from flux2_studio.request import LoraChoice
from flux2_studio.settings import Settings

HOST = torch.device("cpu")
HOST_SHARE = 0.5  # of main memory, for weights that have left the device
LEANER = 0.75  # of what a plan was to take that turned out to be too much
_LABELS = {"text": "text encoder", "flow": "transformer", "autoencoder": "autoencoder", "tiny": "preview decoder"}


class ModelManager:
    """Opens checkpoints. One run at a time: sessions are not made for concurrent use; `outlook` may be asked any time.

    host_budget: bytes of main memory for weights that have left the device. streaming: whether blocks may wait there;
    both by default only where the device has a memory of its own.
    """

    def __init__(
        self, settings: Settings, hub: Hub, *, host_budget: int | None = None, streaming: bool | None = None
    ) -> None:
        self._settings = settings
        self._hub = hub
        self.device = choose_device(settings.device)
        apart = self.device.type == "cuda"
        if host_budget is None:
            host_budget = int(HOST_SHARE * memory.whole_memory(HOST)) if apart else 0
        self._streaming = apart if streaming is None else streaming
        self.loras = Loras(settings)
        self._opener = Opener(settings, hub, self.device)
        self._residency: Residency[Key] = Residency(self.device, host_budget, leaving=_take_loras_off)
        self._too_much: dict[tuple[str, Workload], int] = {}  # peaks of plans that ran out of memory all the same
        self._contexts = RememberingText()
        self._latents = RememberingReferences()

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
    ) -> Session:
        """`checkpoint` for a request of `workload`, from disk or the hub. `progress` may raise to give up.

        after: the plan that ran out of memory, to be leaner than. Raises `WeightsError` for files that are missing,
        damaged or not of this checkpoint, and LoRAs that are not; `OutOfMemory` where no plan fits.
        """
        opened = self._opener.open(checkpoint, progress)
        self.loras.check(loras, checkpoint, opened.flow.params)
        return self._session(opened, self._plan(opened, workload, loras, after), loras)

    def outlook(self, checkpoint: Checkpoint, workload: Workload, loras: Sequence[LoraChoice] = ()) -> Plan:
        """The plan for a request, of a checkpoint that is on disk. Raises what `open` does."""
        return self._plan(self._opener.open(checkpoint, _silent, fetch=False), workload, loras, None)

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
        """Give memory that no weight occupies back to the device."""
        release(self.device)

    def release_all(self) -> None:
        """Forget all weights."""
        self._residency.clear()

    def _plan(self, opened: Opened, workload: Workload, loras: Sequence[LoraChoice], after: Plan | None) -> Plan:
        needs = replace(opened.needs, loras=self.loras.size(loras, opened.needs.flow_dtype.itemsize))
        host = memory.free_host_memory() + self._residency.host_bytes if self.device.type == "cuda" else None
        asked = opened.checkpoint.name, workload
        if after is not None:
            self._too_much[asked] = after.peak

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

    def _session(self, opened: Opened, plan: Plan, loras: Sequence[LoraChoice]) -> Session:
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
            preview=self._settings.preview,
            loras=self.loras,
            chosen=tuple(loras),
            remote=remote,
            residency=self._residency,
            contexts=self._contexts,
            latents=self._latents,
        )


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What a picture is drawn with, on the device. `applied`: the LoRAs on the transformer. `previewer` is None where
    previews are off."""

    transformer: Transformer
    previewer: Previewer | None
    applied: tuple[Applied, ...]


class Session:
    """A checkpoint under a plan. Each method brings what it needs to the device, telling `progress`, which may raise
    to give up. Build it with `ModelManager.open`."""

    def __init__(
        self,
        *,
        opened: Opened,
        plan: Plan,
        preview: str,
        loras: Loras,
        chosen: Sequence[LoraChoice],
        remote: RemoteText | None,
        residency: Residency[Key],
        contexts: RememberingText,
        latents: RememberingReferences,
    ) -> None:
        self.checkpoint = opened.checkpoint
        self.plan = plan
        self.notes = opened.notes
        self._opened = opened
        self._preview = preview
        self._loras = loras
        self._chosen = chosen
        self._remote = remote
        self._residency = residency
        self._contexts = contexts
        self._latents = latents

    def encode(self, prompts: Sequence[str], progress: Progress) -> Encoded:
        """The contexts of `prompts`; only those that are not remembered are read."""

        def read(missing: Sequence[str]) -> Encoded:
            if self._remote is not None:
                progress("Sending the prompt to the text encoder", None)
                return self._remote.encode(missing, progress)
            text: TextEncoder = self._bring(PROMPT, progress)["text"]
            progress("Reading the prompt", None)
            return text.encode(missing)

        return self._contexts.encode(self._opened.keys.get("text", self._remote), prompts, read)

    def encode_reference(self, image: Image.Image, progress: Progress) -> Tensor:
        """The latent [1, 128, h, w] of `image`, whose sides are multiples of 16, unless it is remembered."""

        def read(picture: Image.Image) -> Tensor:
            autoencoder: Autoencoder = self._bring(REFERENCES, progress)["autoencoder"]
            stage = self.plan.stage(REFERENCES)
            return autoencoder.encode(pixels_from_image(picture), stage.rows, HOST if stage.store else None)

        return self._latents.encode(self._opened.keys["autoencoder"], image, read)

    def draw(self, progress: Progress) -> Drawn:
        """Transformer and previews' decoder, and the LoRAs that the request chose on the former."""
        parts = self._bring(DRAWING, progress)
        transformer: Transformer = parts["flow"]
        applied = self._loras.put_on(transformer, self._chosen)
        return Drawn(transformer=transformer, previewer=self._previewer(parts), applied=tuple(applied))

    def decode(self, latent: Tensor, progress: Progress) -> Tensor:
        """Pixels [1, 3, H, W] of a latent [1, 128, h, w]."""
        autoencoder: Autoencoder = self._bring(DECODING, progress)["autoencoder"]
        progress("Decoding", None)
        stage = self.plan.stage(DECODING)
        return autoencoder.decode(latent, stage.rows, HOST if stage.store else None)

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
        there = sum(self._residency.on_device(key) for key in together)
        self._residency.make_room(stage.peak - there, self.plan.limit, keep=together)
        found = {}
        for kind in stage.parts:
            key, words = self._opened.keys[kind], f"Loading {self.checkpoint.label}: {_LABELS[kind]}"
            if not self._residency.on_device(key):
                progress(words, None)
            found[kind] = self._residency.bring(
                key,
                partial(self._opened.load, kind, told=partial(progress, words)),
                _module_of,
                blocks=_blocks(stage) if kind == stage.parts[0] else None,
            )
        return found


def _module_of(model: Any) -> nn.Module:
    module: nn.Module = model.tower if isinstance(model, TextEncoder) else model
    return module


def _blocks(stage: Stage) -> Callable[[Any], list[nn.Module]] | None:
    """Which blocks of the stage's first part are streamed; None for none."""
    if not stage.streamed:
        return None

    def chosen(model: Any) -> list[nn.Module]:
        is_text = isinstance(model, TextEncoder)
        blocks = list(model.tower.layers) if is_text else [*model.double_blocks, *model.single_blocks]
        return [blocks[i] for i in spread(stage.streamed, len(blocks))]

    return chosen


def _take_loras_off(model: Any) -> None:
    if isinstance(model, Transformer):
        lora.apply(model, [])


def _silent(text: str, fraction: float | None) -> None:
    pass
