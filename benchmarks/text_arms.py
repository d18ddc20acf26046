"""The text encoder's arms: ours, cut after the last layer that is read, and transformers' Qwen3 as diffusers runs it.

diffusers asks the causal language model for all of its hidden states: every layer is computed, and the head too, for
every token. Both sides have the same weights in the same memory.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import ATTENTION, COPY, LINEAR
from benchmarks.measuring import installed, time_on
from benchmarks.synthetic import TextSize, fill, qwen3_config
from benchmarks.transformer_arms import OURS, REPLAYED, TEXT, THEIRS, replaying
from flux2_studio.checkpoints import KLEIN_4B
from flux2_studio.engine.text.decoder import TextDecoder, TextDecoderParams, causal_attention_mask, text_decoder_params

WORDS = 64  # tokens of a prompt that are no padding
ENCODING = "encoding"

Encode = Callable[["Prompt"], Tensor]  # [1, tokens, taps * width]


@dataclass(frozen=True, kw_only=True)
class Depth:
    """Which layers are read, each by its number, and how many there are."""

    taps: tuple[int, ...]
    layers: int

    @property
    def read(self) -> int:
        return max(self.taps)


def depth(size: TextSize, most: int | None = None) -> Depth:
    """As klein reads it. most: no more layers than that are read, for a slow machine; as many of all are."""
    taps, layers = KLEIN_4B.recipe.hidden_layers, size.layers
    if most is not None and most < max(taps):
        # No tap is the last layer: transformers norms that.
        layers = most + max(1, most * (layers - max(taps)) // max(taps))
        taps = tuple(max(1, most * tap // max(taps)) for tap in taps)
    return Depth(taps=taps, layers=layers)


class Prompt:
    """Token ids [1, 512], padded on the right, and their mask."""

    def __init__(self, vocabulary: int, device: torch.device) -> None:
        ids = torch.randint(vocabulary, (1, TEXT), generator=torch.Generator().manual_seed(3))
        self.ids = ids.to(device)
        self.mask = (torch.arange(TEXT) < WORDS)[None].long().to(device)


# --- the floor ---


def work(params: TextDecoderParams, tokens: int = TEXT) -> tuple[float, float, float]:
    """Operations in linear layers, those in attention of each token to those before it, and bytes of the layers'
    weights in bfloat16, which are read once."""
    p = params
    q, kv = p.heads * p.head_width, p.kv_heads * p.head_width
    weights = p.layers * (2 * p.hidden * q + 2 * p.hidden * kv + 3 * p.hidden * p.mlp)
    return 2 * tokens * weights, p.layers * 2 * tokens**2 * q, 2 * weights


def floor(params: TextDecoderParams, rates: Mapping[str, float]) -> float:
    linear, attention, size = work(params)
    return max(linear / rates[LINEAR] + attention / rates[ATTENTION], size / rates[COPY])


# --- the arms ---


def made(size: TextSize, at: Depth, device: torch.device, dtype: torch.dtype) -> tuple[TextDecoder, Any]:
    """Ours and transformers' over the same random weights."""
    qwen3 = importlib.import_module("transformers.models.qwen3.modeling_qwen3")  # takes seconds
    config = qwen3_config(replace(size, layers=at.layers))
    with torch.device("meta"):
        model = qwen3.Qwen3ForCausalLM(config)
        tower = TextDecoder(text_decoder_params(config.to_dict(), at.read, TEXT))
    fill(model, seed=1, device=device, dtype=dtype)
    if size.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    # Its frequencies are in no file: it computes them when it is made.
    model.model.rotary_emb = qwen3.Qwen3RotaryEmbedding(config=config).to(device)
    names = tower.state_dict().keys()
    state = {name: tensor for name, tensor in model.model.state_dict().items() if name in names}
    tower.load_state_dict(state, assign=True)
    return tower.eval().requires_grad_(False), model.eval()


def our_ways(tower: TextDecoder, taps: tuple[int, ...]) -> dict[str, Encode]:
    """As it is written; on a GPU of NVIDIA's also recorded as a CUDA graph."""
    ways = {OURS: ours(tower, taps)}
    if tower.embed_tokens.weight.device.type != "cuda":
        return ways
    # Another over the same modules, for what is attached to one is not to be the other's.
    return ways | {REPLAYED: ours(replaying(tower.truncated_to(len(tower.layers))), taps)}


def their_ways(model: Any, taps: tuple[int, ...]) -> dict[str, Encode]:
    """None where diffusers is not installed, whose way this is."""
    return {THEIRS: theirs(model, taps)} if installed("diffusers") else {}


def ours(tower: TextDecoder, taps: tuple[int, ...]) -> Encode:
    @torch.inference_mode()
    def encode(prompt: Prompt) -> Tensor:
        context: Tensor = tower(prompt.ids, causal_attention_mask(prompt.mask), taps)
        return context

    return encode


def theirs(model: Any, taps: tuple[int, ...]) -> Encode:
    """What `Flux2KleinPipeline._get_qwen3_prompt_embeds` does after its tokenizer."""

    @torch.inference_mode()
    def encode(prompt: Prompt) -> Tensor:
        states = model(
            input_ids=prompt.ids, attention_mask=prompt.mask, output_hidden_states=True, use_cache=False
        ).hidden_states
        stacked = torch.stack([states[tap] for tap in taps], 1)
        batch, depths, tokens, width = stacked.shape
        return stacked.permute(0, 2, 1, 3).reshape(batch, tokens, depths * width)

    return encode


# --- measuring ---


def time_text(
    ways: Mapping[str, Encode],
    params: TextDecoderParams,
    rates: Mapping[str, float],
    *,
    device: torch.device,
    rounds: int,
    warmups: int,
    limit: float | None = None,
) -> dict[str, Any]:
    """Seconds of every way for one prompt, and what they are to diffusers and the floor."""
    prompt = Prompt(params.vocabulary, device)
    works = {name: _bound(encode, prompt) for name, encode in ways.items()}
    arms = time_on(device, works, rounds=rounds, warmups=warmups, limit=limit)
    least = floor(params, rates)
    for figures in arms.values():
        if THEIRS in arms:
            figures["times diffusers"] = arms[THEIRS]["median"] / figures["median"]
        figures["times the floor"] = figures["median"] / least
    return {"floor": least, "seconds": {ENCODING: arms}}


def _bound(encode: Encode, prompt: Prompt) -> Callable[[], Tensor]:
    return lambda: encode(prompt)


def errors(ways: Mapping[str, Encode], tower: TextDecoder, taps: tuple[int, ...]) -> dict[str, float]:
    """The relative L2 error of each way's context against the same weights in float32."""
    prompt = Prompt(tower.params.vocabulary, tower.embed_tokens.weight.device)
    with torch.device("meta"):
        exact = TextDecoder(tower.params)
    exact.load_state_dict({name: value.float() for name, value in tower.state_dict().items()}, assign=True)
    reference = ours(exact.eval().requires_grad_(False), taps)(prompt).double()
    return {
        name: float((encode(prompt).double() - reference).norm() / reference.norm()) for name, encode in ways.items()
    }
