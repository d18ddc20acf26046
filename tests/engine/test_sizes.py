"""What a part will take of memory, told by its files' headers, is what it takes once it is loaded, tensor by tensor."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from flux2_studio.checkpoints import DEV, KLEIN_4B
from flux2_studio.engine.text.encoder import open_text_encoder
from flux2_studio.engine.weights.loading import WeightStorage, open_autoencoder, open_tiny_decoder, open_transformer
from tests import quantised, tiny
from tests.quantised import State, Written
from tests.tiny import Toys

CPU = torch.device("cpu")
STORAGES: tuple[WeightStorage, ...] = get_args(WeightStorage)
DTYPES = (torch.bfloat16, torch.float32)
LAYOUTS: dict[str, Callable[[State], Written]] = {
    "bfloat16": lambda state: Written(tensors=dict(state)),
    "BFL's fp8": quantised.bfl_fp8,
    "scaled fp8": quantised.comfy_scaled_fp8,
    "comfy_quant": quantised.comfy_quant_fp8,
    "fp8 per row": quantised.per_row_fp8,
    "fp8 without scales": quantised.plain_fp8,
    "NVFP4": quantised.bfl_nvfp4,
}
GGUF = ("Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0", "Q5_1")


def held(model: nn.Module) -> Counter[str]:
    """Bytes of each parameter and buffer; those of a layer of stored matrices count as the weight's they stand for."""
    found: Counter[str] = Counter()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert not tensor.is_meta, name
        found[re.sub(r"(\.head)?\.parts\.\d+\.\w+$", ".weight", name)] += tensor.numel() * tensor.element_size()
    return found


@pytest.mark.parametrize("layout", [*LAYOUTS, *GGUF])
def test_a_transformer(tmp_path: Path, layout: str) -> None:
    path = tmp_path / "model"
    if layout in GGUF:
        quantised.write_gguf(quantised.toy_state(), path, layout)
    else:
        LAYOUTS[layout](quantised.toy_state()).save(path)
    opened = open_transformer(path)
    totals = set()
    for storage in STORAGES:
        for dtype in DTYPES:
            sizes = opened.tensor_bytes(dtype=dtype, storage=storage)
            assert sizes == held(opened.load(device=CPU, dtype=dtype, storage=storage))
            totals.add(sum(sizes.values()))
    assert len(totals) >= 4, "dtype and storage make a difference"


@pytest.mark.parametrize("layout", ["folder", "sharded"])
@pytest.mark.parametrize("storage", STORAGES)
def test_a_transformer_whose_tensors_are_joined(toys: Toys, layout: str, storage: WeightStorage) -> None:
    opened = open_transformer(getattr(toys.klein, layout))
    assert opened.tensor_bytes(dtype=torch.float16, storage=storage) == held(
        opened.load(device=CPU, dtype=torch.float16, storage=storage)
    )


def test_an_nvfp4_matrix_with_tiles_that_are_filled_up(tmp_path: Path) -> None:
    """The rows of `txt_in` fill two tiles, its columns none: sixteen blocks of which each tile has four."""
    state = quantised.toy_state()
    codes, scales, whole, _ = quantised.nvfp4_codes(torch.randn(256, 48))
    state["txt_in.weight"] = codes
    state |= {"txt_in.weight_scale": scales, "txt_in.weight_scale_2": whole}
    opened = open_transformer(quantised.save_plain(state, tmp_path / "small.safetensors"))
    sizes = opened.tensor_bytes(dtype=torch.bfloat16, storage="stored")
    assert sizes["txt_in.weight"] == 256 * 24 + 256 * 4 + 4
    assert sizes == held(opened.load(device=CPU, dtype=torch.bfloat16, storage="stored"))


@pytest.mark.parametrize("storage", STORAGES)
def test_autoencoders(toys: Toys, storage: WeightStorage) -> None:
    for path in toys.autoencoder.layouts:
        opened = open_autoencoder(path)
        for dtype in DTYPES:
            sizes = opened.tensor_bytes(dtype=dtype, storage=storage)
            assert sizes == held(opened.load(device=CPU, dtype=dtype, storage=storage))
            assert sizes["bn.running_mean"] == 4 * 128, "the statistics stay in float32"
    tiny_one = open_tiny_decoder(toys.taef2)
    assert tiny_one.tensor_bytes(dtype=torch.float16) == held(tiny_one.load(device=CPU, dtype=torch.float16))


@pytest.mark.parametrize("storage", STORAGES)
def test_text_towers(toys: Toys, storage: WeightStorage) -> None:
    for text, recipe in ((toys.qwen, KLEIN_4B.recipe), (toys.mistral, DEV.recipe)):
        opened = open_text_encoder(text.folder, text.folder, recipe)
        for dtype in DTYPES:
            encoder = opened.load(device=CPU, dtype=dtype, storage=storage)
            assert opened.tensor_bytes(dtype=dtype, storage=storage) == held(encoder.text_decoder)


def test_a_text_tower_in_fp8(toys: Toys, tmp_path: Path) -> None:
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    (folder / "config.json").write_bytes((toys.qwen.folder / "config.json").read_bytes())
    state: State = {}
    for name, tensor in load_file(toys.qwen.folder / "model.safetensors").items():
        state[name] = tensor
        if ".mlp." in name:
            state[name], state[f"{name}_scale"] = quantised.fp8_codes(tensor)
    tiny.save_state(state, folder / "model.safetensors")
    opened = open_text_encoder(folder, toys.qwen.folder, KLEIN_4B.recipe)
    for storage in STORAGES:
        encoder = opened.load(device=CPU, dtype=torch.bfloat16, storage=storage)
        assert opened.tensor_bytes(dtype=torch.bfloat16, storage=storage) == held(encoder.text_decoder)
