"""Prompt embeddings against what diffusers' pipelines compute."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.text.encoder import TextEncoder, load_text_encoder, open_text_encoder
from flux2_studio.engine.weights.quantize import EightBitKind, QuantizedLinear
from tests import oracle, tiny
from tests.tiny import Text, Toys

CPU = torch.device("cpu")
LONG = "a red house by the river, " * 120
PROMPTS = ("a photo of a cat", "", "日本語 ünïcode 🦊 \u202eright to left\n\ttabs", "  two   spaces ", LONG)


def qwen_embeddings(text: Text, prompts: Sequence[str]) -> Tensor:
    from diffusers import Flux2KleinPipeline

    with torch.no_grad():
        return Flux2KleinPipeline._get_qwen3_prompt_embeds(text.model, text.tokenizer, list(prompts))


def mistral_embeddings(text: Text, prompts: Sequence[str]) -> Tensor:
    from diffusers import Flux2Pipeline

    tokenizer = oracle.mistral_tokenizer(text)
    with torch.no_grad():
        return Flux2Pipeline._get_mistral_3_small_prompt_embeds(text.model, tokenizer, list(prompts))


def load(text: Text, *, dtype: torch.dtype = torch.float32) -> TextEncoder:
    recipe = DEV.recipe if text.model.config.model_type == "mistral3" else KLEIN_4B.recipe
    return load_text_encoder(text.folder, text.folder, recipe, device=CPU, dtype=dtype)


@pytest.mark.parametrize("name", ["qwen", "wide_qwen"])
def test_qwen3_equals_diffusers(toys: Toys, name: str) -> None:
    text: Text = getattr(toys, name)
    encoded = load(text).encode(PROMPTS)
    expected = qwen_embeddings(text, PROMPTS)
    assert encoded.context.shape == (len(PROMPTS), 512, 3 * text.model.config.hidden_size)
    for ours, theirs in zip(encoded.context, expected, strict=True):
        assert oracle.relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("name", ["mistral", "new_mistral"])
def test_mistral3_equals_diffusers_in_both_key_layouts(toys: Toys, name: str) -> None:
    text: Text = getattr(toys, name)
    prompts = (*PROMPTS, "a cat [IMG] and a [IMG]dog")
    encoded = load(text).encode(prompts)
    expected = mistral_embeddings(text, prompts)
    assert encoded.context.shape == (len(prompts), 512, 3 * text.model.config.text_config.hidden_size)
    for ours, theirs in zip(encoded.context, expected, strict=True):
        assert oracle.relative_error(ours, theirs) <= 1e-5


def test_no_special_token_is_put_together_from_what_others_leave(toys: Toys) -> None:
    nested, plain = load(toys.mistral).encode(["a cat [IM[IMG]G]and a dog", "a cat and a dog"]).context
    assert torch.equal(nested, plain)


def test_the_two_key_layouts_really_differ(toys: Toys) -> None:
    new = load_file(toys.new_mistral.folder / "model.safetensors").keys()
    old = {key for file in toys.mistral.folder.glob("*.safetensors") for key in load_file(file)}
    assert "model.language_model.layers.0.mlp.up_proj.weight" in new
    assert "language_model.model.layers.0.mlp.up_proj.weight" in old
    assert not new & old


def test_the_number_of_cut_tokens_is_told(toys: Toys) -> None:
    for text, recipe in ((toys.qwen, KLEIN_4B.recipe), (toys.mistral, DEV.recipe)):
        tokenizer = text.tokenizer
        if recipe.system_prompt is None:
            start, end = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
        else:
            start, end = f"<s>[SYSTEM_PROMPT]{recipe.system_prompt}[/SYSTEM_PROMPT][INST]", "[/INST]"
        whole = tokenizer(start + LONG + end, add_special_tokens=False)["input_ids"]
        assert len(whole) > 512
        ending = tokenizer(end, add_special_tokens=False)["input_ids"]
        encoder = load(text)
        # the template's ending is cut off with the rest, but was not the user's to lose
        assert encoder.encode(["a cat", LONG, ""]).truncated_tokens == (0, len(whole) - len(ending) - 512, 0)
        room = 512 - len(tokenizer(start, add_special_tokens=False)["input_ids"])
        assert encoder.encode(["1" * room]).truncated_tokens == (0,), "the prompt fits, only the ending does not"
        assert encoder.encode(["1" * (room + 1)]).truncated_tokens == (1,)


def test_a_batch_gives_each_prompt_what_it_gets_alone(toys: Toys) -> None:
    for text in (toys.qwen, toys.mistral):
        encoder = load(text)
        prompts = ("a photo of a cat", "", "日本語")
        batch = encoder.encode(prompts).context
        for i, prompt in enumerate(prompts):
            assert oracle.relative_error(batch[i], encoder.encode([prompt]).context[0]) <= 1e-5


def test_padded_rows_take_part(toys: Toys) -> None:
    """They depend on the prompt with Qwen3, and are computed, not left at zero."""
    context = load(toys.qwen).encode(["a cat", "a dog"]).context
    assert oracle.relative_error(context[0, -1], context[1, -1]) > 1e-3
    assert context.norm(dim=-1).min() > 0.1


def test_the_width_is_known_without_loading(toys: Toys) -> None:
    assert open_text_encoder(toys.qwen.folder, toys.qwen.folder, KLEIN_4B.recipe).width == 3 * 32
    assert open_text_encoder(toys.wide_qwen.folder, toys.wide_qwen.folder, KLEIN_4B.recipe).width == 3 * 48
    assert open_text_encoder(toys.mistral.folder, toys.mistral.folder, DEV.recipe).width == 3 * 40


def test_layers_past_the_last_tap_need_not_exist(toys: Toys, tmp_path: Path) -> None:
    """A cut file gives the same: the layers, final norm and head that conditioning does not read are never used."""
    state = load_file(toys.qwen.folder / "model.safetensors")
    beyond = [key for key in state if key.startswith(("model.layers.27.", "model.layers.28.", "model.norm."))]
    assert len(beyond) > 20
    tiny.save_state({key: state[key] for key in state.keys() - set(beyond)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((toys.qwen.folder / "config.json").read_bytes())
    cut = load_text_encoder(tmp_path, toys.qwen.folder, KLEIN_4B.recipe, device=CPU, dtype=torch.float32)
    assert torch.equal(cut.encode(["a cat"]).context, load(toys.qwen).encode(["a cat"]).context)


@pytest.mark.parametrize("name", ["qwen", "new_mistral"])
def test_bfloat16_errs_no_more_than_twice_as_much_as_diffusers(toys: Toys, name: str) -> None:
    text: Text = getattr(toys, name)
    embeddings = qwen_embeddings if name == "qwen" else mistral_embeddings
    prompts = PROMPTS[:1]
    exact = embeddings(text, prompts)
    half = type(text.model).from_pretrained(text.folder, dtype=torch.bfloat16)
    bound = 2 * oracle.relative_error(embeddings(Text(model=half, folder=text.folder), prompts), exact)
    ours = load(text, dtype=torch.bfloat16).encode(prompts).context
    assert 0 < oracle.relative_error(ours, exact) <= bound


@pytest.mark.parametrize(("to", "bound"), [("fp8", 0.15), ("int8", 0.05)])
@pytest.mark.parametrize("name", ["qwen", "new_mistral"])
def test_quantised_on_loading(toys: Toys, name: str, to: EightBitKind, bound: float) -> None:
    """The layers' matrices take a byte a value and four a row; the context stays near."""
    text: Text = getattr(toys, name)
    recipe = DEV.recipe if name == "new_mistral" else KLEIN_4B.recipe
    opened = open_text_encoder(text.folder, text.folder, recipe)
    encoder = opened.load(device=CPU, dtype=torch.float32, storage=to)
    exact = load(text)
    small = [module for module in encoder.text_decoder.modules() if isinstance(module, QuantizedLinear)]
    assert len(small) == 7 * recipe.layer_count
    held = sum(tensor.nbytes for module in small for tensor in module.buffers())
    assert held == sum(module.out_features * (module.in_features + 4) for module in small)
    ours, theirs = encoder.encode(PROMPTS[:1]).context, exact.encode(PROMPTS[:1]).context
    assert bound / 5 < oracle.relative_error(ours, theirs) < bound
