"""What is said of a LoRA's file: how it fits a transformer, and every wrong file refused in words."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora.adapters import check_lora, set_loras
from flux2_studio.engine.lora.file import Lora, open_lora
from flux2_studio.engine.weights.loading import load_transformer
from flux2_studio.errors import WeightsError
from tests.tiny import State, Toys

L = "diffusion_model.double_blocks.0.img_attn.qkv"
A, B = f"{L}.lora_A.weight", f"{L}.lora_B.weight"


def zeros(**shapes: tuple[int, ...]) -> State:
    return {f"{L}.{field}": torch.zeros(shape) for field, shape in shapes.items()}


GOOD = {A: torch.zeros(2, 128), B: torch.zeros(384, 2)}
LOKR = zeros(lokr_w1=(4, 4), lokr_w2_a=(96, 2), lokr_w2_b=(2, 32))
LOHA = zeros(hada_w1_a=(384, 2), hada_w1_b=(2, 128), hada_w2_a=(384, 2), hada_w2_b=(2, 128))
TEXT_ENCODER = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 8),
    "text_encoder.layers.0.mlp.lora_A.weight": torch.zeros(2, 8),
}


@pytest.fixture(scope="module")
def model(toys: Toys) -> Transformer:
    """Of hidden width 128, with 2 double and 3 single blocks."""
    return load_transformer(toys.klein.file, device=torch.device("cpu"), dtype=torch.float32)


def saved(state: State, path: Path) -> Path:
    save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    return path


def opened(state: State, folder: Path) -> Lora:
    return open_lora(saved(state, folder / "style.safetensors"))


def test_the_report(model: Transformer, tmp_path: Path) -> None:
    state = {**GOOD, f"{L}.alpha": torch.tensor(1.0)}
    report = check_lora(opened(state, tmp_path), model)
    assert report.text == "style.safetensors (LoRA of rank 2): all 3 tensors fit."
    assert report.matched == dict.fromkeys(state, "double_blocks.0.img_attn.qkv")
    state |= {
        **TEXT_ENCODER,
        "diffusion_model.double_blocks.0.img_mod.lin.diff": torch.zeros(4, 4),
        "diffusion_model.double_blocks.9.img_attn.proj.diff": torch.zeros(128, 128),
        "diffusion_model.double_blocks.0.img_attn.qkv.diff_b": torch.zeros(384),
        "optimizer.step": torch.zeros(1),
    }
    report = check_lora(opened(state, tmp_path), model)
    assert len(report.matched) == 3
    assert report.unmatched.keys() == state.keys() - report.matched.keys()
    for words in (
        "3 of 9 tensors fit",
        "2 for a text encoder",
        "1 biases",
        "layers that this checkpoint does not have",
    ):
        assert words in report.text
    assert "img_mod" in min(key for key, reason in report.unmatched.items() if "FLUX.2 does not have" in reason)


@pytest.mark.parametrize(
    ("width", "words"),
    [(3072, "klein 4B (width 3072)"), (4096, "klein 9B (width 4096)"), (6144, "dev (width 6144)"), (64, "width 64")],
)
@pytest.mark.parametrize("spelling", ["Black Forest Labs", "diffusers", "lokr", "only inputs"])
def test_a_lora_of_another_size(model: Transformer, tmp_path: Path, width: int, words: str, spelling: str) -> None:
    match spelling:
        case "Black Forest Labs":
            layer = "diffusion_model.double_blocks.0.img_attn.qkv"
            state = {
                f"{layer}.lora_A.weight": torch.zeros(1, width),
                f"{layer}.lora_B.weight": torch.zeros(3 * width, 1),
            }
        case "diffusers":
            layer = "transformer.transformer_blocks.0.attn.to_q"
            state = {f"{layer}.lora_A.weight": torch.zeros(1, width), f"{layer}.lora_B.weight": torch.zeros(width, 1)}
        case "lokr":
            layer = "lycoris_single_transformer_blocks_0_attn_to_out"
            state = {f"{layer}.lokr_w1": torch.zeros(4, 4), f"{layer}.lokr_w2": torch.zeros(width // 4, width)}
        case _:
            state = {"img_in.lora_A.weight": torch.zeros(1, 128), "img_in.lora_B.weight": torch.zeros(width, 1)}
    found = opened(state, tmp_path)
    assert found.width == width
    expected = f"style.safetensors is a LoRA for {words}; the checkpoint in use has width 128. Choose"
    for call in (lambda: check_lora(found, model), lambda: set_loras(model, [(found, 1.0)])):
        with pytest.raises(WeightsError) as caught:
            call()
        assert str(caught.value).startswith(expected)


def test_a_lora_that_fits_by_less_than_half(model: Transformer, tmp_path: Path) -> None:
    """One of FLUX.1 has some layers of klein 4B's sizes, and would spoil pictures."""
    state = {f"double_blocks.{i}.img_attn.proj.lora_A.weight": torch.zeros(2, 128) for i in range(8)}
    state |= {f"double_blocks.{i}.img_attn.proj.lora_B.weight": torch.zeros(128, 2) for i in range(8)}
    with pytest.raises(WeightsError, match="of 16 tensors 12 are for layers that this checkpoint does not have"):
        set_loras(model, [(opened(state, tmp_path), 1.0)])


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        open_lora(path)
    message = str(caught.value)
    assert path.name in message
    assert len(message) < 500, "too long to be read"
    assert message.endswith(".") and message.isprintable()
    return message


def test_files_that_are_no_loras(toys: Toys, tmp_path: Path) -> None:
    for path in (toys.klein.file, toys.autoencoder.file, toys.taef2, toys.qwen.folder / "model.safetensors"):
        assert "no LoRA for FLUX.2" in refusal(path)
    text = {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.zeros(2, 8)}
    save_file(text, tmp_path / "text.safetensors")
    assert "for a text encoder" in refusal(tmp_path / "text.safetensors")
    save_file({}, tmp_path / "none.safetensors")
    assert "no LoRA for FLUX.2" in refusal(tmp_path / "none.safetensors")
    torch.save(text, tmp_path / "pickled.safetensors")
    assert "not a whole safetensors file" in refusal(tmp_path / "pickled.safetensors")
    assert "no file" in refusal(tmp_path / "nowhere.safetensors")
    assert "folder" in refusal(tmp_path)


HOSTILE: dict[str, tuple[State, str]] = {
    "ranks differ": ({A: torch.zeros(3, 128), B: torch.zeros(384, 2)}, "rank 2 and 3"),
    "no up": ({A: GOOD[A]}, "partner"),
    "no down": ({B: GOOD[B]}, "partner"),
    "alpha alone": ({f"{L}.alpha": torch.tensor(4.0)}, "nothing stands beside"),
    "no matrix": ({A: torch.zeros(2, 128, 1, 1), B: GOOD[B]}, "no matrix"),
    "scalar factor": ({A: torch.tensor(1.0), B: GOOD[B]}, "no matrix"),
    "alpha NaN": ({**GOOD, f"{L}.alpha": torch.tensor(float("nan"))}, "no number"),
    "alpha infinite": ({**GOOD, f"{L}.alpha": torch.tensor(float("-inf"))}, "no number"),
    "alpha absurd": ({**GOOD, f"{L}.alpha": torch.tensor(1e300, dtype=torch.float64)}, "no number"),
    "alpha of several": ({**GOOD, f"{L}.alpha": torch.ones(2)}, "not one number"),
    "alpha of another type": ({**GOOD, f"{L}.alpha": torch.tensor(True)}, "not one number"),
    "integers": ({A: GOOD[A].to(torch.int8), B: GOOD[B]}, "I8"),
    "fp8": ({A: GOOD[A].to(torch.float8_e4m3fn), B: GOOD[B]}, "F8_E4M3"),
    "two kinds": ({**GOOD, **LOKR}, "mixed"),
    "two spellings of a field": ({**GOOD, f"{L}.lora_down.weight": GOOD[A]}, "twice"),
    "two spellings of a layer": ({**GOOD, "double_blocks.0.img_attn.qkv.diff": torch.zeros(384, 128)}, "twice"),
    "lokr, factor missing": ({f"{L}.lokr_w1": torch.zeros(4, 4)}, "missing"),
    "lokr, half a factor": ({key: LOKR[key] for key in LOKR if not key.endswith("_b")}, "missing"),
    "lokr, ranks differ": ({**LOKR, f"{L}.lokr_w2_b": torch.zeros(3, 32)}, "rank 2 and 3"),
    "lokr, a factor twice": ({**LOKR, f"{L}.lokr_w2": torch.zeros(96, 32)}, "both whole and as a product"),
    "loha, a factor missing": ({key: LOHA[key] for key in list(LOHA)[:3]}, "missing"),
    "loha, shapes differ": ({**LOHA, f"{L}.hada_w2_b": torch.zeros(2, 64)}, "different shapes"),
    "dora of another size": ({**GOOD, f"{L}.dora_scale": torch.ones(383, 1)}, "dora_scale"),
    "dora of three dimensions": ({**GOOD, f"{L}.dora_scale": torch.ones(384, 1, 1)}, "dora_scale"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_damaged_and_hostile_files(tmp_path: Path, case: str) -> None:
    state, words = HOSTILE[case]
    saved(state, tmp_path / "bad.safetensors")
    assert words in refusal(tmp_path / "bad.safetensors")


@pytest.mark.parametrize(
    "config",
    [
        *("{", "[]", "3", "[" * 100_000),
        *('{"transformer.lora_alpha": "much"}', '{"lora_alpha": NaN}', '{"lora_alpha": 1' + "0" * 400 + "}"),
        *('{"lora_alpha": 1, "alpha_pattern": {"(a+)+$": 2}}', '{"alpha_pattern": 3}'),
    ],
)
def test_hostile_configurations(tmp_path: Path, config: str) -> None:
    save_file(GOOD, tmp_path / "bad.safetensors", metadata={"lora_adapter_metadata": config})
    refusal(tmp_path / "bad.safetensors")


def test_keys_are_shown_with_care(model: Transformer, tmp_path: Path) -> None:
    state = {
        **GOOD,
        "x\n\x1b[31m" + "y" * 10_000: torch.zeros(1),
        "transformer." * 10_000 + "img_in.diff": torch.zeros(1),
    }
    report = check_lora(opened(state, tmp_path), model)
    assert len(report.text) < 400 and report.text.isprintable()
    state["transformer." * 5 + "z" * 150 + "\x1b.alpha"] = torch.zeros(3)
    save_file(state, tmp_path / "bad.safetensors")
    refusal(tmp_path / "bad.safetensors")


def test_sizes_are_checked_before_anything_is_multiplied_out(model: Transformer, tmp_path: Path) -> None:
    """Small factors of an enormous product: a million million numbers."""
    side = 1_000_000
    for state in (
        {A: torch.zeros(1, side), B: torch.zeros(side, 1)},
        zeros(lokr_w1=(1000, 1000), lokr_w2_a=(1000, 1), lokr_w2_b=(1, 1000)),
        zeros(hada_w1_a=(side, 1), hada_w1_b=(1, side), hada_w2_a=(side, 1), hada_w2_b=(1, side)),
    ):
        with pytest.raises(WeightsError, match=f"width {side}"):
            set_loras(model, [(opened(state, tmp_path), 1.0)])


def test_random_damage_is_noticed(model: Transformer, tmp_path: Path) -> None:
    """Whole LoRAs with something lost, renamed, reshaped or retyped: read, or one `WeightsError`, and nothing else."""
    chance = random.Random(4)
    groups = (
        GOOD,
        moved(LOHA, "blocks.0", "blocks.1"),
        moved(LOKR, "img_attn", "txt_attn"),
        {"norm_out.linear.diff": torch.zeros(256, 128)},
        TEXT_ENCODER,
    )
    outcomes = {"read": 0, "refused": 0}
    for _ in range(80):
        chosen = chance.sample(groups, chance.randint(1, 3))
        state = {key: tensor for group in chosen for key, tensor in group.items()}
        key = chance.choice(list(state))
        match chance.choice(("nothing", "lost", "renamed", "reshaped", "retyped")):
            case "lost":
                del state[key]
            case "renamed":
                state[key.replace("blocks", "bl\0cks").replace("lora", "dora")] = state.pop(key)
            case "reshaped":
                state[key] = torch.zeros([chance.choice((1, 3, 128)) for _ in range(chance.randint(0, 3))])
            case "retyped":
                state[key] = state[key].to(chance.choice((torch.int64, torch.bool, torch.float8_e5m2, torch.float64)))
        try:
            check_lora(opened(state, tmp_path), model)
            outcomes["read"] += 1
        except WeightsError as error:
            assert str(error).isprintable() and len(str(error)) < 500
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 20


def moved(state: State, before: str, after: str) -> State:
    """The same for another layer."""
    return {key.replace(before, after): tensor for key, tensor in state.items()}
