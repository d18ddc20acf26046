"""Times the flow transformer, one evaluation and a whole denoising loop, beside diffusers on the very same weights.

    make bench-core [ARGS="--size klein-4b --device cuda --compiled"]

Weights are random, scaled so that every layer counts (`synthetic.py`), and made on the device; both sides compute with
the same tensors. Arms take turns, forwards and backwards. First come the machine's own ceilings at the shapes that
occur (matrix products, attention, copies), and after the times the relative L2 error of each arm's velocity against
float32, so that nothing is fast because it is wrong. Prints tables and writes benchmarks/results/core-SIZE-DEVICE.json.

--compiled adds diffusers with its blocks compiled, and compiled as a whole, which takes minutes to begin. --held adds
ours with its weights held in fewer bits than it computes with, which is in float32 on a CPU.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measuring import Arm, interleave, machine, summary, write
from benchmarks.pair import SIZES, wait
from benchmarks.synthetic import fill, sharing
from flux2_studio.engine.latents import noise, sequence_ids
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.quantize import HalfMatrix, QuantizedLinear, quantize
from flux2_studio.engine.sampling import denoise, schedule
from flux2_studio.engine.transformer import Transformer

PACKAGES = ("torch", "transformers", "diffusers")
TEXT = 512  # tokens of a prompt, padded
STEPS = 4
OURS, THEIRS = "ours", "diffusers"
REGIONAL, WHOLE = "diffusers, blocks compiled", "diffusers, compiled"
DEV = TransformerParams(
    in_channels=128,
    context_width=15_360,
    hidden=6144,
    head_width=128,
    mlp=18_432,
    double_blocks=8,
    single_blocks=48,
    guidance_embedding=True,
)
PARAMS: dict[str, TransformerParams] = {
    "small": SIZES["small"].first.params,
    "klein-4b": SIZES["klein"].first.params,
    "klein-9b": SIZES["klein"].second.params,
    "dev": DEV,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture of side x side pixels, with so many references of the same size."""

    side: int
    references: int = 0

    @property
    def name(self) -> str:
        told = {0: "", 1: ", 1 reference"}.get(self.references, f", {self.references} references")
        return f"{self.side} x {self.side}{told}"

    @property
    def latent(self) -> int:
        """Tokens along one side."""
        return self.side // 16

    @property
    def tokens(self) -> int:
        return self.latent**2

    @property
    def sequence(self) -> int:
        return TEXT + self.tokens * (1 + self.references)


# --- floors: how long the arithmetic takes at the rates that the machine reached in this run ---


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations (a product and a sum are two) of one evaluation: in linear layers, and in attention."""

    linear: float
    attention: float


def work(params: TransformerParams, case: Case) -> Work:
    """What one evaluation has to compute at least: the last block's keys and values are of all tokens, the rest of it
    of the picture's alone. A token passes one of a double block's two streams: 13 D^2 weights where the MLP is 3 D
    wide, as many as in a single block."""
    hidden, mlp, n = params.hidden, params.mlp, case.sequence
    block = 4 * hidden**2 + 3 * hidden * mlp
    spared = n - case.tokens
    linear = 2 * n * block * (params.double_blocks + params.single_blocks)
    linear -= 2 * spared * (block - 2 * hidden**2)
    linear += 2 * (TEXT * params.context_width + (n - TEXT + case.tokens) * params.in_channels) * hidden
    attention = 4 * n * n * hidden * (params.double_blocks + params.single_blocks) - 4 * spared * n * hidden
    return Work(linear=linear, attention=attention)


def ceilings(params: TransformerParams, case: Case, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Operations, or bytes, per second: the best of several tries at the shapes of `case`."""
    hidden, n = params.hidden, case.sequence
    x = torch.randn(n, hidden, device=device, dtype=dtype)
    weight = torch.randn(3 * hidden + 2 * params.mlp, hidden, device=device, dtype=dtype)
    q = torch.randn(1, params.heads, n, params.head_width, device=device, dtype=dtype)
    large = torch.empty(2**28, dtype=torch.uint8, device=device)
    into = torch.empty_like(large)
    measured = {
        "linear layers, operations/s": 2 * n * weight.numel() / _best(lambda: F.linear(x, weight), device),
        "attention, operations/s": 4 * n * n * hidden / _best(lambda: F.scaled_dot_product_attention(q, q, q), device),
        "copy, bytes/s": 2 * large.nbytes / _best(lambda: into.copy_(large), device),
    }
    if device.type == "cuda":
        host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
        measured["host to device, bytes/s"] = host.nbytes / _best(lambda: into.copy_(host, non_blocking=True), device)
        measured |= _eight_bit(x, weight)
    return measured


def _eight_bit(x: Tensor, weight: Tensor) -> dict[str, float]:
    """Rates of the products in 8 bits that the GPU has."""
    rates = {}
    operations = 2 * len(x) * weight.numel()
    if torch.cuda.get_device_capability(x.device) >= (8, 9):
        a, b = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn).t()
        rows, columns = torch.ones(len(x), 1, device=x.device), torch.ones(1, len(weight), device=x.device)

        def fp8() -> Tensor:
            return torch._scaled_mm(a, b, scale_a=rows, scale_b=columns, out_dtype=torch.bfloat16)

        rates["fp8, operations/s"] = operations / _best(fp8, x.device)
    codes, matrix = x.clamp(-1, 1).mul(127).to(torch.int8), weight.clamp(-1, 1).mul(127).to(torch.int8).t()
    rates["int8, operations/s"] = operations / _best(lambda: torch._int_mm(codes, matrix), x.device)
    return rates


def _best(work: Callable[[], Any], device: torch.device, tries: int = 10) -> float:
    """Seconds of the fastest of `tries`, after three that do not count."""
    seconds = []
    for _ in range(3 + tries):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds[3:])


# --- the arms ---


class Inputs:
    """What a picture of `case` is drawn from; of order one, as the real ones are."""

    def __init__(self, params: TransformerParams, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        def made(*shape: int, seed: int) -> Tensor:
            generator = torch.Generator().manual_seed(seed)
            return torch.randn(*shape, generator=generator).to(device, dtype)

        side = case.latent
        self.noise = noise([0], case.side, case.side, params.in_channels)
        self.references = [
            made(1, params.in_channels, side, side, seed=10 + number).float() for number in range(case.references)
        ]
        self.ctx = made(1, TEXT, params.context_width, seed=1)
        self.x = made(1, case.sequence - TEXT, params.in_channels, seed=2)
        # 1000 t is exact in bfloat16: diffusers rounds it to that, which would be all that one sees of its error.
        self.t = torch.tensor([0.5], device=device)
        self.guidance = torch.tensor([4.0], device=device) if params.guidance_embedding else None
        self.ids = sequence_ids(TEXT, side, side, self.references).to(device)


Velocity = Callable[[Inputs, Case], Tensor]  # [1, tokens, 128]


def our_velocity(model: Transformer) -> Velocity:
    rope_of: dict[Case, Any] = {}

    def velocity(given: Inputs, case: Case) -> Tensor:
        if case not in rope_of:  # a loop makes it once
            rope_of[case] = model.rope(given.ids)
        x, ctx = given.x.to(model.dtype), given.ctx.to(model.dtype)
        with torch.inference_mode():
            return model(x, ctx, given.t, rope_of[case], given.guidance, outputs=case.tokens)

    return velocity


def their_velocity(model: Any) -> Velocity:
    def velocity(given: Inputs, case: Case) -> Tensor:
        dtype = next(iter(model.parameters())).dtype
        with torch.inference_mode():
            out = model(
                hidden_states=given.x.to(dtype),
                encoder_hidden_states=given.ctx.to(dtype),
                timestep=given.t,
                img_ids=given.ids[TEXT:],
                txt_ids=given.ids[:TEXT],
                guidance=given.guidance,
                return_dict=False,
            )[0]
        return out[:, : case.tokens]

    return velocity


def our_picture(model: Transformer, given: Inputs) -> Callable[[], Tensor]:
    """All steps, as the studio makes them."""

    def picture() -> Tensor:
        guiding = "embedded" if model.params.guidance_embedding else "none"
        *_, last = denoise(
            model,
            given.noise,
            given.ctx,
            steps=STEPS,
            guidance=4.0,
            guiding=guiding,  # type: ignore[arg-type]
            references=given.references,
        )
        return last.latents

    return picture


def their_picture(velocity: Velocity, given: Inputs, case: Case) -> Callable[[], Tensor]:
    """As many evaluations and Euler steps with diffusers' transformer, without all else that its pipeline does."""
    times = schedule(case.tokens, STEPS)

    def picture() -> Tensor:
        x = given.x[:, : case.tokens].float()
        rest = given.x[:, case.tokens :]
        step = copy.copy(given)
        for t, following in pairwise(times):
            step.x = torch.cat((x.to(rest.dtype), rest), 1)
            step.t = torch.full_like(given.t, t)
            x = x + (following - t) * velocity(step, case).float()
        return x

    return picture


def held(model: Transformer, how: str) -> Transformer:
    """Another with the blocks' weights of `model` in "bfloat16" (the very same memory) or "int8". It computes in
    float32 on a CPU, elsewhere as `model` does."""
    dtype = torch.float32 if model.device.type == "cpu" else model.dtype
    with torch.device("meta"):
        other = Transformer(model.params)
    state = {name: value.to(dtype) for name, value in model.state_dict().items() if "blocks." not in name}
    for name, layer in list(model.named_modules()):
        if "blocks." not in name:
            continue
        if isinstance(layer, nn.Linear):
            matrix = quantize(layer.weight, "int8") if how == "int8" else HalfMatrix(layer.weight)
            other.set_submodule(name, QuantizedLinear(matrix))
            state |= {f"{name}.{key}": value for key, value in other.get_submodule(name).state_dict().items()}
        else:
            own = dict(layer.named_parameters(name, recurse=False))
            state |= {key: value.to(dtype) for key, value in own.items()}
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)


def time_case(
    ours: Mapping[str, Transformer],
    baselines: Mapping[str, Any],
    case: Case,
    *,
    device: torch.device,
    rounds: int,
    warmups: int,
    pictures: bool = True,
) -> dict[str, Any]:
    """Seconds of every arm, for one evaluation and for a whole picture, and what they are to the first of diffusers."""
    model = ours[OURS]
    given = Inputs(model.params, case, device, model.dtype)
    velocities = _velocities(ours, baselines)

    def arm(work: Callable[[], Tensor]) -> Arm:
        def run() -> Tensor:
            out = work()
            wait(device)
            return out

        return Arm(run=run, prepare=lambda: wait(device))

    one = {name: arm(partial(velocity, given, case)) for name, velocity in velocities.items()}
    times = {"evaluation": interleave(one, rounds, warmups)}
    if pictures:
        whole = {
            name: arm(our_picture(ours[name], given) if name in ours else their_picture(velocity, given, case))
            for name, velocity in velocities.items()
        }
        times["picture"] = interleave(whole, max(1, rounds // 2), 1)
    return {
        what: {name: {**summary(seconds), **_ratio(arms, name)} for name, seconds in arms.items()}
        for what, arms in times.items()
    }


def _ratio(arms: Mapping[str, Sequence[float]], name: str) -> dict[str, float]:
    """How many times as fast as diffusers an arm is, by medians."""
    if THEIRS not in arms:
        return {}
    return {"times diffusers": summary(arms[THEIRS])["median"] / summary(arms[name])["median"]}


def _velocities(ours: Mapping[str, Transformer], baselines: Mapping[str, Any]) -> dict[str, Velocity]:
    mine = {name: our_velocity(model) for name, model in ours.items()}
    return mine | {name: their_velocity(model) for name, model in baselines.items()}


def errors(
    ours: Mapping[str, Transformer], baselines: Mapping[str, Any], case: Case, device: torch.device
) -> dict[str, float]:
    """The relative L2 error of each arm's velocity against ours in float32."""
    model = ours[OURS]
    given = Inputs(model.params, case, device, model.dtype)
    velocities = _velocities(ours, baselines)
    found = {name: velocity(given, case).double() for name, velocity in velocities.items()}
    with torch.device("meta"):
        exact = Transformer(model.params)
    exact.load_state_dict({name: value.float() for name, value in model.state_dict().items()}, assign=True)
    reference = our_velocity(exact.requires_grad_(False))(given, case).double()
    return {name: float((value - reference).norm() / reference.norm()) for name, value in found.items()}


def baselines_of(model: Transformer, *, compiled: bool) -> dict[str, Any]:
    """diffusers' arms; none where it is not installed."""
    if importlib.util.find_spec("diffusers") is None:
        return {}
    arms = {THEIRS: sharing(model)}
    if compiled:
        arms[REGIONAL] = sharing(model)
        arms[REGIONAL].compile_repeated_blocks(fullgraph=True)
        arms[WHOLE] = torch.compile(sharing(model))
    return arms


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.core", description="Time the transformer beside diffusers.")
    parser.add_argument("--size", choices=PARAMS, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sides", type=int, nargs="+", default=[512], help="pixels (default: 512)")
    parser.add_argument("--references", type=int, nargs="+", default=[0], help="how many (default: 0)")
    parser.add_argument("--rounds", type=int, default=20, help="timed evaluations of each arm (default: 20)")
    parser.add_argument("--warmups", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also diffusers compiled, which takes minutes")
    parser.add_argument("--held", choices=["bfloat16", "int8"], nargs="+", default=[], help="also ours held so")
    parser.add_argument("--only-evaluations", action="store_true", help="no whole pictures")
    parser.add_argument("--blocks", type=int, help="only so many blocks of each kind, for a slow machine")
    chosen = parser.parse_args()

    device, dtype = torch.device(chosen.device), torch.bfloat16
    params = PARAMS[chosen.size]
    if chosen.blocks:
        params = replace(
            params,
            double_blocks=min(chosen.blocks, params.double_blocks),
            single_blocks=min(chosen.blocks, params.single_blocks),
        )
    cases = [Case(side=side, references=count) for side in chosen.sides for count in chosen.references]
    with torch.device("meta"):
        model = Transformer(params)
    fill(model, seed=0, device=device, dtype=dtype)
    ours = {OURS: model.eval(), **{f"ours, held in {how}": held(model, how) for how in chosen.held}}
    baselines = baselines_of(model, compiled=chosen.compiled)

    rates = ceilings(params, cases[-1], device, dtype)
    for name, rate in rates.items():
        print(f"{name:40}{rate:12.3e}")
    report: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.core", *sys.argv[1:]]),
        "machine": machine(chosen.device, PACKAGES),
        "size": chosen.size,
        "blocks": [params.double_blocks, params.single_blocks],
        "ceilings": rates,
        "cases": {},
    }
    print(f"\n{'seconds':44}{'median':>10}{'p10':>10}{'p90':>10}{'A/A':>8}{'x theirs':>10}{'x floor':>9}")
    for case in cases:
        timed = time_case(
            ours,
            baselines,
            case,
            device=device,
            rounds=chosen.rounds,
            warmups=chosen.warmups,
            pictures=not chosen.only_evaluations,
        )
        least = work(params, case)
        floor = least.linear / rates["linear layers, operations/s"] + least.attention / rates["attention, operations/s"]
        report["cases"][case.name] = {"floor of an evaluation": floor, "seconds": timed}
        print(case.name)
        for what, arms in timed.items():
            for name, figures in arms.items():
                above = figures["median"] / (floor * (1 if what == "evaluation" else STEPS))
                figures["times the floor"] = above
                print(
                    f"  {what + ', ' + name:42}{figures['median']:10.4f}{figures['p10']:10.4f}{figures['p90']:10.4f}"
                    f"{figures['A/A']:8.3f}{figures.get('times diffusers', float('nan')):10.3f}{above:9.2f}"
                )
    report["relative error of a velocity"] = errors(ours, baselines, cases[0], device)
    for name, error in report["relative error of a velocity"].items():
        print(f"relative error, {name:40}{error:.2e}")
    if device.type == "cuda":
        report["peak memory, bytes"] = torch.cuda.max_memory_allocated(device)
    print(f"written to {write(report, f'core-{chosen.size}-{device.type}.json')}")


if __name__ == "__main__":
    main()
