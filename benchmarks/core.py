"""Times the flow transformer beside diffusers on the very same weights, one evaluation and a whole denoising loop.

    make bench-core [ARGS="--size klein-4b --device cuda --compiled"]
    make bench-core ARGS="--size klein-4b --cases 512 1024 1024+2"       1024 x 1024, with two references

Weights are random, scaled so that every layer counts (`synthetic.py`), and made on the device; both sides compute with
the same tensors. Arms take turns, forwards and backwards. First come the machine's own ceilings at the shapes that
occur (matrix products, attention, copies), and after the times the relative L2 error of each arm against float32, so
that nothing is fast because it is wrong. Prints tables and writes benchmarks/results/core-SIZE-DEVICE.json, anew after
each case, so that a run which is ended keeps what it had; `python -m benchmarks.plot` draws it.

--compiled adds diffusers with its blocks compiled, and compiled as a whole, which takes minutes to begin. --held adds
ours with its weights held in fewer bits than it computes with, which is in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import transformer_arms
from benchmarks.ceilings import ceilings
from benchmarks.measuring import RESULTS, Deadline, machine, write
from benchmarks.sizes import MODELS, Model
from benchmarks.transformer_arms import HOLDINGS, Case, Way
from flux2_studio.engine.params import TransformerParams

PACKAGES = ("torch", "transformers", "diffusers")
DTYPE = torch.bfloat16
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


def main(arguments: Sequence[str] | None = None) -> None:
    chosen = _parser().parse_args(arguments)
    device = torch.device(chosen.device)
    model = MODELS[chosen.size]
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
    time_transformer(model, report, device, chosen)
    if device.type == "cuda":
        report.fields["peak memory, bytes"] = torch.cuda.max_memory_allocated(device)
    print(f"written to {report.save()}")


def shortened(params: TransformerParams, blocks: int) -> TransformerParams:
    return replace(
        params,
        double_blocks=min(blocks, params.double_blocks),
        single_blocks=min(blocks, params.single_blocks),
    )


def time_transformer(model: Model, report: Report, device: torch.device, chosen: argparse.Namespace) -> None:
    params = model.flow
    cases: list[Case] = chosen.cases or [
        Case(side=side, references=count) for side in chosen.sides for count in chosen.references
    ]
    longest = max(case.sequence for case in cases)
    inner = 3 * params.hidden + 2 * params.mlp
    rates = ceilings(longest, params.hidden, inner, params.heads, params.head_width, device, DTYPE)
    show_rates(rates)
    report.fields.update({"ceilings": rates, "cases": {}})
    flow = transformer_arms.made(params, device, DTYPE)
    ways = transformer_arms.our_ways(flow, chosen.held) | transformer_arms.their_ways(flow, compiled=chosen.compiled)
    pictures = not chosen.only_evaluations
    deadline = Deadline.within(chosen.budget)
    compiling = 0.0  # seconds, so far
    for case in cases:
        if deadline.left <= 0:
            report.leave_out(case.name, "no time was left")
            continue
        if compiling > chosen.compile_budget and any(way.compiled for way in ways.values()):
            ways = {name: way for name, way in ways.items() if not way.compiled}
            report.leave_out(f"{case.name}, compiled", f"compiling had taken {compiling:.0f} s")
        try:
            figures = transformer_arms.time_case(
                ways,
                params,
                case,
                rates,
                device=device,
                dtype=DTYPE,
                rounds=chosen.rounds,
                warmups=chosen.warmups,
                limit=chosen.limit,
                pictures=pictures,
            )
        except torch.OutOfMemoryError as error:
            report.leave_out(case.name, str(error))
            continue
        compiling += compile_seconds(figures["seconds"], ways)
        report.fields["cases"][case.name] = figures
        show(case.name, figures["seconds"])
        if "relative error" not in report.fields:
            found = transformer_arms.errors(ways, flow, case, pictures=pictures)
            report.fields["relative error"] = found
            show_errors(case.name, found)
        report.save()


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


def show_errors(title: str, found: Mapping[str, Mapping[str, float]]) -> None:
    for what, arms in found.items():
        for name, error in arms.items():
            print(f"  relative error, {what}, {name:40}{error:.2e}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.core", description="Time the transformer beside diffusers.")
    add = parser.add_argument
    add("--size", choices=MODELS, default="small")
    add("--device", default="cpu")
    add("--sides", type=int, nargs="+", default=[512], help="pixels (default: 512)")
    add("--references", type=int, nargs="+", default=[0], help="how many (default: 0), with each side")
    add("--cases", type=Case.parse, nargs="+", metavar="SIDE[+REFERENCES]", help="instead of all sides with all counts")
    add("--rounds", type=int, default=20)
    add("--warmups", type=int, default=3)
    add("--limit", type=float, metavar="SECONDS", help="about how long each table may take; 5 rounds are made anyhow")
    add("--budget", type=float, metavar="SECONDS", help="after which no case is begun")
    add("--compiled", action="store_true", help="also diffusers, compiled")
    add("--compile-budget", type=float, default=float("inf"), metavar="SECONDS", help="no more is compiled after that")
    add("--held", choices=HOLDINGS, nargs="+", default=[], help="also ours, held so")
    add("--only-evaluations", action="store_true", help="no whole pictures")
    add("--blocks", type=int, help="only so many blocks of each kind, for a slow machine")
    add("--label", help="what the file is called beside the size")
    add("--out", type=Path, default=RESULTS, metavar="FOLDER", help="where the file goes (default: benchmarks/results)")
    return parser


if __name__ == "__main__":
    main()
