"""Times changing the checkpoint, and drawing in little memory, with the studio's own model manager.

    python -m benchmarks.swap [--size klein] [--device cuda] [--folder DIR]

Writes two synthetic checkpoints (`synthetic.py`), lets them take turns in a `ModelManager`, and reports how long one
takes until it can draw: from a cold file, a warm one, main memory, or when both are there; beside what the machine does
with the same bytes (a plain copy, a plain read), and beside diffusers' from_pretrained. Then a run of a few steps
within a small budget, beside the same run with all the memory. Prints tables, writes benchmarks/results/swap-*.json.

A GPU: weights count as loaded when the device has finished. A CPU: when every page of them has been touched, for files
may be mapped (diffusers'), and a swap would be one in name only.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import importlib.util
import os
import statistics
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import page_cache
from benchmarks.measuring import Arm, interleave, machine, summary, wait, write
from benchmarks.pair import SIZES, Bench, Size, prepare, silent
from benchmarks.synthetic import Written
from flux2_studio.checkpoints import GB
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.images.tensors import images_from_pixels
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.choices import choose_device
from flux2_studio.models.memory.plan import DENOISING_STAGE, MemoryPlan
from flux2_studio.settings import QuantizeMode

PACKAGES = ("torch", "transformers", "diffusers", "safetensors")
CEILING = 2**30  # bytes copied at a time: far beyond any cache, and no burden to a small device
AMPLE = 2**44  # bytes of main memory: no limit
COPY, READ_COLD, READ_WARM = "plain copy", "plain read, cold file", "plain read, warm file"
COLD, WARM, HOST, RESIDENT = "cold file", "warm file", "main memory", "both resident"
THEIRS_COLD, THEIRS_WARM = "from_pretrained, cold file", "from_pretrained, warm file"
COPY_ALL, ALL_COLD, ALL_WARM = "plain copy, all parts", "all parts, cold files", "all parts, warm files"
BESIDE: dict[str, tuple[str, ...]] = {  # what a level is told as a multiple of
    COLD: (COPY, READ_COLD),
    WARM: (COPY, READ_WARM),
    HOST: (COPY,),
    ALL_COLD: (COPY_ALL,),
    ALL_WARM: (COPY_ALL,),
    THEIRS_COLD: (COLD,),
    THEIRS_WARM: (WARM,),
}
ALL_MEMORY, LITTLE = "all the memory", "little memory"
SAME, FRESH = "the same prompt", "a new prompt"
# How weights are held, and for what share of the transformer's bytes in bfloat16 little memory has room: part of it.
KINDS: tuple[tuple[str, QuantizeMode, float], ...] = (("bfloat16", "off", 0.55), ("int8", "int8", 0.31))
NOTES = (
    "Weights are random and scaled so that every layer counts. Arms take turns, forwards and backwards.",
    "A swap: the other checkpoint can draw; how long until this one can, its prompt having been read before.",
    "A cold file: written out, and its pages dropped by posix_fadvise; caches below the system keep what they have.",
    "A plain copy: the same bytes from pinned memory to the GPU; on a CPU from memory to memory. A plain read: the "
    "file front to back into one buffer, by one thread.",
    "On a CPU a transformer counts as loaded when each page of its weights has been touched: diffusers maps its file, "
    "the studio copies a user's own.",
    "The planned peak is counted from headers and shapes; on a CPU nothing measures the memory that tensors take.",
)


# --- swaps ---

Arms = dict[tuple[str, str], Arm]  # by checkpoint and level


class Cooler:
    """Makes files cold, and remembers how far that went."""

    def __init__(self) -> None:
        self.left = 0.0  # the largest share of a file that was still in memory

    def __call__(self, *paths: Path) -> None:
        for path in paths:
            page_cache.drop(path)
            self.left = max(self.left, page_cache.cached(path))


def time_swaps(bench: Bench, rounds: int, warmups: int) -> dict[str, Any]:
    """Seconds of every way to each of the two checkpoints, and their ratios; what was left out, and why."""
    cooler = Cooler()
    left_out: dict[str, str] = {}
    groups = [from_files(bench, cooler)]
    if bench.apart:
        groups += [from_main_memory(bench, {}), all_parts(bench, cooler)]
    else:
        left_out[HOST] = "the device computes in main memory, so there is no such level"
        left_out["all parts"] = "measured where the device has a memory of its own"
    if both_fit(bench):
        groups.append(resident(bench))
    else:
        left_out[RESIDENT] = "the device has no room for both"
    if not page_cache.available():
        left_out["cold files"] = "only Linux can be asked to forget a file"
    if bench.pair[0].diffusers is None:
        left_out["from_pretrained"] = "diffusers is not installed, or --without-baseline was given"
    figures: dict[str, dict[str, Any]] = {it.checkpoint.name: {} for it in bench.pair}
    for group in groups:  # one after the other: together they might not fit
        with group as arms:
            times = interleave(arms, rounds, warmups)
        for (name, level), seconds in times.items():
            beside = {
                other: statistics.median(seconds) / statistics.median(times[name, other])
                for other in BESIDE.get(level, ())
                if (name, other) in times
            }
            figures[name].setdefault(level, {**summary(seconds), "times": beside})
    return {
        "seconds": figures,
        "left out": left_out,
        "of a cold file still in memory, at most": cooler.left if page_cache.available() else None,
    }


@contextlib.contextmanager
def from_files(bench: Bench, cooler: Cooler) -> Iterator[Arms]:
    models = bench.manager(memory=bench.tight, host_budget=0)
    arms: Arms = {}
    for it in bench.pair:
        name, other = it.checkpoint.name, bench.other(it)
        arms[name, COPY] = _copy(it.flow_bytes, bench.device)
        arms[name, READ_WARM] = Arm(
            prepare=partial(page_cache.read, it.flow),
            run=partial(page_cache.read, it.flow),
        )
        arms[name, WARM] = Arm(
            prepare=_in_turn(partial(bench.ensure, models, other), partial(page_cache.read, it.flow)),
            run=partial(bench.bring, models, it),
        )
        if it.diffusers is not None:
            arms[name, THEIRS_WARM] = Arm(
                prepare=_in_turn(gc.collect, partial(page_cache.read, it.diffusers_file)),
                run=partial(theirs, bench, it.diffusers),
            )
        if not page_cache.available():
            continue
        arms[name, READ_COLD] = Arm(
            # What is mapped could not be dropped.
            prepare=_in_turn(models.release_all, partial(cooler, it.flow)),
            run=partial(page_cache.read, it.flow),
        )
        arms[name, COLD] = Arm(
            prepare=_in_turn(partial(bench.ensure, models, other), partial(cooler, it.flow)),
            run=partial(bench.bring, models, it),
        )
        if it.diffusers is not None:
            arms[name, THEIRS_COLD] = Arm(
                prepare=_in_turn(gc.collect, partial(cooler, it.diffusers_file)),
                run=partial(theirs, bench, it.diffusers),
            )
    try:
        yield arms
    finally:
        models.release_all()


@contextlib.contextmanager
def from_main_memory(bench: Bench, fields: Mapping[str, Any]) -> Iterator[Arms]:
    """fields: of the manager; none where the device has a memory of its own."""
    models = bench.manager(memory=bench.tight, **fields)
    arms: Arms = {}
    for it in bench.pair:
        name, other = it.checkpoint.name, bench.other(it)
        arms[name, COPY] = _copy(it.flow_bytes, bench.device)
        arms[name, HOST] = Arm(prepare=partial(bench.ensure, models, it, other), run=partial(bench.bring, models, it))
    try:
        yield arms
    finally:
        models.release_all()


@contextlib.contextmanager
def all_parts(bench: Bench, cooler: Cooler) -> Iterator[Arms]:
    """Text encoder, transformer and autoencoder, from nothing, as far as they fit at once."""
    models = bench.manager()

    def load(it: Written) -> None:
        models.open(it.checkpoint, bench.workload, silent).preload(silent)
        wait(bench.device)

    arms: Arms = {}
    for it in bench.pair:
        name = it.checkpoint.name
        files = (it.flow, it.text_file, bench.autoencoder)
        arms[name, COPY_ALL] = _copy(bench.plans[name].stages[0].weights, bench.device)
        arms[name, ALL_WARM] = Arm(
            prepare=_in_turn(models.release_all, *(partial(page_cache.read, file) for file in files)),
            run=partial(load, it),
        )
        if page_cache.available():
            arms[name, ALL_COLD] = Arm(
                prepare=_in_turn(models.release_all, partial(cooler, *files)), run=partial(load, it)
            )
    try:
        yield arms
    finally:
        models.release_all()


@contextlib.contextmanager
def resident(bench: Bench) -> Iterator[Arms]:
    models = bench.manager()
    arms: Arms = {}
    for it in bench.pair:
        arms[it.checkpoint.name, RESIDENT] = Arm(
            prepare=partial(bench.ensure, models, it, bench.other(it)),
            run=partial(bench.bring, models, it, moves=False),
        )
    try:
        yield arms
    finally:
        models.release_all()


def both_fit(bench: Bench) -> bool:
    """Whether either can draw while the transformer of the other stays."""
    for it in bench.pair:
        plan = bench.plans[it.checkpoint.name]
        if bench.other(it).flow_bytes + plan.stage(DENOISING_STAGE).peak > plan.budget:
            return False
    return True


def _copy(size: int, device: torch.device) -> Arm:
    """`size` bytes from pinned memory to a GPU; where there is none, from memory to memory."""
    piece = min(size, CEILING)

    def run() -> None:
        for start in range(0, size, piece):
            length = min(piece, size - start)
            targets[0][:length].copy_(sources[0][:length], non_blocking=True)
        wait(device)

    sources: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []

    def prepare() -> None:
        if not sources:  # zeros, so that all pages are there
            sources.append(torch.zeros(piece, dtype=torch.uint8, pin_memory=device.type == "cuda"))
            targets.append(torch.zeros(piece, dtype=torch.uint8, device=device))

    return Arm(prepare=prepare, run=run)


def theirs(bench: Bench, folder: Path) -> nn.Module:
    model_class = importlib.import_module("diffusers").Flux2Transformer2DModel
    model: nn.Module = model_class.from_pretrained(folder, torch_dtype=torch.bfloat16).to(bench.device)
    bench.settle(model)
    return model


# --- runs in little memory ---


def time_runs(bench: Bench, budget: float | None, rounds: int, warmups: int) -> dict[str, Any]:
    """Seconds of a whole run of the first checkpoint, from prompt to pixels on the host, in `budget` gigabytes and with
    all the memory, in bfloat16 and in 8 bits."""
    it = bench.pair[0]
    models: dict[tuple[str, str], ModelManager] = {}
    for kind, quantize, share in KINDS:
        models[kind, ALL_MEMORY] = bench.manager(quantize=quantize)
        drawing = models[kind, ALL_MEMORY].predict_plan(it.checkpoint, bench.workload).stage(DENOISING_STAGE)
        little = budget or bench.gigabytes(drawing.activations + int(share * it.flow_bytes))
        # Blocks wait in main memory; a device without one of its own has them copied within it.
        models[kind, LITTLE] = bench.manager(
            memory=little, quantize=quantize, streaming=True, host_budget=None if bench.apart else AMPLE
        )
    seconds: dict[str, dict[str, Any]] = {}
    for prompts in (SAME, FRESH):
        arms = {
            f"{kind}, {memory}": Arm(run=partial(_draw, bench, manager, prompts))
            for (kind, memory), manager in models.items()
        }
        times = interleave(arms, rounds, warmups)
        seconds[prompts] = {name: summary(took) for name, took in times.items()}
        for kind, _, _ in KINDS:
            figures = seconds[prompts][f"{kind}, {LITTLE}"]
            figures["times"] = {ALL_MEMORY: figures["median"] / seconds[prompts][f"{kind}, {ALL_MEMORY}"]["median"]}
    plans = {}
    for manager in models.values():
        manager.release_all()
    for (kind, memory), manager in models.items():
        plans[f"{kind}, {memory}"] = _peak(bench, manager)
        manager.release_all()
    return {"checkpoint": it.checkpoint.name, "steps": it.checkpoint.steps, "seconds": seconds, "memory": plans}


def _draw(bench: Bench, models: ModelManager, prompts: str) -> MemoryPlan:
    """One picture; the plan it was drawn by."""
    checkpoint = bench.pair[0].checkpoint
    session = models.open(checkpoint, bench.workload, silent)
    prompt = SAME if prompts == SAME else f"{FRESH} {uuid.uuid4()}"
    context = session.encode_prompts([prompt], silent).context
    transformer = session.prepare_transformer(silent).transformer
    for step in denoise(
        transformer,
        initial_noise([1], bench.workload.width, bench.workload.height),
        context,
        steps=checkpoint.steps,
        guidance=checkpoint.guidance,
        guidance_mode=checkpoint.guidance_mode,
    ):
        latents = step.latents
    if not bool(torch.isfinite(latents).all()):
        raise SystemExit("The synthetic weights gave numbers that are none.")
    images_from_pixels(session.decode(latents, silent))
    return session.plan


def _peak(bench: Bench, models: ModelManager) -> dict[str, Any]:
    """How a run was made to fit, and the most memory that it took: planned and, on CUDA, measured."""
    if bench.apart:
        torch.cuda.reset_peak_memory_stats(bench.device)
    plan = _draw(bench, models, FRESH)
    streamed = {stage.parts[0]: stage.streamed for stage in plan.stages if stage.streamed}
    return {
        "budget": plan.budget,
        "planned peak": plan.peak,
        "measured peak": torch.cuda.max_memory_allocated(bench.device) if bench.apart else None,
        "together": plan.resident_parts,
        "blocks streamed": {part: [number, plan.block_counts[part]] for part, number in streamed.items()},
    }


# --- all of it ---


def measure(size: Size, folder: Path, device: torch.device, *, baseline: bool) -> dict[str, Any]:
    """Write the checkpoints of `size` into `folder` and time everything. baseline: diffusers too."""
    bench = prepare(size, folder, device, baseline=baseline)
    opening = {}
    for it in bench.pair:
        began = time.perf_counter()
        bench.manager().predict_plan(it.checkpoint, bench.workload)
        opening[it.checkpoint.name] = time.perf_counter() - began
    return {
        "transformers, bytes": {it.checkpoint.name: it.flow_bytes for it in bench.pair},
        "pictures": f"{size.side} x {size.side}",
        "warm-ups": size.warmups,
        "first opening and plan, seconds": opening,
        "swaps": time_swaps(bench, size.rounds, size.warmups),
        "runs": time_runs(bench, size.budget, size.runs, size.warmups),
    }


def show(report: Mapping[str, Any]) -> None:
    """The tables."""
    columns = ("median", "p10", "p90", "A/A")

    def row(name: str, figures: Mapping[str, Any]) -> None:
        beside = "; ".join(f"{ratio:.2f} x {other}" for other, ratio in figures.get("times", {}).items())
        print(f"  {name:<34}" + "".join(f"{figures[column]:>10.4f}" for column in columns) + f"  {beside}".rstrip())

    swaps, runs = report["swaps"], report["runs"]
    for name, levels in swaps["seconds"].items():
        size = report["transformers, bytes"][name]
        print(f"\n{f'seconds to {name} ({size / GB:.2f} GB)':<36}" + "".join(f"{it:>10}" for it in columns))
        for level, figures in levels.items():
            row(level, figures)
    for what, why in swaps["left out"].items():
        print(f"  without {what}: {why}")
    if (stayed := swaps["of a cold file still in memory, at most"]) is not None and stayed > 0.01:
        print(f"  cold files were not cold: up to {stayed:.0%} stayed in memory; a disk's folder may do (--folder)")
    for prompts, arms in runs["seconds"].items():
        title = f"a run, {runs['steps']} steps, {prompts}"
        print(f"\n{title:<36}" + "".join(f"{it:>10}" for it in columns))
        for name, figures in arms.items():
            row(name, figures)
    print("\npeak memory of a run, GB")
    for name, it in runs["memory"].items():
        measured = f"{it['measured peak'] / GB:.3f} measured" if it["measured peak"] else "not measured here"
        blocks = ", ".join(f"{a} of {b} blocks of {part}" for part, (a, b) in it["blocks streamed"].items())
        print(f"  {name:<34}{it['planned peak'] / GB:.3f} planned, {measured}; {blocks or 'nothing'} streamed")


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.swap", description="Time changing the checkpoint.")
    options.add_argument("--size", choices=tuple(SIZES), default="small", help="default: small, for any computer")
    options.add_argument("--device", default="auto", help="auto, cuda, cuda:1, mps or cpu (default: auto)")
    options.add_argument("--folder", type=Path, help="where checkpoints are written (default: the temporary folder)")
    options.add_argument("--rounds", type=int, help="timed swaps of each kind (default: as the size says)")
    options.add_argument("--runs", type=int, help="timed pictures of each kind (default: as the size says)")
    options.add_argument("--memory", type=float, help="gigabytes for the runs in little memory (default: likewise)")
    options.add_argument("--without-baseline", action="store_true", help="do not measure diffusers, nor write for it")
    chosen = options.parse_args()
    device = choose_device(chosen.device)
    size = SIZES[chosen.size]
    size = replace(
        size,
        rounds=chosen.rounds or size.rounds,
        runs=chosen.runs or size.runs,
        budget=chosen.memory or size.budget,
    )
    baseline = not chosen.without_baseline and importlib.util.find_spec("diffusers") is not None
    before = _load()
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="flux2-swap-") as folder:
        measured = measure(size, Path(folder), device, baseline=baseline)
    report = {
        "machine": machine(str(device), PACKAGES),
        "command": " ".join(["python -m benchmarks.swap", *sys.argv[1:]]),
        "load before and after": [before, _load()],
        "size": chosen.size,
        "notes": NOTES,
        **measured,
    }
    show(report)
    print(f"\nwritten to {write(report, f'swap-{device.type}.json')}")


def _load() -> float | None:
    """How many programs wanted a core in the last minute, this one included; nobody else should have."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _in_turn(*steps: Callable[[], Any]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            step()

    return run


if __name__ == "__main__":
    main()
