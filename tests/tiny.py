"""Toy checkpoints in exactly the layouts that are published: small sizes, deterministic random weights.

The models are diffusers' and transformers' own classes, so their folders are official by construction. The single-file
layouts of Black Forest Labs are written by the mappings below, from the key names as published; they know nothing of
the engine's loader, which reads them. Weights are scaled so that activations stay of order one and every
gate, scale, shift and norm leaves a trace in the output: a forgotten or swapped tensor cannot hide.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_studio.settings import Settings

State = dict[str, Tensor]

WORDS = (
    "a the of on in and photo painting drawing cat dog red blue green house tree river mountain sky light shadow "
    "make it night change background to remove add image 1 2 combine style soft sharp large small user assistant system"
)


@dataclass(frozen=True, kw_only=True)
class FlowSize:
    """Sizes of a toy transformer. RoPE takes a quarter of the head for each of its four axes."""

    double_blocks: int
    single_blocks: int
    heads: int
    head_width: int
    context_width: int
    guidance: bool


KLEIN = FlowSize(double_blocks=2, single_blocks=3, heads=4, head_width=32, context_width=3 * 32, guidance=False)
NINE = FlowSize(double_blocks=3, single_blocks=2, heads=3, head_width=64, context_width=3 * 48, guidance=False)
DEV = FlowSize(double_blocks=1, single_blocks=4, heads=6, head_width=16, context_width=3 * 40, guidance=True)


@dataclass(frozen=True, kw_only=True)
class AutoencoderSize:
    """Sizes of a toy autoencoder; channels from full resolution inwards, in multiples of GroupNorm's 32 groups."""

    encoder_channels: tuple[int, ...] = (32, 64, 64, 64)
    decoder_channels: tuple[int, ...] | None = None  # None: as the encoder's
    blocks: int = 1


AUTOENCODER = AutoencoderSize()
DEEP_AUTOENCODER = AutoencoderSize(encoder_channels=(32, 32, 64, 96), blocks=2)
SMALL_DECODER = AutoencoderSize(encoder_channels=(32, 64, 96, 96), decoder_channels=(32, 32, 64, 64))
NO_ENCODER_BLOCKS = AutoencoderSize(encoder_channels=(32, 32, 32, 32), blocks=0)  # the geometry of nano


def randomise(module: nn.Module, seed: int) -> None:
    """Fill every parameter and batch-norm statistic with reproducible values that keep activations of order one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator)

    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim >= 2:
                fan_in = 1 if "embed_tokens" in name else parameter[0].numel()
                parameter.copy_(normal(parameter) / fan_in**0.5)
            elif name.endswith("weight"):  # of a norm
                parameter.copy_(1 + 0.2 * normal(parameter))
            else:
                parameter.copy_(0.1 * normal(parameter))
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_mean is not None and part.running_var is not None:
                part.running_mean.copy_(0.5 * normal(part.running_mean))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))


def save_state(state: Mapping[str, Tensor], path: Path) -> Path:
    """Write `state` as one safetensors file, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous().clone() for name, tensor in state.items()}, path, metadata={"format": "pt"})
    return path


# Transformer


def flow_model(size: FlowSize, seed: int) -> Flux2Transformer2DModel:
    """A toy transformer as diffusers builds it."""
    model = Flux2Transformer2DModel(
        num_layers=size.double_blocks,
        num_single_layers=size.single_blocks,
        attention_head_dim=size.head_width,
        num_attention_heads=size.heads,
        joint_attention_dim=size.context_width,
        axes_dims_rope=(size.head_width // 4,) * 4,
        guidance_embeds=size.guidance,
    )
    randomise(model, seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter.mul_(
                    2.5
                )  # attention that chooses: an even average over all tokens would hide wrong positions
            elif name.endswith(
                ("embedder.weight", "to_q.weight", "to_k.weight", "add_q_proj.weight", "add_k_proj.weight")
            ):
                parameter.mul_(0.03)  # small enough, before a norm, for the norm's epsilon to matter
            elif name.endswith("to_qkv_mlp_proj.weight"):
                parameter[: 2 * model.inner_dim].mul_(0.03)
    return model.eval()


FLOW_NAMES = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_guidance_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_guidance_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_guidance_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_guidance_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "double_stream_modulation_img.linear": "double_stream_modulation_img.lin",
    "double_stream_modulation_txt.linear": "double_stream_modulation_txt.lin",
    "single_stream_modulation.linear": "single_stream_modulation.lin",
    "proj_out": "final_layer.linear",
}
DOUBLE_NAMES = {
    "attn.norm_q.weight": "img_attn.norm.query_norm.scale",
    "attn.norm_k.weight": "img_attn.norm.key_norm.scale",
    "attn.norm_added_q.weight": "txt_attn.norm.query_norm.scale",
    "attn.norm_added_k.weight": "txt_attn.norm.key_norm.scale",
    "attn.to_out.0.weight": "img_attn.proj.weight",
    "attn.to_add_out.weight": "txt_attn.proj.weight",
    "ff.linear_in.weight": "img_mlp.0.weight",
    "ff.linear_out.weight": "img_mlp.2.weight",
    "ff_context.linear_in.weight": "txt_mlp.0.weight",
    "ff_context.linear_out.weight": "txt_mlp.2.weight",
}
SINGLE_NAMES = {
    "attn.to_qkv_mlp_proj.weight": "linear1.weight",
    "attn.to_out.weight": "linear2.weight",
    "attn.norm_q.weight": "norm.query_norm.scale",
    "attn.norm_k.weight": "norm.key_norm.scale",
}


def bfl_flow(model: Flux2Transformer2DModel) -> State:
    """The weights under Black Forest Labs' names: q, k, v in one matrix, the last modulation as (shift, scale)."""
    state = model.state_dict()
    out: State = {}
    for theirs, ours in FLOW_NAMES.items():
        if f"{theirs}.weight" in state:
            out[f"{ours}.weight"] = state.pop(f"{theirs}.weight")
    scale, shift = state.pop("norm_out.linear.weight").chunk(2)
    out["final_layer.adaLN_modulation.1.weight"] = torch.cat([shift, scale])
    for i in range(len(model.transformer_blocks)):
        theirs, ours = f"transformer_blocks.{i}", f"double_blocks.{i}"
        for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
            qkv = [state.pop(f"{theirs}.attn.{name}.weight") for name in names]
            out[f"{ours}.{stream}_attn.qkv.weight"] = torch.cat(qkv)
        for old, new in DOUBLE_NAMES.items():
            out[f"{ours}.{new}"] = state.pop(f"{theirs}.{old}")
    for i in range(len(model.single_transformer_blocks)):
        for old, new in SINGLE_NAMES.items():
            out[f"single_blocks.{i}.{new}"] = state.pop(f"single_transformer_blocks.{i}.{old}")
    assert not state, f"no published name for {sorted(state)}"
    return out


# Autoencoder


def autoencoder_model(size: AutoencoderSize, seed: int) -> AutoencoderKLFlux2:
    """A toy autoencoder as diffusers builds it."""
    model = AutoencoderKLFlux2(
        block_out_channels=size.encoder_channels,
        decoder_block_out_channels=size.decoder_channels,
        layers_per_block=size.blocks,
    )
    randomise(model, seed)
    with torch.no_grad():
        # Most pixels inside -1..1, so that clamping to 8 bits does not hide differences.
        model.decoder.conv_out.weight.mul_(0.4)
    return model.eval()


def bfl_autoencoder(model: AutoencoderKLFlux2) -> State:
    """The model's weights as Black Forest Labs lay them out: attention is made of 1x1 convolutions."""
    state = model.state_dict()
    out = {}
    for theirs, ours in bfl_autoencoder_names(model).items():
        linear = ".attn_1." in ours and state[theirs].ndim == 2
        out[ours] = state[theirs][:, :, None, None] if linear else state[theirs]
    return out


def bfl_autoencoder_names(model: AutoencoderKLFlux2) -> dict[str, str]:
    """Black Forest Labs' name for each of diffusers' names; their up levels are counted from full resolution."""
    levels = len(model.decoder.up_blocks)
    return {name: _bfl_autoencoder_name(name, levels) for name in model.state_dict()}


def _bfl_autoencoder_name(name: str, levels: int) -> str:
    if name.startswith("bn."):
        return name
    if name.startswith("quant_conv."):
        return f"encoder.{name}"
    if name.startswith("post_quant_conv."):
        return f"decoder.{name}"
    side, part, *rest = name.split(".")
    match part, rest:
        case "down_blocks", [i, "resnets", j, *leaf]:
            path = ["down", i, "block", j, *leaf]
        case "down_blocks", [i, "downsamplers", "0", "conv", leaf]:
            path = ["down", i, "downsample", "conv", leaf]
        case "up_blocks", [i, "resnets", j, *leaf]:
            path = ["up", str(levels - 1 - int(i)), "block", j, *leaf]
        case "up_blocks", [i, "upsamplers", "0", "conv", leaf]:
            path = ["up", str(levels - 1 - int(i)), "upsample", "conv", leaf]
        case "mid_block", ["resnets", j, *leaf]:
            path = ["mid", f"block_{int(j) + 1}", *leaf]
        case "mid_block", ["attentions", "0", "group_norm", leaf]:
            path = ["mid", "attn_1", "norm", leaf]
        case "mid_block", ["attentions", "0", "to_out", "0", leaf]:
            path = ["mid", "attn_1", "proj_out", leaf]
        case "mid_block", ["attentions", "0", ("to_q" | "to_k" | "to_v") as projection, leaf]:
            path = ["mid", "attn_1", projection.removeprefix("to_"), leaf]
        case "conv_norm_out", [leaf]:
            path = ["norm_out", leaf]
        case (("conv_in" | "conv_out"), [leaf]):
            path = [part, leaf]
        case _:
            raise AssertionError(f"no published name for {name}")
    return ".".join([side, *path]).replace("conv_shortcut", "nin_shortcut")


# Tiny autoencoder


class Block(nn.Module):
    """TAEF2's residual block, with the group-norm pool in front where `pool`."""

    def __init__(self, width: int, pool: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(3):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.conv = nn.Sequential(*layers[:-1])
        self.pool = (
            nn.Sequential(
                nn.Conv2d(width, 4 * width, 1, bias=False),
                nn.GroupNorm(4, 4 * width),
                nn.ReLU(),
                nn.Conv2d(4 * width, width, 1, bias=False),
            )
            if pool
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is not None:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Softly limits the latent to -3..3."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


def taef2_decoder(latent_channels: int = 32) -> nn.Sequential:
    """TAEF2's decoder as its `.pth` numbers it; latent [B, 32, h, w], BN-normalised, to RGB [B, 3, 8h, 8w] in 0..1."""
    width = 64
    layers: list[nn.Module] = [Clamp(), nn.Conv2d(latent_channels, width, 3, padding=1), nn.ReLU()]
    for level in range(3):
        layers += [Block(width, pool=level == 0) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1, bias=False)]
    layers += [Block(width, pool=False), nn.Conv2d(width, 3, 3, padding=1)]
    return nn.Sequential(*layers)


def taef2_encoder(latent_channels: int = 32) -> nn.Sequential:
    """TAEF2's encoder as its `.pth` numbers it; RGB [B, 3, H, W] in 0..1 to BN-normalised latent [B, 32, H/8, W/8]."""
    width = 64
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), Block(width, pool=False)]
    for level in range(3):
        layers.append(nn.Conv2d(width, width, 3, padding=1, stride=2, bias=False))
        layers += [Block(width, pool=level == 2) for _ in range(3)]
    layers.append(nn.Conv2d(width, latent_channels, 3, padding=1))
    return nn.Sequential(*layers)


def taef2_hub_names(decoder: State, encoder: State) -> State:
    """Both halves as in the hub's taef2.safetensors, where the decoder's numbers do not count the clamp."""
    out = {f"encoder.layers.{name}": tensor for name, tensor in encoder.items()}
    for name, tensor in decoder.items():
        number, rest = name.split(".", 1)
        out[f"decoder.layers.{int(number) - 1}.{rest}"] = tensor
    return out


# Text encoders


QWEN_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
MISTRAL_TEMPLATE = (
    "{%- macro text(content) %}{%- if content is string %}{{- content }}{%- else %}{%- for part in content %}"
    "{{- part.text if part.type == 'text' else '[IMG]' }}{%- endfor %}{%- endif %}{%- endmacro %}"
    "{{- bos_token }}{%- for message in messages %}{%- if message.role == 'system' %}"
    "{{- '[SYSTEM_PROMPT]' + text(message.content) + '[/SYSTEM_PROMPT]' }}{%- elif message.role == 'user' %}"
    "{{- '[INST]' + text(message.content) + '[/INST]' }}{%- else %}{{- text(message.content) + eos_token }}"
    "{%- endif %}{%- endfor %}"
)
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRAL_SPECIAL = (
    *("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]"),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
)
VOCABULARY = 400


def _byte_pairs(special: Iterable[str], vocabulary: int = VOCABULARY) -> Tokenizer:
    """A byte-level BPE tokenizer trained on `WORDS`: it spells out whatever it has not seen, in any script."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS.split() * 2 + [f" {word}" for word in WORDS.split()], trainer)
    return tokenizer


def write_qwen_tokenizer(folder: Path, vocabulary: int = VOCABULARY) -> Path:
    """A tokenizer folder as the klein repositories have it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _byte_pairs(QWEN_SPECIAL, vocabulary)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.model.save(str(folder))
    (folder / "chat_template.jinja").write_text(QWEN_TEMPLATE)
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 131072,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "unk_token": None,
            "add_prefix_space": False,
            "clean_up_tokenization_spaces": False,
            "errors": "replace",
            "split_special_tokens": False,
        },
    )
    return folder


def write_mistral_processor(folder: Path) -> Path:
    """A processor folder (tokenizer, image processor, chat template) as Mistral Small's repository has it: the template
    stands beside the tokenizer, where only the processor looks for it."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=_byte_pairs(MISTRAL_SPECIAL),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "processor_class": "PixtralProcessor"}
    _write_json(folder / "tokenizer_config.json", config)
    _write_json(folder / "chat_template.json", {"chat_template": MISTRAL_TEMPLATE})
    _write_json(
        folder / "processor_config.json",
        {"processor_class": "PixtralProcessor", "image_token": "[IMG]", "patch_size": 16, "spatial_merge_size": 2},
    )
    _write_json(
        folder / "preprocessor_config.json",
        {"image_processor_type": "PixtralImageProcessorFast", "patch_size": 16, "size": {"longest_edge": 64}},
    )
    return folder


def qwen_model(hidden: int, seed: int, layers: int = 29) -> Qwen3ForCausalLM:
    """A toy Qwen3, deep enough for the taps at 9, 18 and 27 to lie inside."""
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=2,
    )
    model = Qwen3ForCausalLM(config)
    randomise(model, seed)
    return model.eval()


def mistral_model(hidden: int, seed: int, layers: int = 32) -> Mistral3ForConditionalGeneration:
    """A toy Mistral 3 with its vision tower, deep enough for the taps at 10, 20 and 30 to lie inside."""
    config = Mistral3Config(
        text_config=MistralConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 1_000_000_000.0},
            sliding_window=None,
        ),
        vision_config=PixtralVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=16,
        ),
        image_token_index=MISTRAL_SPECIAL.index("[IMG]"),
        tie_word_embeddings=False,  # as published
    )
    model = Mistral3ForConditionalGeneration(config)
    randomise(model, seed)
    return model.eval()


def rename_mistral(folder: Path, *, old_style: bool) -> None:
    """Rewrite a saved Mistral 3 folder's keys, in place, as the hub's file has them (`language_model.model.layers...`)
    where `old_style`, else as the class names them today (`model.language_model.layers...`)."""
    old_to_new = {
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
        "vision_tower.": "model.vision_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
    }
    renames = {new: old for old, new in old_to_new.items()} if old_style else old_to_new

    def renamed(name: str) -> str:
        for before, after in renames.items():
            if name.startswith(before):
                return after + name.removeprefix(before)
        return name

    for file in folder.glob("*.safetensors"):
        save_state({renamed(name): tensor for name, tensor in load_file(file).items()}, file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {renamed(name): file for name, file in content["weight_map"].items()}
        _write_json(index, content)


def spell_config_as_published(folder: Path) -> None:
    """Rewrite a saved text encoder's config.json in the spelling of the published ones, made by an older transformers:
    the base of the rotary embedding is a field of its own, and Mistral's says nothing of its head being tied."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    text = config.get("text_config", config)
    if "text_config" in config:
        config.pop("tie_word_embeddings", None)
        text.pop("tie_word_embeddings", None)
    text["rope_theta"] = text.pop("rope_parameters")["rope_theta"]
    text["rope_scaling"] = None
    text.pop("layer_types", None)
    config["torch_dtype"] = config.pop("dtype")
    _write_json(file, config)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1))


# All together


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One toy transformer in every layout."""

    model: Flux2Transformer2DModel
    file: Path  # Black Forest Labs' single file
    folder: Path  # diffusers' folder
    sharded: Path  # the same in several files


@dataclass(frozen=True, kw_only=True)
class Autoencoder:
    """One toy autoencoder in every layout."""

    model: AutoencoderKLFlux2
    file: Path  # Black Forest Labs' single file
    folder: Path  # diffusers' folder

    @property
    def layouts(self) -> Iterator[Path]:
        yield from (self.file, self.folder, self.folder / "diffusion_pytorch_model.safetensors")


@dataclass(frozen=True, kw_only=True)
class Text:
    """One toy text encoder; `folder` holds weights and tokenizer, as a whole repository does."""

    model: Qwen3ForCausalLM | Mistral3ForConditionalGeneration
    folder: Path

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.folder)


class Toys:
    """The toy checkpoints, each written under `root` when first asked for. Do not change their files: copy them."""

    def __init__(self, root: Path) -> None:
        self.root = root

    @cached_property
    def klein(self) -> Flow:
        return self._flow("klein-4b", KLEIN, seed=1)

    @cached_property
    def klein_base(self) -> Flow:
        return self._flow("klein-base-4b", KLEIN, seed=2)

    @cached_property
    def nine(self) -> Flow:
        return self._flow("klein-9b-kv", NINE, seed=3)

    @cached_property
    def dev(self) -> Flow:
        return self._flow("dev", DEV, seed=4)

    @cached_property
    def autoencoder(self) -> Autoencoder:
        return self._autoencoder("autoencoder", AUTOENCODER, seed=11)

    @cached_property
    def deep_autoencoder(self) -> Autoencoder:
        return self._autoencoder("deep-autoencoder", DEEP_AUTOENCODER, seed=12)

    @cached_property
    def small_decoder(self) -> Autoencoder:
        return self._autoencoder("small-decoder", SMALL_DECODER, seed=13)

    @cached_property
    def no_encoder_blocks(self) -> Autoencoder:
        return self._autoencoder("no-encoder-blocks", NO_ENCODER_BLOCKS, seed=14)

    @cached_property
    def taef2(self) -> Path:
        """A tiny autoencoder with random weights, in the hub's spelling."""
        decoder, encoder = taef2_decoder(), taef2_encoder()
        randomise(decoder, 21)
        randomise(encoder, 22)
        state = taef2_hub_names(decoder.state_dict(), encoder.state_dict())
        return save_state(state, self.root / "taef2.safetensors")

    @cached_property
    def qwen(self) -> Text:
        """Qwen3 with its config as published."""
        return self._qwen("qwen3-4b", hidden=32, seed=31, published_config=True)

    @cached_property
    def wide_qwen(self) -> Text:
        """A wider Qwen3, sharded, with its config as transformers writes it today."""
        return self._qwen("qwen3-8b", hidden=48, seed=32, shard="600KB", published_config=False)

    @cached_property
    def mistral(self) -> Text:
        """Mistral with the hub's keys and config, sharded."""
        return self._mistral("mistral", old_style=True, shard="400KB")

    @cached_property
    def new_mistral(self) -> Text:
        """The same Mistral with today's keys and config, in one file."""
        return self._mistral("mistral-new", old_style=False, shard="1GB")

    def settings(self, home: Path, names: Iterable[str], **changes: Any) -> Settings:
        """Settings in float32 on the CPU under which the checkpoints `names` load from toys; the first is the default.

        changes: further fields of `Settings`.
        """
        files = {
            "klein-4b": {
                "KLEIN_4B_MODEL_PATH": lambda: self.klein.file,
                "QWEN3_4B_MODEL_PATH": lambda: self.qwen.folder,
            },
            "klein-base-4b": {
                "KLEIN_4B_BASE_MODEL_PATH": lambda: self.klein_base.file,
                "QWEN3_4B_MODEL_PATH": lambda: self.qwen.folder,
            },
            "klein-9b-kv": {
                "KLEIN_9B_KV_MODEL_PATH": lambda: self.nine.file,
                "QWEN3_8B_MODEL_PATH": lambda: self.wide_qwen.folder,
            },
            "dev": {"FLUX2_MODEL_PATH": lambda: self.dev.file, "MISTRAL_MODEL_PATH": lambda: self.mistral.folder},
        }
        names = tuple(names)
        overrides = {"AE_MODEL_PATH": self.autoencoder.file, "TAEF2_MODEL_PATH": self.taef2}
        for name in names:
            overrides.update({variable: file() for variable, file in files[name].items()})
        fields: dict[str, Any] = {"device": "cpu", "dtype": "float32", "default_checkpoint": names[0], **changes}
        return Settings(home=home, path_overrides=overrides, **fields)

    def _flow(self, name: str, size: FlowSize, seed: int) -> Flow:
        model = flow_model(size, seed)
        root = self.root / name
        model.save_pretrained(root / "transformer")
        model.save_pretrained(root / "sharded", max_shard_size="2MB")
        file = save_state(bfl_flow(model), root / f"flux-2-{name}.safetensors")
        return Flow(model=model, file=file, folder=root / "transformer", sharded=root / "sharded")

    def _autoencoder(self, name: str, size: AutoencoderSize, seed: int) -> Autoencoder:
        model = autoencoder_model(size, seed)
        folder = self.root / name / "vae"
        model.save_pretrained(folder)
        file = save_state(bfl_autoencoder(model), self.root / name / "ae.safetensors")
        return Autoencoder(model=model, file=file, folder=folder)

    def _qwen(self, name: str, hidden: int, seed: int, *, shard: str = "1GB", published_config: bool) -> Text:
        model = qwen_model(hidden, seed)
        folder = write_qwen_tokenizer(self.root / name)
        model.save_pretrained(folder, max_shard_size=shard)
        if published_config:
            spell_config_as_published(folder)
        return Text(model=model, folder=folder)

    def _mistral(self, name: str, *, old_style: bool, shard: str) -> Text:
        model = mistral_model(hidden=40, seed=33)
        folder = write_mistral_processor(self.root / name)
        model.save_pretrained(folder, max_shard_size=shard)
        rename_mistral(folder, old_style=old_style)
        if old_style:
            spell_config_as_published(folder)
        return Text(model=model, folder=folder)


TOY_NAMES = ("klein-4b", "klein-base-4b", "klein-9b-kv", "dev")


def toy_settings(tmp_path: Path, names: Iterable[str] = TOY_NAMES, **changes: Any) -> Settings:
    """Settings under `tmp_path` whose checkpoints `names` are toys; see `Toys.settings`."""
    return Toys(tmp_path / "toys").settings(tmp_path / "home", names, **changes)
