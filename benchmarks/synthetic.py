"""Checkpoints of any size with random weights, in the published layouts, for benchmarks: written tensor by tensor.

    flux-2-NAME.safetensors                   the transformer, bfloat16, in Black Forest Labs' names
    text_encoder/, tokenizer/                 Qwen3 as transformers saves it, all of its layers, LM head if untied
    ae.safetensors                            the autoencoder, float32, in Black Forest Labs' names
    transformer/                              the same transformer as diffusers lays it out, where that is asked for

Weights are scaled so that every layer counts: values stay of order one from layer to layer, and gates have a standard
deviation of about 0.6. At a framework's own initialisation blocks would barely contribute. The tokenizer is nano's.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.params import AutoencoderParams, TransformerParams
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.engine.weights.layouts import TensorSource, transformer_plan
from flux2_studio.settings import ASSETS

CHUNK = 2**24  # values made at a time
TOKENIZER = ASSETS / "nano" / "text_encoder"
TEXT_FILE, DIFFUSERS_FILE = "model.safetensors", "diffusion_pytorch_model.safetensors"
TYPES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.int64: "I64"}
# silu halves what goes through it: these two bring the time's embedding back to order one, on which all gates hang.
GAINS = {"time_in.in_layer.weight": 2**0.5, "time_in.out_layer.weight": 1.68}


@dataclass(frozen=True, kw_only=True)
class TextSize:
    """Sizes of a Qwen3 text encoder."""

    width: int
    mlp: int
    heads: int
    key_heads: int
    head_width: int
    layers: int = 36
    vocabulary: int = 151_936
    tied: bool = True  # whether the LM head is the embedding, and so has no tensor of its own


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """Sizes of a transformer that reads a text encoder of `text` sizes at three depths."""

    double_blocks: int
    single_blocks: int
    heads: int
    text: TextSize
    head_width: int = 128

    @property
    def params(self) -> TransformerParams:
        hidden = self.heads * self.head_width
        return TransformerParams(
            in_channels=128,
            context_width=3 * self.text.width,
            hidden=hidden,
            head_width=self.head_width,
            mlp=3 * hidden,
            double_blocks=self.double_blocks,
            single_blocks=self.single_blocks,
            guidance_embedding=False,
        )


@dataclass(frozen=True, kw_only=True)
class Written:
    """One checkpoint on disk, under the name of one that the studio knows.

    text: a folder. diffusers: the transformer's folder in diffusers' layout. flow_bytes: of the transformer's weights.
    """

    checkpoint: Checkpoint
    flow: Path
    text: Path
    diffusers: Path | None
    flow_bytes: int

    @property
    def text_file(self) -> Path:
        return self.text / TEXT_FILE

    @property
    def diffusers_file(self) -> Path:
        assert self.diffusers is not None
        return self.diffusers / DIFFUSERS_FILE


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: what its header says, and its values in pieces, front to back."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    values: Callable[[], Iterable[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_checkpoint(
    folder: Path, checkpoint: Checkpoint, size: FlowSize, *, seed: int, baseline: bool, device: torch.device
) -> Written:
    """`checkpoint`'s transformer and text encoder at `size`, below `folder`. baseline: for diffusers, too, which must
    be installed then. device: where values are made; nothing of them stays there."""
    flow = folder / f"flux-2-{checkpoint.name}.safetensors"
    text = folder / "text_encoder"
    shapes = flow_shapes(size.params)
    write(flow, (_random(name, torch.bfloat16, shape, seed, device) for name, shape in shapes.items()))
    _write_text(text, size.text, seed, device)
    # In a folder of its own beside the weights, as the published repositories have it.
    shutil.copytree(TOKENIZER, folder / "tokenizer", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    return Written(
        checkpoint=checkpoint,
        flow=flow,
        text=text,
        diffusers=_write_diffusers(folder / "transformer", flow, size.params) if baseline else None,
        flow_bytes=sum(math.prod(shape) for shape in shapes.values()) * torch.bfloat16.itemsize,
    )


def write_autoencoder(path: Path, params: AutoencoderParams, *, seed: int, device: torch.device) -> Path:
    with torch.device("meta"):
        shapes = shapes_of(Autoencoder(params))
    entries = [_random(name, torch.float32, shape, seed, device) for name, shape in shapes.items()]
    counter = Entry("bn.num_batches_tracked", torch.int64, (), lambda: [torch.zeros((), dtype=torch.int64)])
    write(path, [*entries, counter])
    return path


def write(path: Path, entries: Iterable[Entry]) -> None:
    """A safetensors file of `entries`, of which one piece is in memory at a time, and on the disk when this returns."""
    entries = list(entries)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        header[entry.name] = {
            "dtype": TYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [start, start + entry.size],
        }
        start += entry.size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            for piece in entry.values():
                file.write(piece.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def disk_bytes(size: FlowSize, *, baseline: bool) -> int:
    """What `write_checkpoint` will put on the disk, headers aside."""
    flow, text = (
        sum(math.prod(shape) for shape in shapes.values())
        for shapes in (flow_shapes(size.params), _text_shapes(size.text, qwen3_config(size.text)))
    )
    return (flow * (2 if baseline else 1) + text) * torch.bfloat16.itemsize


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def fill(module: torch.nn.Module, *, seed: int, device: torch.device, dtype: torch.dtype) -> None:
    """Give `module`, which is on meta, the values on `device` that a file of it would have."""
    state = {}
    for name, shape in shapes_of(module).items():
        pieces = list(_random(name, dtype, shape, seed, device).values())
        state[name] = (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).reshape(shape)
    module.load_state_dict(state, assign=True)
    module.requires_grad_(False)


def baseline_transformer(params: TransformerParams) -> Any:
    """diffusers' transformer of the same sizes, on meta. diffusers must be installed."""
    diffusers = importlib.import_module("diffusers")  # not one of ours
    with torch.device("meta"):
        return diffusers.Flux2Transformer2DModel(
            num_layers=params.double_blocks,
            num_single_layers=params.single_blocks,
            attention_head_dim=params.head_width,
            num_attention_heads=params.heads,
            joint_attention_dim=params.context_width,
            axes_dims_rope=(params.head_width // 4,) * 4,
            guidance_embeds=params.guidance_embedding,
        )


def sharing(model: Transformer) -> Any:
    """diffusers' transformer with the very weights of `model`, in the same memory but for the last layer's."""
    theirs = baseline_transformer(model.params)
    shapes = shapes_of(theirs)
    ours = model.state_dict()
    state: dict[str, Tensor] = {}
    for target, source in transformer_plan(shapes).items():
        tensor = torch.cat(ours[target].chunk(2)[::-1]) if source.swap_halves else ours[target]
        rows = [shapes[name][0] for name in source.names]
        state |= dict(zip(source.names, tensor.split(rows), strict=True))
    theirs.load_state_dict(state, assign=True)
    return theirs.requires_grad_(False).eval()


def _random(name: str, dtype: torch.dtype, shape: tuple[int, ...], seed: int, device: torch.device) -> Entry:
    def values() -> Iterator[Tensor]:
        generator = torch.Generator(device).manual_seed(seed + zlib.crc32(name.encode()))
        mean, spread = _scale(name, shape)
        for start in range(0, math.prod(shape), CHUNK):
            count = min(CHUNK, math.prod(shape) - start)
            piece = torch.randn(count, generator=generator, device=device) * spread + mean
            # a variance has a sign
            yield (piece.abs() if name.endswith("running_var") else piece).to(dtype)

    return Entry(name, dtype, shape, values)


def _scale(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation of a tensor's values."""
    if name.endswith("embed_tokens.weight"):
        return 0.0, 1.0
    if len(shape) > 1:
        return 0.0, GAINS.get(name, 1.0) / math.prod(shape[1:]) ** 0.5
    if name.endswith((".weight", ".scale", "running_var")):  # of norms
        return 1.0, 0.2
    return 0.0, 0.1


def flow_shapes(params: TransformerParams) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return shapes_of(Transformer(params))


def qwen3_config(size: TextSize) -> Any:
    """transformers' config of a Qwen3 of `size`."""
    from transformers import Qwen3Config  # takes seconds

    return Qwen3Config(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        head_dim=size.head_width,
        max_position_embeddings=40_960,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=size.tied,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )


def _text_shapes(size: TextSize, config: Any) -> dict[str, tuple[int, ...]]:
    from transformers import Qwen3ForCausalLM

    with torch.device("meta"):
        shapes = shapes_of(Qwen3ForCausalLM(config))
    if size.tied:
        del shapes["lm_head.weight"]
    return shapes


def _write_text(folder: Path, size: TextSize, seed: int, device: torch.device) -> None:
    config = qwen3_config(size)
    shapes = _text_shapes(size, config)
    entries = (_random(name, torch.bfloat16, shape, seed, device) for name, shape in shapes.items())
    write(folder / TEXT_FILE, entries)
    config.save_pretrained(folder)


def _write_diffusers(folder: Path, flow: Path, params: TransformerParams) -> Path:
    """The transformer in file `flow` once more, under diffusers' names: the same values, matrices cut and swapped."""
    model = baseline_transformer(params)
    model.save_config(folder)
    shapes = shapes_of(model)
    with safe_open(flow, framework="pt") as opened:
        write(folder / DIFFUSERS_FILE, _translated(shapes, opened))
    return folder


def _translated(shapes: Mapping[str, tuple[int, ...]], opened: Any) -> Iterator[Entry]:
    """Entries under diffusers' names of `shapes`; the loader's own plan, read backwards, says which rows they are."""

    def rows(target: str, source: TensorSource, start: int, stop: int) -> Callable[[], list[Tensor]]:
        def values() -> list[Tensor]:
            if not source.swap_halves:
                return [opened.get_slice(target)[start:stop]]
            return list(opened.get_tensor(target).chunk(2)[::-1])

        return values

    for target, source in transformer_plan(shapes).items():
        start = 0
        for name in source.names:
            yield Entry(name, torch.bfloat16, shapes[name], rows(target, source, start, start + shapes[name][0]))
            start += shapes[name][0]
