"""The checkpoint table against what Black Forest Labs publish."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from flux2_studio.checkpoints import CHECKPOINTS, Checkpoint
from flux2_studio.engine.weights.loading import open_transformer
from flux2_studio.settings import ASSETS

BY_NAME = {checkpoint.name: checkpoint for checkpoint in CHECKPOINTS}
QWEN_4B, QWEN_8B, MISTRAL = "QWEN3_4B_MODEL_PATH", "QWEN3_8B_MODEL_PATH", "MISTRAL_MODEL_PATH"

# name: repository, file, path override, steps, guidance, guiding, text encoder's override, gated
ON_BOARD = ("nano", "nano-base")
PUBLISHED = {
    "klein-4b": (
        "FLUX.2-klein-4B", "flux-2-klein-4b.safetensors", "KLEIN_4B_MODEL_PATH", 4, 1.0, "none", QWEN_4B, False,
    ),
    "klein-9b": (
        "FLUX.2-klein-9B", "flux-2-klein-9b.safetensors", "KLEIN_9B_MODEL_PATH", 4, 1.0, "none", QWEN_8B, True,
    ),
    "klein-9b-kv": (
        "FLUX.2-klein-9b-kv", "flux-2-klein-9b-kv.safetensors", "KLEIN_9B_KV_MODEL_PATH", 4, 1.0, "none", QWEN_8B, True,
    ),
    "klein-base-4b": (
        "FLUX.2-klein-base-4B", "flux-2-klein-base-4b.safetensors", "KLEIN_4B_BASE_MODEL_PATH", 50, 4.0, "cfg", QWEN_4B,
        False,
    ),
    "klein-base-9b": (
        "FLUX.2-klein-base-9B", "flux-2-klein-base-9b.safetensors", "KLEIN_9B_BASE_MODEL_PATH", 50, 4.0, "cfg", QWEN_8B,
        True,
    ),
    "dev": (
        "FLUX.2-dev", "flux2-dev.safetensors", "FLUX2_MODEL_PATH", 50, 4.0, "embedded", MISTRAL, True,
    ),
}  # fmt: skip


def test_the_six_published_and_the_two_on_board() -> None:
    assert [checkpoint.name for checkpoint in CHECKPOINTS] == [*ON_BOARD, *PUBLISHED]


@pytest.mark.parametrize("name", PUBLISHED)
def test_as_published(name: str) -> None:
    checkpoint = BY_NAME[name]
    repo, file, override, steps, guidance, guiding, text, gated = PUBLISHED[name]
    assert checkpoint.flow.repo == f"black-forest-labs/{repo}"
    assert checkpoint.flow.path == file
    assert checkpoint.flow.path_variable == override
    assert (checkpoint.steps, checkpoint.guidance, checkpoint.guidance_mode) == (steps, guidance, guiding)
    assert checkpoint.text.path_variable == text
    assert checkpoint.gated is gated
    assert checkpoint.flow.gated is gated


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_distilled_means_fixed(checkpoint: Checkpoint) -> None:
    distilled = checkpoint.guidance_mode == "none"
    assert checkpoint.steps_fixed is checkpoint.guidance_fixed is distilled
    assert checkpoint.supports_negative_prompt is (checkpoint.guidance_mode == "cfg")


def test_only_the_kv_checkpoint_keeps_references() -> None:
    assert [checkpoint.name for checkpoint in CHECKPOINTS if checkpoint.caches_reference_kv] == ["klein-9b-kv"]


def test_text_recipes() -> None:
    qwen, mistral = BY_NAME["klein-4b"].recipe, BY_NAME["dev"].recipe
    assert (qwen.hidden_layers, qwen.length, qwen.padding_side, qwen.generation_prompt, qwen.layer_count) == (
        (9, 18, 27), 512, "right", True, 27,
    )  # fmt: skip
    assert (
        mistral.hidden_layers, mistral.length, mistral.padding_side, mistral.generation_prompt, mistral.layer_count
    ) == (
        (10, 20, 30), 512, "left", False, 30,
    )  # fmt: skip
    assert mistral.removed_tokens == ("[IMG]",)
    assert mistral.system_prompt is not None and "object\nattribution" in mistral.system_prompt
    assert all(BY_NAME[name].recipe == qwen for name in PUBLISHED if name != "dev")


def test_all_published_share_one_autoencoder_that_needs_no_token() -> None:
    (autoencoder,) = {BY_NAME[name].autoencoder for name in PUBLISHED}
    assert autoencoder.path_variable == "AE_MODEL_PATH"
    assert autoencoder.repo == "black-forest-labs/FLUX.2-klein-4B"
    assert not autoencoder.gated


def test_reference_caps() -> None:
    klein = BY_NAME["klein-4b"]
    assert [klein.max_pixels_per_reference(n) for n in (0, 1, 2, 10)] == [2024**2, 2024**2, 1024**2, 1024**2]


def test_what_is_on_board_is_there_and_shared() -> None:
    parts = {part for name in ON_BOARD for part in BY_NAME[name].parts}
    assert len(parts) == 4, "two transformers, one text encoder, one autoencoder"
    assert {part.repo for part in parts} == {None}
    for part in parts:
        assert (ASSETS / part.path).exists(), part.path
    notice = (ASSETS / "nano" / "LICENSE").read_text(encoding="utf-8")
    assert "Copyright (c) Microsoft Corporation" in notice
    assert "Permission is hereby granted, free of charge" in notice


def test_what_is_on_board_is_small() -> None:
    sizes = [path.stat().st_size for path in (ASSETS / "nano").rglob("*") if path.is_file()]
    assert sum(sizes) < 40_000_000 and max(sizes) < 10_000_000


@pytest.mark.parametrize("name", ON_BOARD)
def test_sizes_of_what_is_on_board_are_about_right(name: str) -> None:
    for part in BY_NAME[name].parts:
        path = ASSETS / part.path
        files = [path] if path.is_file() else list(path.iterdir())
        assert sum(file.stat().st_size for file in files) == pytest.approx(part.size, rel=0.15), part.path


def test_nobody_writes_to_the_table() -> None:
    assert isinstance(CHECKPOINTS, tuple)
    with pytest.raises(FrozenInstanceError):
        BY_NAME["dev"].steps = 4  # type: ignore[misc]
    assert len({part for checkpoint in CHECKPOINTS for part in checkpoint.parts}) == 14  # hashable, and shared by value


@pytest.mark.parametrize("name", ON_BOARD)
def test_hidden_width_is_that_of_the_file(name: str) -> None:
    checkpoint = BY_NAME[name]
    params = open_transformer(ASSETS / checkpoint.flow.path).params
    assert (checkpoint.hidden_width, checkpoint.context_width) == (params.hidden, params.context_width)
