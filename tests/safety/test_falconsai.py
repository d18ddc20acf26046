"""The larger classifier, as a tiny one of the same architecture in the same layout."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from flux2_studio.errors import ClassifierError
from flux2_studio.safety.falconsai import NSFW_THRESHOLD, Falconsai

PICTURE = Image.fromarray(np.random.default_rng(3).integers(0, 256, (90, 150, 3), np.uint8)).resize((300, 180))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Written by transformers, whose names for the tensors are then those of the official file."""
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        id2label={0: "normal", 1: "nsfw"},
        label2id={"normal": 0, "nsfw": 1},
    )
    model = ViTForImageClassification(config)
    torch.nn.init.normal_(model.classifier.weight)  # or every answer is one half
    model.save_pretrained(tmp_path)
    # As the published file has them.
    config_file = tmp_path / "config.json"
    config_file.write_text(
        json.dumps(json.loads(config_file.read_text("utf-8")) | {"label2id": {"normal": "0", "nsfw": "1"}}), "utf-8"
    )
    return tmp_path


def rewrite(folder: Path, change: dict[str, torch.Tensor], without: str = "") -> None:
    tensors = load_file(folder / "model.safetensors") | change
    tensors.pop(without, None)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def test_the_layout_is_the_published_one(folder: Path) -> None:
    names = load_file(folder / "model.safetensors").keys()
    assert {"vit.encoder.layer.0.attention.attention.query.weight", "vit.layernorm.weight", "classifier.bias"} <= names


def test_the_same_as_transformers_own_processor_and_model(folder: Path) -> None:
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, resample=2)
    model = ViTForImageClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        logits = model(**processor(images=PICTURE, return_tensors="pt")).logits
    expected = float(logits.softmax(-1)[0, 1])
    assert 0.02 < expected < 0.98
    assert Falconsai(folder).probability(PICTURE) == pytest.approx(expected, abs=1e-5)


def test_verdict(folder: Path) -> None:
    rewrite(folder, {"classifier.bias": torch.tensor([0.0, 99.0])})
    verdict = Falconsai(folder)(PICTURE)
    assert not verdict.allowed
    assert verdict.reasons == ("seems not to be safe for work",)
    assert verdict.scores["nsfw"] > NSFW_THRESHOLD
    rewrite(folder, {"classifier.bias": torch.tensor([99.0, 0.0])})
    assert Falconsai(folder)(PICTURE).allowed


@pytest.mark.parametrize(
    ("change", "without", "says"),
    [
        ({}, "vit.encoder.layer.1.output.dense.weight", "missing: vit"),
        ({"vit.extra": torch.zeros(1)}, "", "unexpected: vit.extra"),
        ({"classifier.weight": torch.zeros(3, 32)}, "", "cannot be read|mismatched"),
    ],
)
def test_it_is_loaded_strictly(folder: Path, change: dict[str, torch.Tensor], without: str, says: str) -> None:
    rewrite(folder, change, without)
    with pytest.raises(ClassifierError, match=says):
        Falconsai(folder).load()


def test_pickles_are_not_read(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ClassifierError, match=r"needs the config\.json and the model\.safetensors"):
        Falconsai(folder).load()


def test_other_classes(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text("utf-8").replace('"nsfw"', '"cat"'), "utf-8")
    with pytest.raises(ClassifierError, match="does not name the classes normal and nsfw"):
        Falconsai(folder).load()
