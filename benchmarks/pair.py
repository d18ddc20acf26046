"""Two synthetic checkpoints that take turns in the studio's own model manager: their sizes, and what a benchmark asks
of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import sizes
from benchmarks.measuring import wait
from benchmarks.synthetic import FlowSize, Written, disk_bytes, write_autoencoder, write_checkpoint
from flux2_studio.checkpoints import GB, KLEIN_4B, KLEIN_9B, Checkpoint
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import AutoencoderParams
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import (
    ALLOCATOR_OVERHEAD,
    CUDA_WORKSPACE_BYTES,
    DENOISING_STAGE,
    MemoryPlan,
    RequestShape,
)
from flux2_studio.models.memory.residency import collect_and_empty_cache
from flux2_studio.settings import QuantizeMode, Settings

PAGE = 4096  # bytes


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is measured: two checkpoints and their autoencoder, pictures of `side` pixels.

    budget: gigabytes for the runs in little memory; None: too little for all blocks. rounds, runs: how
    often each swap and each picture is timed, after so many warm-ups. checkpoints: whose place the two take.
    """

    first: FlowSize
    second: FlowSize
    autoencoder: AutoencoderParams
    side: int
    budget: float | None
    rounds: int
    runs: int
    warmups: int
    checkpoints: tuple[Checkpoint, Checkpoint] = (KLEIN_4B, KLEIN_9B)


SIZES = {
    "small": Size(
        first=sizes.SMALL,
        second=sizes.SMALL_WIDE,
        autoencoder=sizes.SMALL_AUTOENCODER,
        side=256,
        budget=None,
        rounds=10,
        runs=4,
        warmups=1,
    ),
    "klein": Size(
        first=sizes.KLEIN_4B,
        second=sizes.KLEIN_9B,
        autoencoder=sizes.AUTOENCODER,
        side=1024,
        budget=8.0,
        rounds=20,
        runs=20,
        warmups=3,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Two written checkpoints, and how managers for them are made."""

    pair: tuple[Written, Written]
    autoencoder: Path
    settings: Settings
    device: torch.device
    workload: RequestShape

    def manager(self, *, memory: float | None = None, quantize: QuantizeMode = "off", **fields: Any) -> ModelManager:
        """memory: gigabytes of the device. fields: further ones of `ModelManager`."""
        settings = replace(self.settings, memory_limit_gb=memory, quantize=quantize)
        return ModelManager(settings, Hub(settings), **fields)

    def other(self, written: Written) -> Written:
        return next(it for it in self.pair if it is not written)

    @property
    def apart(self) -> bool:
        """Whether the device has a memory of its own."""
        return self.device.type == "cuda"

    @cached_property
    def plans(self) -> dict[str, MemoryPlan]:
        """Of each checkpoint, with all the memory."""
        models = self.manager()
        return {it.checkpoint.name: models.predict_plan(it.checkpoint, self.workload) for it in self.pair}

    @property
    def tight(self) -> float:
        """Gigabytes in which the transformer of either can draw, but not with that of the other beside it."""
        return self.gigabytes(
            max(it.flow_bytes + self.plans[it.checkpoint.name].stage(DENOISING_STAGE).activations for it in self.pair)
        )

    def gigabytes(self, size: int) -> float:
        """The setting under which a plan of `size` bytes fits, with a hundredth to spare."""
        return (1.01 * ALLOCATOR_OVERHEAD * size + (CUDA_WORKSPACE_BYTES if self.apart else 0)) / GB

    def settle(self, module: nn.Module) -> None:
        """Return when all weights of `module` are where they belong."""
        wait(self.device)
        if self.device.type != "cpu":
            return
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.detach().reshape(-1).view(torch.uint8)[::PAGE].sum()

    def bring(self, models: ModelManager, written: Written, *, moves: bool = True) -> Transformer:
        """Have the transformer of `written` ready to draw. moves: whether it had not been on the device before; if that
        is not so, what was timed is not what it is called."""
        told: list[str] = []
        session = models.open(written.checkpoint, self.workload, lambda text, _: told.append(text))
        transformer = session.prepare_transformer(lambda text, _: told.append(text)).transformer
        if moves:
            self.settle(transformer)
        if any(text.startswith("Loading") for text in told) != moves:
            raise SystemExit(f"{written.checkpoint.label} was {'' if moves else 'not '}on the device already.")
        return transformer

    def ensure(self, models: ModelManager, *wanted: Written) -> None:
        """The same without minding where they were."""
        for written in wanted:
            session = models.open(written.checkpoint, self.workload, silent)
            self.settle(session.prepare_transformer(silent).transformer)


def prepare(size: Size, folder: Path, device: torch.device, *, baseline: bool) -> Bench:
    """Write the checkpoints of `size` into `folder`. Raises `SystemExit` where the disk is too small."""
    chosen = dict(zip(size.checkpoints, (size.first, size.second), strict=True))
    needed = sum(disk_bytes(it, baseline=baseline) for it in chosen.values()) + GB // 2
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"This takes {needed / GB:.1f} GB in {folder}, where {free / GB:.1f} GB are free: name another folder "
            f"with --folder, or add --without-baseline, which takes less."
        )
    first, second = (
        write_checkpoint(folder / checkpoint.name, checkpoint, it, seed=seed, baseline=baseline, device=device)
        for seed, (checkpoint, it) in enumerate(chosen.items())
    )
    autoencoder = write_autoencoder(folder / "ae.safetensors", size.autoencoder, seed=2, device=device)
    collect_and_empty_cache(device)
    overrides: dict[str, Path] = {}
    for it in (first, second):
        parts = zip(it.checkpoint.parts, (it.text, it.flow, autoencoder), strict=True)
        overrides |= {part.path_variable: path for part, path in parts if part.path_variable}
    settings = Settings(
        home=folder / "home",
        path_overrides=overrides,
        default_checkpoint=first.checkpoint.name,
        device=str(device),
        dtype="bfloat16",
        preview="off",
    )
    return Bench(
        pair=(first, second),
        autoencoder=autoencoder,
        settings=settings,
        device=device,
        workload=RequestShape(width=size.side, height=size.side),
    )


def silent(text: str, fraction: float | None) -> None:
    pass
