"""Every wrong file is refused in one clear message that names the file, what was expected and what was found."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.text.encoder import load_text_encoder
from flux2_studio.engine.weights.loading import load_autoencoder, load_tiny_decoder, load_transformer, open_transformer
from flux2_studio.engine.weights.quantize import QuantizedLinear
from flux2_studio.errors import WeightsError
from tests import tiny
from tests.tiny import Toys

CPU = torch.device("cpu")


def load_flow(path: Path) -> Any:
    return load_transformer(path, device=CPU, dtype=torch.float32)


def load_vae(path: Path) -> Any:
    return load_autoencoder(path, device=CPU, dtype=torch.float32)


def load_tiny(path: Path) -> Any:
    return load_tiny_decoder(path, device=CPU, dtype=torch.float32)


def load_qwen(folder: Path) -> Any:
    return load_text_encoder(folder, folder, KLEIN_4B.recipe, device=CPU, dtype=torch.float32)


LOADERS = (load_flow, load_vae, load_tiny)


def file_of(toys: Toys, load: Callable[[Path], Any]) -> Path:
    return {load_flow: toys.klein.file, load_vae: toys.autoencoder.file, load_tiny: toys.taef2}[load]


def refusal(load: Callable[[Path], Any], path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path)
    message = str(caught.value)
    assert path.name in message, "the message does not name the file"
    assert len(message) < 600, "too long to be read"
    assert message.rstrip().endswith("."), "not a sentence"
    assert "\n" not in message
    return message


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_file(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    assert "no file" in refusal(load, tmp_path / "nowhere.safetensors").lower()


@pytest.mark.parametrize("load", LOADERS)
def test_an_empty_folder(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    assert ".safetensors" in refusal(load, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 8, 100, 0.3, 0.9, -1], ids=str)
@pytest.mark.parametrize("load", LOADERS)
def test_a_truncated_file(toys: Toys, tmp_path: Path, load: Callable[[Path], Any], kept: float) -> None:
    """kept: bytes, or the fraction of them; -1 lacks only the last byte."""
    data = file_of(toys, load).read_bytes()
    end = int(kept * len(data)) if isinstance(kept, float) else kept
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[:end])
    assert "not a whole safetensors file" in refusal(load, path)


@pytest.mark.parametrize("load", LOADERS)
def test_a_file_with_something_appended(toys: Toys, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    path = tmp_path / "longer.safetensors"
    path.write_bytes(file_of(toys, load).read_bytes() + b"more")
    assert "not a whole safetensors file" in refusal(load, path)


class Bomb:
    """Leaves a trace when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.trace,))


@pytest.mark.parametrize("load", LOADERS)
def test_a_pickle_is_never_opened_as_one(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    for name in ("model.safetensors", "model.pt"):
        path = tmp_path / name
        path.write_bytes(pickle.dumps({"weights": Bomb(tmp_path / "trace")}))
        refusal(load, path)
        torch.save({"img_in.weight": torch.zeros(2, 2)}, path)
        refusal(load, path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("load", LOADERS)
def test_other_formats(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    for content in (
        b"GGUF\x03\x00\x00\x00",
        b"<html>Not found</html>",
        b"version https://git-lfs.github.com/spec/v1\n",
    ):
        path = tmp_path / "weights.safetensors"
        path.write_bytes(content)
        refusal(load, path)


MISSING = {
    load_flow: "double_blocks.1.txt_attn.proj.weight",
    load_vae: "decoder.mid.attn_1.q.bias",
    load_tiny: "decoder.layers.6.weight",
}


@pytest.mark.parametrize("load", LOADERS)
def test_a_missing_tensor(toys: Toys, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    state = load_file(file_of(toys, load))
    del state[MISSING[load]]
    message = refusal(load, tiny.save_state(state, tmp_path / "lacking.safetensors"))
    expected = MISSING[load] if load is not load_tiny else "7.weight"
    assert expected in message


@pytest.mark.parametrize("load", LOADERS)
def test_an_extra_tensor(toys: Toys, tmp_path: Path, load: Callable[[Path], Any]) -> None:
    state = load_file(file_of(toys, load))
    state["control_adapter.weight"] = torch.zeros(3)
    assert "control_adapter.weight" in refusal(load, tiny.save_state(state, tmp_path / "extra.safetensors"))


def test_a_block_number_far_out_is_not_believed(toys: Toys, tmp_path: Path) -> None:
    """Otherwise a few bytes in a header would make us build billions of blocks."""
    state = load_file(toys.klein.file)
    state["double_blocks.4000000000.img_attn.proj.weight"] = torch.zeros(128, 128)
    assert "4000000000" in refusal(load_flow, tiny.save_state(state, tmp_path / "far.safetensors"))


WRONG_SHAPES = [
    (load_flow, "double_blocks.0.img_mlp.0.weight", [768, 96], [768, 128]),
    (load_flow, "single_blocks.2.linear1.weight", [1152, 96], [1152, 128]),
    (load_vae, "encoder.mid.block_1.conv1.weight", [96, 64, 3, 3], [64, 64, 3, 3]),
    (load_vae, "bn.running_var", [64], [128]),
    (load_tiny, "decoder.layers.18.weight", [4, 64, 3, 3], [3, 64, 3, 3]),
]


@pytest.mark.parametrize(("load", "key", "found", "expected"), WRONG_SHAPES, ids=[case[1] for case in WRONG_SHAPES])
def test_a_wrong_shape(
    toys: Toys, tmp_path: Path, load: Callable[[Path], Any], key: str, found: list[int], expected: list[int]
) -> None:
    state = load_file(file_of(toys, load))
    assert list(state[key].shape) == expected
    state[key] = torch.zeros(found)
    message = refusal(load, tiny.save_state(state, tmp_path / "shapes.safetensors"))
    assert str(found) in message
    assert str(expected) in message


def test_parts_taken_for_one_another(toys: Toys) -> None:
    files = {load_flow: toys.klein.file, load_vae: toys.autoencoder.file, load_tiny: toys.taef2}
    for load in LOADERS:
        for owner, path in files.items():
            if owner is not load:
                refusal(load, path)
    assert "not a FLUX.2 transformer" in refusal(load_flow, toys.qwen.folder / "model.safetensors")
    assert "not a FLUX.2 autoencoder" in refusal(load_vae, toys.klein.file)


@pytest.mark.parametrize("layout", ["single file", "folder"])
def test_an_fp8_file_is_read_as_the_values_it_stands_for(toys: Toys, tmp_path: Path, layout: str) -> None:
    """Whole or stored, in either maker's names: diffusers' q, k and v have three scales for our one matrix."""
    path = toys.klein.file if layout == "single file" else toys.klein.folder / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    values = dict(state)
    for key in [key for key in state if "blocks." in key and state[key].ndim == 2]:
        scale = state[key].abs().max() / 448
        state[key] = (state[key] / scale).to(torch.float8_e4m3fn)
        values[key] = state[key].float() * scale
        state[f"{key}_scale"] = scale
        state[key.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    path = tiny.save_state(state, tmp_path / "fp8.safetensors")
    expected = load_flow(tiny.save_state(values, tmp_path / "values.safetensors")).state_dict()
    found = load_flow(path).state_dict()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    stored = open_transformer(path).load(device=CPU, dtype=torch.float32, storage="stored")
    small = {name: module for name, module in stored.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(small) == 2 * 8 + 3 * 2
    for name, module in small.items():
        assert torch.equal(module.dequantize(torch.float32), expected[f"{name}.weight"])
    assert len(small["double_blocks.0.txt_attn.qkv"].parts) == (1 if layout == "single file" else 3)


@pytest.mark.parametrize(
    ("load", "key", "shape"),
    [
        (load_flow, "single_blocks.0.norm.query_norm.scale", ()),
        (load_flow, "single_blocks.0.linear2.weight", (64, 0)),
        (load_flow, "single_blocks.0.linear2.weight", (128, 64)),
        (load_flow, "img_in.weight", (4,)),
        (load_vae, "decoder.conv_in.weight", ()),
        (load_vae, "encoder.mid.block_1.conv1.weight", ()),
        (load_vae, "bn.running_mean", ()),
    ],
)
def test_shapes_that_make_no_model(
    toys: Toys, tmp_path: Path, load: Callable[[Path], Any], key: str, shape: tuple[int, ...]
) -> None:
    state = load_file(file_of(toys, load))
    state[key] = torch.ones(shape)
    refusal(load, tiny.save_state(state, tmp_path / "odd.safetensors"))


def test_pieces_that_do_not_join(toys: Toys, tmp_path: Path) -> None:
    state = load_file(toys.klein.folder / "diffusion_pytorch_model.safetensors")
    state["transformer_blocks.0.attn.to_k.weight"] = torch.ones(3)
    refusal(load_flow, tiny.save_state(state, tmp_path / "odd.safetensors"))


def test_a_whole_repository_is_as_good_as_its_subfolders(toys: Toys, tmp_path: Path) -> None:
    repository = tmp_path / "FLUX.2-klein-4B"
    shutil.copytree(toys.klein.folder, repository / "transformer")
    shutil.copytree(toys.autoencoder.folder, repository / "vae")
    for name in ("flux-2-klein-4b.safetensors", "another.safetensors"):
        shutil.copy(toys.dev.file, repository / name)  # what stands beside them is another model's
    assert not load_flow(repository).params.guidance_embedding
    assert load_vae(repository).params.latent_channels == 32


def copied(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


SHARDED: dict[str, tuple[Callable[[Toys], Path], Callable[[Path], Any]]] = {
    "transformer": (lambda toys: toys.klein.sharded, load_flow),
    "text encoder": (lambda toys: toys.wide_qwen.folder, load_qwen),
}


@pytest.mark.parametrize("part", SHARDED)
def test_a_missing_shard(toys: Toys, tmp_path: Path, part: str) -> None:
    locate, load = SHARDED[part]
    folder = copied(locate(toys), tmp_path)
    shard = sorted(folder.glob("*-00002-of-*.safetensors"))[0]
    shard.unlink()
    assert shard.name in refusal(load, folder)


@pytest.mark.parametrize("part", SHARDED)
def test_a_truncated_shard(toys: Toys, tmp_path: Path, part: str) -> None:
    locate, load = SHARDED[part]
    folder = copied(locate(toys), tmp_path)
    shard = sorted(folder.glob("*-00002-of-*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(WeightsError, match=shard.name):
        load(folder)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"weight_map": 3}', "{}", '{"weight_map": {"a": "../../x.safetensors"}}']
)
def test_a_damaged_or_hostile_index(toys: Toys, tmp_path: Path, content: str) -> None:
    folder = copied(toys.klein.sharded, tmp_path)
    next(folder.glob("*.index.json")).write_text(content)
    refusal(load_flow, folder)


def test_several_files_without_an_index(toys: Toys, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copy(toys.klein.file, tmp_path / f"{name}.safetensors")
    message = refusal(load_flow, tmp_path)
    assert "one.safetensors" in message
    assert "two.safetensors" in message


@pytest.mark.parametrize("kept", [0, 0.5], ids=str)
def test_a_truncated_text_encoder(toys: Toys, tmp_path: Path, kept: float) -> None:
    folder = copied(toys.qwen.folder, tmp_path)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a whole safetensors file"):
        load_qwen(folder)


def test_a_text_encoder_that_is_too_shallow(toys: Toys, tmp_path: Path) -> None:
    folder = tiny.write_qwen_tokenizer(tmp_path / "shallow")
    tiny.qwen_model(32, seed=1, layers=20).save_pretrained(folder)
    message = refusal(load_qwen, folder)
    assert "20" in message
    assert "27" in message


def test_a_text_encoder_whose_config_belongs_to_another_width(toys: Toys, tmp_path: Path) -> None:
    folder = copied(toys.qwen.folder, tmp_path)
    shutil.copy(toys.wide_qwen.folder / "config.json", folder)
    message = refusal(load_qwen, folder)
    assert "32" in message
    assert "48" in message


def test_a_text_encoder_of_another_family(toys: Toys, tmp_path: Path) -> None:
    folder = copied(toys.qwen.folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "t5"}))
    assert "t5" in refusal(load_qwen, folder)


BROKEN_FIELDS: tuple[dict[str, Any], ...] = (
    {"num_attention_heads": 0},
    {"num_attention_heads": "many"},
    {"vocab_size": "many"},
    {"hidden_size": -32},
    {"hidden_act": "nothing"},
    {"layer_types": 3},
)


@pytest.mark.parametrize("broken", BROKEN_FIELDS, ids=str)
def test_a_config_that_makes_no_model(toys: Toys, tmp_path: Path, broken: dict[str, Any]) -> None:
    folder = copied(toys.qwen.folder, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **broken}))
    assert "config.json" in refusal(load_qwen, folder)


def test_the_tokenizer_of_another_model(toys: Toys, tmp_path: Path) -> None:
    """It may know more tokens than the encoder has embeddings; found at loading, not at the first unlucky word."""
    folder = tiny.write_qwen_tokenizer(tmp_path / "foreign", vocabulary=tiny.VOCABULARY + 8)
    with pytest.raises(WeightsError, match=r"foreign knows 408 tokens.* only 400"):
        load_text_encoder(toys.qwen.folder, folder, KLEIN_4B.recipe, device=CPU, dtype=torch.float32)


@pytest.mark.parametrize(
    "content", [None, "", "[]", "{}", '"qwen3"', '{"model_type": "qwen3", "num_hidden_layers": "many"}']
)
def test_a_missing_or_damaged_config(toys: Toys, tmp_path: Path, content: str | None) -> None:
    folder = copied(toys.qwen.folder, tmp_path)
    if content is None:
        (folder / "config.json").unlink()
    else:
        (folder / "config.json").write_text(content)
    assert "config.json" in refusal(load_qwen, folder)


def test_a_text_encoder_lacking_a_layer_that_is_read(toys: Toys, tmp_path: Path) -> None:
    folder = copied(toys.new_mistral.folder, tmp_path)
    state = load_file(folder / "model.safetensors")
    del state["model.language_model.layers.12.self_attn.k_proj.weight"]
    tiny.save_state(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks layers\.12\.self_attn\.k_proj\.weight"):
        load_text_encoder(folder, folder, DEV.recipe, device=CPU, dtype=torch.float32)


TEMPLATES = ("{% if %}", "{{ ''.__class__.__mro__ }}", "{{ raise_exception('no') }}")


@pytest.mark.parametrize("damage", ["missing folder", "empty folder", "damaged", "no template", "config", *TEMPLATES])
def test_a_tokenizer_that_cannot_serve(toys: Toys, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "tokenizer"
    if damage == "empty folder":
        folder.mkdir()
    elif damage != "missing folder":
        tiny.write_qwen_tokenizer(folder)
        if damage == "damaged":
            for name in ("tokenizer.json", "vocab.json", "merges.txt"):
                (folder / name).write_text("{")
        elif damage == "config":
            (folder / "tokenizer_config.json").write_text("[]")
        elif damage in TEMPLATES:
            (folder / "chat_template.jinja").write_text(damage)
        else:
            (folder / "chat_template.jinja").unlink()
    with pytest.raises(WeightsError, match="tokenizer"):
        load_text_encoder(toys.qwen.folder, folder, KLEIN_4B.recipe, device=CPU, dtype=torch.float32)
