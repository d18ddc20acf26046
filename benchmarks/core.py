"""Times the parts of a model beside diffusers on the very same weights: the flow transformer in one evaluation and a
whole denoising loop, the text encoder on one prompt, the decoder on one picture.

    make bench-core [ARGS="--size klein-4b --device cuda --compiled"]
    make bench-core ARGS="--size klein-4b --cases 512 1024 1024+2"       the last with two references
    make bench-core ARGS="--stages transformer text decoder"

Weights are random, scaled so that every layer counts (`synthetic.py`), and made on the device; both sides compute with
the same tensors. Arms take turns, forwards and backwards. First come the machine's own ceilings at the shapes that
occur (matrix products, attention, copies), and after the times the relative L2 error of each arm against float32, so
that nothing is fast because it is wrong. Prints tables and writes benchmarks/results/core-SIZE-DEVICE.json, anew after
each case, so that a run which is ended keeps what it had; `python -m benchmarks.plot` draws it.

--compile-ours adds ours with its blocks compiled. --compiled adds diffusers with its blocks compiled, and compiled as a
whole, which takes minutes to begin. --held adds ours with its weights held in fewer bits than it computes with, which
is in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoder_arms, text_arms, transformer_arms
from benchmarks.ceilings import LINEAR, attention, copies, matrices
from benchmarks.measuring import RESULTS, Deadline, machine, write
from benchmarks.sizes import MODELS, Model
from benchmarks.transformer_arms import HOLDINGS, TEXT, Case, Way
from flux2_studio.checkpoints import GB
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime.compiling import Compiler
from flux2_studio.models.memory.residency import collect_and_empty_cache

PACKAGES = ("torch", "transformers", "diffusers")
DTYPE = torch.bfloat16
HEADROOM = 10 * GB  # for what computing takes, in float32 for the errors
HEADINGS = ("median", "p10", "p90", "events", "A/A", "x theirs", "x floor")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What was measured, written to `folder` after each part of it."""

    folder: Path
    name: str
    fields: dict[str, Any]

    def save(self) -> Path:
        return write(self.fields, self.name, self.folder)

    def leave_out(self, what: str, why: str) -> None:
        print(f"left out: {what}: {why}")
        self.fields.setdefault("left out", {})[what] = why


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the stages are given. chosen: the command line's options."""

    model: Model
    report: Report
    device: torch.device
    deadline: Deadline
    chosen: argparse.Namespace

    @property
    def cases(self) -> list[Case]:
        named: list[Case] | None = self.chosen.cases
        sides, counts = self.chosen.sides, self.chosen.references
        return named or [Case(side=side, references=count) for side in sides for count in counts]

    @property
    def rounds(self) -> dict[str, Any]:
        """How often everything is timed."""
        return {name: getattr(self.chosen, name) for name in ("rounds", "warmups", "limit")}

    @property
    def room(self) -> float:
        """Bytes that weights may still take on the device, beside what computing takes."""
        if self.device.type != "cuda":
            return float("inf")
        collect_and_empty_cache(self.device)
        return torch.cuda.mem_get_info(self.device)[0] - HEADROOM

    def begin(self, what: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """What `work` gives; None, and the report says why, where no time is left or memory does not suffice."""
        if self.deadline.left <= 0:
            self.report.leave_out(what, "no time was left")
            return None
        try:
            return work()
        except torch.OutOfMemoryError as error:
            self.report.leave_out(what, str(error))
            return None


def main(arguments: Sequence[str] | None = None, models: Mapping[str, Model] = MODELS) -> None:
    parser = _parser(models)
    chosen = parser.parse_args(arguments)
    device = torch.device(chosen.device)
    model = models[chosen.size]
    if "text" in chosen.stages and model.text is None:
        parser.error(f"the text encoder of {chosen.size} is no Qwen3, which is all that is timed here")
    if chosen.blocks:
        model = replace(model, flow=shortened(model.flow, chosen.blocks))
    label = f"-{chosen.label}" if chosen.label else ""
    report = Report(
        folder=chosen.out,
        name=f"core-{chosen.size}{label}-{device.type}.json",
        fields={
            "command": " ".join(["python -m benchmarks.core", *(sys.argv[1:] if arguments is None else arguments)]),
            "machine": machine(chosen.device, PACKAGES),
            "size": chosen.size,
            "blocks": [model.flow.double_blocks, model.flow.single_blocks],
        },
    )
    run = Run(model=model, report=report, device=device, deadline=Deadline.within(chosen.budget), chosen=chosen)
    for stage in chosen.stages:
        print(f"--- {stage} ---")
        STAGES[stage](run)
        report.save()
    if device.type == "cuda":
        report.fields["peak memory, bytes"] = torch.cuda.max_memory_allocated(device)
    print(f"written to {report.save()}")


def shortened(params: TransformerParams, blocks: int) -> TransformerParams:
    return replace(
        params,
        double_blocks=min(blocks, params.double_blocks),
        single_blocks=min(blocks, params.single_blocks),
    )


def time_transformer(run: Run) -> None:
    params, device, chosen = run.model.flow, run.device, run.chosen
    longest = max(case.sequence for case in run.cases)
    rates = (
        matrices(longest, params.hidden, 3 * params.hidden + 2 * params.mlp, device, DTYPE)
        | attention(longest, params.heads, params.head_width, device, DTYPE)
        | copies(device)
    )
    show_rates(rates)
    run.report.fields.update({"ceilings": rates, "cases": {}})
    weights = transformer_arms.weights(params)
    if (needed := weights * DTYPE.itemsize) > run.room:
        run.report.leave_out(
            "transformer", f"its weights take {needed / GB:.1f} GB, of {run.room / GB:.1f} that are left"
        )
        return
    flow = transformer_arms.made(params, device, DTYPE)
    compiler = Compiler() if chosen.compile_ours else None
    ways = transformer_arms.our_ways(flow, compiler)
    for how in chosen.held:
        if how != "bfloat16" and weights > run.room:
            run.report.leave_out(
                f"held in {how}", f"it takes {weights / GB:.1f} GB, of {run.room / GB:.1f} that are left"
            )
            continue
        ways |= transformer_arms.held_way(flow, how, compiler)
    ways |= transformer_arms.their_ways(flow, compiled=chosen.compiled)
    pictures = not chosen.only_evaluations
    compiling = 0.0  # seconds, so far
    for case in run.cases:
        if compiling > chosen.compile_budget and any(way.compiled for way in ways.values()):
            ways = {name: way for name, way in ways.items() if not way.compiled}
            run.report.leave_out(f"{case.name} and further, compiled", f"compiling had taken {compiling:.0f} s")
        timed = partial(transformer_arms.time_case, ways, params, case, rates, device=device, dtype=DTYPE)
        figures = run.begin(case.name, partial(timed, pictures=pictures, **run.rounds))
        if figures is None:
            continue
        compiling += compile_seconds(figures["seconds"], ways)
        run.report.fields["cases"][case.name] = figures
        show(case.name, figures["seconds"])
        run.report.save()
        if "relative error" not in run.report.fields:
            found = transformer_arms.errors(ways, flow, case, pictures=pictures)
            run.report.fields["relative error"] = found
            show_errors(found)
            if device.type == "cuda":
                run.report.fields["kernels"] = transformer_arms.kernels(ways, params, case, device, DTYPE)


def time_text(run: Run) -> None:
    size, device = run.model.text, run.device
    assert size is not None
    at = text_arms.depth(size, run.chosen.blocks)
    collect_and_empty_cache(device)
    rates = (
        matrices(TEXT, size.width, 2 * size.mlp, device, DTYPE)
        | attention(TEXT, size.heads, size.head_width, device, DTYPE)
        | copies(device)
    )
    show_rates(rates)
    tower, model = text_arms.made(size, at, device, DTYPE)
    ways = text_arms.our_ways(tower, at.taps) | text_arms.their_ways(model, at.taps)
    timed = partial(text_arms.time_text, ways, tower.params, rates, device=device)
    figures = run.begin("text", partial(timed, **run.rounds))
    if figures is None:
        return
    show(f"{TEXT} tokens, {at.read} of {at.layers} layers", figures["seconds"])
    found = text_arms.errors(ways, tower, at.taps)
    show_errors({text_arms.ENCODING: found})
    layers = {"layers": at.layers, "layers read": at.read}
    run.report.fields["text"] = {**layers, "ceilings": rates, **figures, "relative error": found}


def time_decoder(run: Run) -> None:
    params, device = run.model.autoencoder, run.device
    inner = params.decoder_channels[-1]
    sides = sorted({case.side for case in run.cases})
    collect_and_empty_cache(device)
    rates = matrices((sides[-1] // 8) ** 2, 9 * inner, inner, device, DTYPE)
    show_rates(rates)
    autoencoder = decoder_arms.made(params, device, DTYPE)
    ways = decoder_arms.our_ways(autoencoder) | decoder_arms.their_ways(autoencoder)
    told = run.report.fields["decoder"] = {}
    run.report.fields["ceiling of the decoder, operations/s"] = rates[LINEAR]
    for side in sides:
        name = Case(side=side).name
        timed = partial(decoder_arms.time_side, ways, params, side, rates, device=device)
        figures = run.begin(f"decoder, {name}", partial(timed, **run.rounds))
        if figures is None:
            continue
        told[name] = figures
        show(name, figures["seconds"])
        if side == sides[0]:
            figures["relative error"] = decoder_arms.errors(ways, autoencoder, side)
            show_errors({decoder_arms.DECODING: figures["relative error"]})
        run.report.save()


STAGES = {"transformer": time_transformer, "text": time_text, "decoder": time_decoder}


def compile_seconds(timed: Mapping[str, Any], ways: Mapping[str, Way]) -> float:
    return sum(arms[name]["first"] for arms in timed.values() for name in arms if ways[name].compiled)


# --- what is printed ---


def show_rates(rates: Mapping[str, float]) -> None:
    for name, rate in rates.items():
        print(f"{name:40}{rate:12.3e}")
    print(f"\n{'seconds':44}" + "".join(f"{heading:>10}" for heading in HEADINGS))


def show(title: str, timed: Mapping[str, Mapping[str, Any]]) -> None:
    """A table of arms, for each thing that they did."""
    print(title)
    for what, arms in timed.items():
        for name, figures in arms.items():
            seconds = (figures["median"], figures["p10"], figures["p90"], figures.get("events", {}).get("median"))
            ratios = (figures["A/A"], figures.get("times diffusers"), figures.get("times the floor"))
            cells = [f"{value:10.4f}" if value is not None else f"{'-':>10}" for value in seconds]
            cells += [f"{value:10.3f}" if value is not None else f"{'-':>10}" for value in ratios]
            print(f"  {what + ', ' + name:42}" + "".join(cells))


def show_errors(found: Mapping[str, Mapping[str, float]]) -> None:
    for what, arms in found.items():
        for name, error in arms.items():
            print(f"  {what + ', ' + name:42}relative error {error:.2e}")


def _parser(models: Mapping[str, Model] = MODELS) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.core", description="Time a model's parts beside diffusers.")
    add = parser.add_argument
    add("--stages", choices=STAGES, nargs="+", default=["transformer"], help="what is timed (default: transformer)")
    add("--size", choices=models, default="small")
    add("--device", default="cpu")
    add("--sides", type=int, nargs="+", default=[512], help="pixels (default: 512)")
    add("--references", type=int, nargs="+", default=[0], help="how many (default: 0), with each side")
    add("--cases", type=Case.parse, nargs="+", metavar="SIDE[+REFERENCES]", help="instead of all sides with all counts")
    add("--rounds", type=int, default=20)
    add("--warmups", type=int, default=3)
    add("--limit", type=float, metavar="SECONDS", help="about how long each table may take; 5 rounds are made anyhow")
    add("--budget", type=float, metavar="SECONDS", help="after which no case is begun")
    add("--compile-ours", action="store_true", help="also ours, with its blocks compiled, which hold for all cases")
    add("--compiled", action="store_true", help="also diffusers, compiled")
    add("--compile-budget", type=float, default=float("inf"), metavar="SECONDS", help="no more is compiled after that")
    add("--held", choices=HOLDINGS, nargs="+", default=[], help="also ours, held so")
    add("--only-evaluations", action="store_true", help="no whole pictures")
    add("--blocks", type=int, help="only so many blocks of each kind, and layers of text, for a slow machine")
    add("--label", help="what the file is called beside the size")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the file goes (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    main()
