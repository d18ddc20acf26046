"""The flow transformer's arms: one evaluation and a whole denoising loop, ours and diffusers' over the same weights.

An arm is a `Way`; `our_ways` and `their_ways` say which there are. What one evaluation has to compute at least, `work`,
makes the floor that each is compared with.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from benchmarks.ceilings import ATTENTION, FP8, INT8, LINEAR
from benchmarks.measuring import FEWEST, installed, longest_kernels, time_on
from benchmarks.synthetic import fill, flow_shapes, sharing
from flux2_studio.engine.flux.latents import from_tokens, initial_noise, sequence_position_ids, to_tokens
from flux2_studio.engine.flux.sampling import denoise, timestep_schedule
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import TransformerParams
from flux2_studio.engine.runtime.compiling import CompileKey, Compiler, clone_sharing_weights
from flux2_studio.engine.runtime.graphs import MAX_GRAPH_TOKENS, CudaGraphCapture, GraphRunner
from flux2_studio.engine.text.decoder import TextDecoder
from flux2_studio.engine.weights.quantize import BFloat16Matrix, QuantizedLinear, has_8bit_matmul, quantize

TEXT = 512  # tokens of a prompt, padded
STEPS = 4
OURS, THEIRS = "ours", "diffusers"
REPLAYED = "ours, replayed"  # as a CUDA graph, where the case is small enough for one
REGIONAL, WHOLE = "diffusers, blocks compiled", "diffusers, compiled"
EVALUATION, PICTURE = "evaluation", "picture"
ModelT = TypeVar("ModelT", Transformer, TextDecoder)
HOLDINGS = ("bfloat16", "fp8", "int8")  # how the blocks' weights may be held


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture of side x side pixels, with so many references of the same size."""

    side: int
    references: int = 0

    @classmethod
    def parse(cls, text: str) -> Case:
        """From "1024" or "1024+2". Raises `ValueError`."""
        side, _, references = text.partition("+")
        return cls(side=int(side), references=int(references or 0))

    @classmethod
    def named(cls, name: str) -> Case:
        """That of a `name`, see below."""
        side, references = (re.search(pattern, name) for pattern in (r"^\d+", r"(\d+) reference"))
        assert side is not None
        return cls(side=int(side[0]), references=int(references[1]) if references else 0)

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


# --- the floor ---


@dataclass(frozen=True, kw_only=True)
class Work:
    """Operations (a product and a sum are two) of one evaluation: in the blocks' linear layers, those before and after
    the blocks, and in attention."""

    blocks: float
    ends: float
    attention: float

    def floor(self, rates: Mapping[str, float], products: str = LINEAR) -> float:
        """Seconds, at the rates that the machine reached. products: which of them the blocks' linear layers have."""
        return self.blocks / rates[products] + self.ends / rates[LINEAR] + self.attention / rates[ATTENTION]


def work(params: TransformerParams, case: Case) -> Work:
    """What one evaluation has to compute at least: the last block's keys and values are of all tokens, the rest of it
    of the picture's alone. A token passes one of a double block's two streams: 13 D^2 weights where the MLP is 3 D
    wide, as many as in a single block."""
    hidden, mlp, n = params.hidden, params.mlp, case.sequence
    block = 4 * hidden**2 + 3 * hidden * mlp
    depth = params.double_blocks + params.single_blocks
    spared = n - case.tokens
    return Work(
        blocks=2 * n * block * depth - 2 * spared * (block - 2 * hidden**2),
        ends=2 * (TEXT * params.context_width + (n - TEXT + case.tokens) * params.in_channels) * hidden,
        attention=4 * n * n * hidden * depth - 4 * spared * n * hidden,
    )


# --- the arms ---


class Inputs:
    """What a picture of `case` is drawn from; of order one, as the real ones are."""

    def __init__(self, params: TransformerParams, case: Case, device: torch.device, dtype: torch.dtype) -> None:
        def made(*shape: int, seed: int) -> Tensor:
            return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))

        side = case.latent
        self.noise = initial_noise([0], case.side, case.side, params.in_channels)
        self.references = [
            made(1, params.in_channels, side, side, seed=10 + number) for number in range(case.references)
        ]
        self.ctx = made(1, TEXT, params.context_width, seed=1).to(device, dtype)
        self.x = torch.cat([to_tokens(latent) for latent in (self.noise, *self.references)], 1).to(device, dtype)
        # 1000 t is exact in bfloat16: diffusers rounds it to that, which would be all that one sees of its error.
        self.t = torch.tensor([0.5], device=device)
        self.guidance = torch.tensor([4.0], device=device) if params.guidance_embedding else None
        self.ids = sequence_position_ids(TEXT, side, side, self.references).to(device)


Velocity = Callable[[Inputs, Case], Tensor]  # [1, tokens, 128]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to run the transformer.

    picture: the last latents [1, 128, h, w], all steps made. products: which of the ceilings bounds its blocks' linear
    layers. compiled: whether its first run takes minutes, with every size anew. longest: tokens of a sequence above
    which it is no other way than one that is there already.
    """

    velocity: Velocity
    picture: Velocity
    products: str = LINEAR
    compiled: bool = False
    longest: float = math.inf


def our_ways(model: Transformer, compiler: Compiler | None = None) -> dict[str, Way]:
    """As it is written; on a GPU of NVIDIA's also replayed. compiler: has its blocks compiled, too, once for all
    sizes."""
    models = {OURS: model}
    if compiler:
        models[f"{OURS}, blocks compiled"] = _compiled(model, compiler)
    if model.device.type == "cuda":
        models[REPLAYED] = replaying(another(model))
        if compiler:
            models[f"{REPLAYED}, blocks compiled"] = replaying(_compiled(model, compiler))
    return {
        name: ours(each, longest=MAX_GRAPH_TOKENS if name.startswith(REPLAYED) else math.inf)
        for name, each in models.items()
    }


def held_way(model: Transformer, how: str, compiler: Compiler | None = None) -> dict[str, Way]:
    """The way with the weights of `model` held as `how`, one of `HOLDINGS`. compiler: as for `our_ways`."""
    products = LINEAR
    if how != "bfloat16" and has_8bit_matmul(model.device, how):  # type: ignore[arg-type]
        products = FP8 if how == "fp8" else INT8
    small = held(model, how, _computing(model))
    name = f"{OURS}, held in {how}"
    ways = {name: ours(small, products=products)}
    return ways | {f"{name}, compiled": ours(_compiled(small, compiler), products=products)} if compiler else ways


def _compiled(model: Transformer, compiler: Compiler) -> Transformer:
    """Another over the very weights of `model`, whose blocks run compiled."""
    other = another(model)
    compiler.compile(compiler.make_job(other, CompileKey()))
    if not compiler.attach(other, CompileKey()):
        raise RuntimeError("the blocks were compiled and are not used")
    return other


def another(model: Transformer) -> Transformer:
    """Another over the very weights of `model`."""
    other = clone_sharing_weights(model)
    assert isinstance(other, Transformer)
    return other


def replaying(model: ModelT, replays: GraphRunner | None = None) -> ModelT:
    """`model`, whose runs are recorded as CUDA graphs when they come again: do not change it any more."""
    device = next(model.parameters()).device
    (replays or GraphRunner(lambda: CudaGraphCapture(device))).attach(model)
    return model


def their_ways(model: Transformer, *, compiled: bool) -> dict[str, Way]:
    """diffusers over the weights of `model`; none where it is not installed. compiled: with its blocks compiled, and
    compiled as a whole, too; each for every size anew, which is slow to begin and quickest to run."""
    if not installed("diffusers"):
        return {}
    ways = {THEIRS: theirs(sharing(model))}
    if compiled:
        regional = sharing(model)
        regional.compile_repeated_blocks(fullgraph=True, dynamic=False)
        ways[REGIONAL] = theirs(regional, compiled=True)
        ways[WHOLE] = theirs(torch.compile(sharing(model), dynamic=False), compiled=True)
    return ways


def ours(model: Transformer, *, products: str = LINEAR, compiled: bool = False, longest: float = math.inf) -> Way:
    rope_of: dict[Case, Any] = {}

    def velocity(given: Inputs, case: Case) -> Tensor:
        if case not in rope_of:  # a loop makes it once
            rope_of[case] = model.rope(given.ids)
        x, ctx = given.x.to(model.dtype), given.ctx.to(model.dtype)
        with torch.inference_mode():
            return model(x, ctx, given.t, rope_of[case], given.guidance, outputs=case.tokens)

    def picture(given: Inputs, case: Case) -> Tensor:
        """As the studio makes it."""
        guiding = "embedded" if model.params.guidance_embedding else "none"
        *_, last = denoise(
            model,
            given.noise,
            given.ctx,
            steps=STEPS,
            guidance=4.0,
            guidance_mode=guiding,  # type: ignore[arg-type]
            references=given.references,
        )
        return last.latents

    return Way(velocity=velocity, picture=picture, products=products, compiled=compiled, longest=longest)


def theirs(model: Any, *, compiled: bool = False) -> Way:
    dtype = next(iter(model.parameters())).dtype

    def velocity(given: Inputs, case: Case) -> Tensor:
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

    def picture(given: Inputs, case: Case) -> Tensor:
        """As many evaluations and Euler steps, without all else that its pipeline does."""
        x = given.x[:, : case.tokens].float()
        rest = given.x[:, case.tokens :]
        step = copy.copy(given)
        for t, following in pairwise(timestep_schedule(case.tokens, STEPS)):
            step.x = torch.cat((x.to(rest.dtype), rest), 1)
            step.t = torch.full_like(given.t, t)
            x = x + (following - t) * velocity(step, case).float()
        return from_tokens(x, case.latent, case.latent)

    return Way(velocity=velocity, picture=picture, compiled=compiled)


def held(model: Transformer, how: str, dtype: torch.dtype) -> Transformer:
    """Another with the blocks' weights of `model` in one of `HOLDINGS`, "bfloat16" being the very same memory. It
    computes in `dtype`."""
    with torch.device("meta"):
        other = Transformer(model.params)
    state = {name: value.to(dtype) for name, value in model.state_dict().items() if "blocks." not in name}
    for name, layer in list(model.named_modules()):
        if "blocks." not in name:
            continue
        if isinstance(layer, nn.Linear):
            matrix = BFloat16Matrix(layer.weight) if how == "bfloat16" else quantize(layer.weight, how)  # type: ignore[arg-type]
            other.set_submodule(name, small := QuantizedLinear(matrix))
            small.allow_int8_activations = True
            state |= {f"{name}.{key}": value for key, value in other.get_submodule(name).state_dict().items()}
        else:
            own = dict(layer.named_parameters(name, recurse=False))
            state |= {key: value.to(dtype) for key, value in own.items()}
    other.load_state_dict(state, assign=True)
    return other.eval().requires_grad_(False)


def _computing(model: Transformer) -> torch.dtype:
    """What held weights are computed in: float32 on a CPU, elsewhere as `model` computes."""
    return torch.float32 if model.device.type == "cpu" else model.dtype


def made(params: TransformerParams, device: torch.device, dtype: torch.dtype) -> Transformer:
    """A transformer with random weights, every layer of which counts."""
    with torch.device("meta"):
        model = Transformer(params)
    fill(model, seed=0, device=device, dtype=dtype)
    return model.eval()


def weights(params: TransformerParams) -> int:
    """How many there are."""
    return sum(math.prod(shape) for shape in flow_shapes(params).values())


# --- measuring ---


def time_case(
    ways: Mapping[str, Way],
    params: TransformerParams,
    case: Case,
    rates: Mapping[str, float],
    *,
    device: torch.device,
    dtype: torch.dtype,
    rounds: int,
    warmups: int,
    limit: float | None = None,
    pictures: bool = True,
) -> dict[str, Any]:
    """Seconds of every way, for one evaluation and for a whole picture, and what they are to diffusers and the floor.

    limit: see `time_on`; of both. A picture is timed half as often as an evaluation, and not at all where even the
    fewest runs would take longer than the limit.
    """
    ways = ways_for(ways, case)
    given = Inputs(params, case, device, dtype)
    whats = {EVALUATION: (1, rounds, warmups), PICTURE: (STEPS, max(1, rounds // 2), 1)}
    timed: dict[str, Any] = {}
    for what, (evaluations, times, before) in whats.items():
        if what == PICTURE and not (pictures and _fits(timed[EVALUATION], limit)):
            continue
        works = {name: _bound(way, what, given, case) for name, way in ways.items()}
        arms = time_on(device, works, rounds=times, warmups=before, limit=limit)
        for name, figures in arms.items():
            if THEIRS in arms:
                figures["times diffusers"] = arms[THEIRS]["median"] / figures["median"]
            floor = evaluations * work(params, case).floor(rates, ways[name].products)
            figures["times the floor"] = figures["median"] / floor
        timed[what] = arms
    return {"floor of an evaluation": work(params, case).floor(rates), "seconds": timed}


def ways_for(ways: Mapping[str, Way], case: Case) -> dict[str, Way]:
    """Those that are a way of their own for `case`."""
    return {name: way for name, way in ways.items() if case.sequence <= way.longest}


def _fits(evaluations: Mapping[str, Mapping[str, float]], limit: float | None) -> bool:
    """Whether pictures, of which evaluations say how long they take, can be timed within `limit`."""
    round_of = STEPS * sum(figures["median"] for figures in evaluations.values())
    return limit is None or FEWEST * round_of <= limit


def _bound(way: Way, what: str, given: Inputs, case: Case) -> Callable[[], Tensor]:
    run = way.velocity if what == EVALUATION else way.picture
    return lambda: run(given, case)


def errors(
    ways: Mapping[str, Way], model: Transformer, case: Case, *, pictures: bool = False
) -> dict[str, dict[str, float]]:
    """The relative L2 error of each way's velocity, and of the last latents, against the same weights in float32."""
    given = Inputs(model.params, case, model.device, model.dtype)
    # Held as they are and restored layer by layer: the largest model in float32 would not fit beside itself.
    exact = ours(held(model, "bfloat16", torch.float32))
    found: dict[str, dict[str, float]] = {}
    for what in (EVALUATION, PICTURE) if pictures else (EVALUATION,):
        reference = _bound(exact, what, given, case)().double()
        found[what] = {}
        for name, way in ways_for(ways, case).items():
            value = _bound(way, what, given, case)().double()
            found[what][name] = float((value - reference).norm() / reference.norm())
    return found


def kernels(
    ways: Mapping[str, Way], params: TransformerParams, case: Case, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Seconds that each way's longest kernels take in one evaluation."""
    given = Inputs(params, case, device, dtype)
    return {name: longest_kernels(_bound(way, EVALUATION, given, case)) for name, way in ways_for(ways, case).items()}
