"""A user's LoRAs: found, told apart, opened once, and put onto a transformer; and what goes wrong with them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flux2_studio.checkpoints import DEV, KLEIN_4B, KLEIN_9B, KLEIN_BASE_4B, NANO
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.lora.layers import AdaptedLinear
from flux2_studio.engine.weights.loading import open_transformer
from flux2_studio.errors import RequestError, StudioError, WeightsError
from flux2_studio.models.loras import LoraLibrary
from flux2_studio.request import LoraChoice, is_lora_name
from flux2_studio.settings import ASSETS, Settings
from tests.loras import NANO_WIDTH, write_lora

TRANSFORMER = ASSETS / "nano" / "transformer.safetensors"


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def loras(settings: Settings) -> LoraLibrary:
    return LoraLibrary(settings)


@pytest.fixture
def transformer() -> Transformer:
    return open_transformer(TRANSFORMER).load(device=torch.device("cpu"), dtype=torch.float32)


def names(loras: LoraLibrary) -> list[str]:
    return [entry.name for entry in loras.scan()[0]]


def choose(name: str, weight: float = 1.0) -> tuple[LoraChoice, ...]:
    return (LoraChoice(name=name, weight=weight),)


def adapted(transformer: Transformer) -> list[str]:
    return [name for name, module in transformer.named_modules() if isinstance(module, AdaptedLinear)]


# --- what is there ---


def test_no_folder_yet_is_no_loras(loras: LoraLibrary) -> None:
    assert loras.scan() == ([], [])
    assert loras.load(()) == []


def test_each_is_told_with_its_kind_and_family(loras: LoraLibrary) -> None:
    for name, width in (("toy", 256), ("Ink", 3072), ("big", 4096), ("dev-look", 6144), ("odd", 640)):
        write_lora(loras.folder / f"{name}.safetensors", width, rank=2)
    entries, problems = loras.scan()
    assert [(entry.name, entry.width, entry.family) for entry in entries] == [
        ("big", 4096, "klein 9B"),
        ("dev-look", 6144, "dev"),
        ("Ink", 3072, "klein 4B"),
        ("odd", 640, "a transformer of width 640"),
        ("toy", 256, NANO.label),
    ]
    assert {entry.kind for entry in entries} == {"LoRA of rank 2"}
    assert problems == []


def test_names_are_paths_below_the_folder(loras: LoraLibrary) -> None:
    write_lora(loras.folder / "mine.safetensors")
    write_lora(loras.folder / "styles" / "mine.safetensors")
    write_lora(loras.folder / "peft" / "adapter_model.safetensors")
    write_lora(loras.folder / "run" / "last" / "pytorch_lora_weights.safetensors")
    write_lora(loras.folder / ".hidden" / "no.safetensors")
    (loras.folder / "._mine.safetensors").write_bytes(b"what a Mac leaves behind")
    assert names(loras) == ["mine", "peft", "run/last", "styles/mine"]
    assert loras.scan()[1] == []


def test_no_name_is_changed_by_another_file(loras: LoraLibrary) -> None:
    write_lora(loras.folder / "b" / "ink.safetensors")
    before = loras.load(choose("b/ink"))
    write_lora(loras.folder / "a" / "ink.safetensors", seed=1)
    assert names(loras) == ["a/ink", "b/ink"]
    assert loras.load(choose("b/ink")) == before


def test_files_come_change_and_go_while_the_studio_runs(loras: LoraLibrary) -> None:
    path = write_lora(loras.folder / "ink.safetensors")
    ((first, weight),) = loras.load(choose("ink", 0.5))
    assert weight == 0.5
    write_lora(loras.folder / "new.safetensors")
    assert names(loras) == ["ink", "new"]
    assert loras.load(choose("ink"))[0][0] is first, "unchanged, it is the same object"
    write_lora(path, rank=8)
    ((second, _),) = loras.load(choose("ink"))
    assert second is not first and second.kind == "LoRA of rank 8"
    path.unlink()
    with pytest.raises(RequestError, match="'ink' is not in its folder any more"):
        loras.load(choose("ink"))
    write_lora(path)
    assert loras.load(choose("ink"))


def test_pefts_configuration_belongs_to_its_file(loras: LoraLibrary) -> None:
    path = write_lora(loras.folder / "peft" / "adapter_model.safetensors", rank=4)
    beside = path.with_name("adapter_config.json")
    scales = []
    for alpha in (4, 16):
        beside.write_text(json.dumps({"lora_alpha": alpha, "peft_type": "LORA"}))
        os.utime(beside, (alpha, alpha))
        ((lora, _),) = loras.load(choose("peft"))
        scales.append(lora.changes[0].scale)
    assert scales == [1.0, 4.0]


def test_loras_among_the_checkpoint_files_are_found_and_nothing_else_is_told(tmp_path: Path) -> None:
    mine = tmp_path / "checkpoints"
    write_lora(mine / "ink.safetensors")
    shutil.copy(TRANSFORMER, mine / "a transformer.safetensors")
    (mine / "torn.safetensors").write_bytes(b"torn")
    loras = LoraLibrary(Settings(home=tmp_path / "home", checkpoints_dir=mine))
    entries, problems = loras.scan()
    assert [entry.name for entry in entries] == ["ink"] and problems == []
    write_lora(loras.folder / "ink.safetensors", seed=3)
    assert names(loras) == ["ink", "ink-2"]


def test_a_folder_inside_the_other_is_looked_through_once(tmp_path: Path) -> None:
    write_lora(tmp_path / "models" / "loras" / "ink.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "models", target_is_directory=True)
    settings = Settings(home=tmp_path, checkpoints_dir=tmp_path / "models", loras_dir=tmp_path / "link" / "loras")
    assert names(LoraLibrary(settings)) == ["ink"]


def test_what_is_no_lora_says_why(loras: LoraLibrary) -> None:
    write_lora(loras.folder / "good.safetensors")
    (loras.folder / "torn.safetensors").write_bytes((loras.folder / "good.safetensors").read_bytes()[:200])
    save_file({"unet.down.0.lora_A.weight": torch.zeros(2, 2)}, loras.folder / "sd.safetensors")
    entries, problems = loras.scan()
    assert [entry.name for entry in entries] == ["good"]
    assert len(problems) == 2
    assert problems[0].startswith("sd.safetensors is no LoRA for FLUX.2") and "torn.safetensors" in problems[1]
    with pytest.raises(WeightsError, match="is not a whole safetensors file"):
        loras.load(choose("torn"))


def test_a_folder_that_was_set_and_is_not_there(tmp_path: Path) -> None:
    loras = LoraLibrary(Settings(home=tmp_path, loras_dir=tmp_path / "nowhere"))
    entries, problems = loras.scan()
    assert entries == [] and len(problems) == 1 and "FLUX2_LORAS_DIR is" in problems[0]
    with pytest.raises(RequestError, match="FLUX2_LORAS_DIR is"):
        loras.load(choose("ink"))


def test_an_unknown_name_is_answered_with_near_ones(loras: LoraLibrary) -> None:
    with pytest.raises(RequestError, match=r"nor any other: put LoRA files into .*loras\.$"):
        loras.load(choose("ink"))
    for name in ("watercolour", "styles/Pen-And-Ink", "grain"):
        write_lora(loras.folder / f"{name}.safetensors")
    for asked, near in (("watercolor", "watercolour"), ("pen-and-ink.safetensors", "styles/Pen-And-Ink")):
        with pytest.raises(RequestError) as caught:
            loras.load(choose(asked))
        assert str(caught.value) == f"There is no LoRA called {asked!r}. Did you mean {near}?"
    with pytest.raises(RequestError, match="Choose one of: grain, styles/Pen-And-Ink, watercolour"):
        loras.load(choose("zzz"))


def test_only_files_that_were_found_are_opened(loras: LoraLibrary, tmp_path: Path) -> None:
    write_lora(tmp_path / "outside.safetensors")
    write_lora(loras.folder / "inside.safetensors")
    for name in ("../outside", str(tmp_path / "outside"), "inside.safetensors/../../outside", "..\\outside"):
        with pytest.raises(RequestError, match="is no LoRA's name"):
            choose(name)
    with pytest.raises(RequestError, match="no LoRA called 'outside'"):
        loras.load(choose("outside"))


def test_odd_file_names_can_be_chosen_or_are_told(loras: LoraLibrary) -> None:
    for name in ("a\nb", "a\\b", " spaced ", "tail.", "x" * 240, "名前"):
        write_lora(loras.folder / f"{name}.safetensors")
    write_lora(loras.folder / " .." / "up.safetensors")
    good = write_lora(loras.folder / "z.safetensors")
    good.rename(os.fsdecode(os.fsencode(loras.folder) + b"/\xff.safetensors"))
    entries, problems = loras.scan()
    assert len(entries) == 7 and all(is_lora_name(entry.name) for entry in entries)
    assert loras.load([LoraChoice(name=entry.name) for entry in entries])
    (problem,) = problems
    assert problem.isprintable() and problem.encode() and "rename it" in problem


# --- whether it fits ---


def test_another_models_lora_is_refused_before_anything_is_loaded(loras: LoraLibrary) -> None:
    write_lora(loras.folder / "ink.safetensors", 3072)
    params = open_transformer(TRANSFORMER).params
    with pytest.raises(WeightsError, match=r"for klein 4B \(width 3072\); the checkpoint in use has width 256"):
        loras.check(choose("ink"), NANO, params)
    for checkpoint in (KLEIN_4B, KLEIN_BASE_4B):
        loras.check(choose("ink"), checkpoint, None)
    for checkpoint in (KLEIN_9B, DEV, NANO):
        with pytest.raises(WeightsError) as caught:
            loras.check(choose("ink"), checkpoint, None)
        assert f"is a LoRA for klein 4B, not for {checkpoint.label}" in str(caught.value)
    with pytest.raises(RequestError, match="no LoRA called"):
        loras.check(choose("other"), KLEIN_4B, None)


def test_its_own_models_lora_passes(loras: LoraLibrary) -> None:
    write_lora(loras.folder / "ink.safetensors", NANO_WIDTH, odd=True)
    loras.check(choose("ink"), NANO, open_transformer(TRANSFORMER).params)
    loras.check(choose("ink"), NANO, None)
    # A file of one's own decides over the table.
    loras.check(choose("ink"), replace(NANO, hidden_width=1), open_transformer(TRANSFORMER).params)
    with pytest.raises(WeightsError):
        loras.check(choose("ink"), replace(NANO, hidden_width=1), None)


# --- onto the transformer ---


def test_put_on_changed_and_taken_off(loras: LoraLibrary, transformer: Transformer) -> None:
    path = write_lora(loras.folder / "ink.safetensors", odd=True)
    write_lora(loras.folder / "grain.safetensors", seed=1)
    both = (*choose("ink", 0.5), *choose("grain"))
    ink, grain = loras.apply_to(transformer, both)
    assert "8 of 12 tensors fit" in ink.report.text and "all 8 tensors fit" in grain.report.text
    assert ink.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != grain.sha256
    assert len(adapted(transformer)) == 4
    before = transformer.get_submodule("double_blocks.0.img_attn.proj")
    assert [one.sha256 for one in loras.apply_to(transformer, both)] == [ink.sha256, grain.sha256]
    assert transformer.get_submodule("double_blocks.0.img_attn.proj") is before, "what it carries is left alone"
    write_lora(path, seed=7)
    (changed,) = loras.apply_to(transformer, choose("ink"))
    assert changed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != ink.sha256
    assert loras.apply_to(transformer, ()) == []
    assert adapted(transformer) == []


def test_the_size_is_what_they_take_beside_the_weights(loras: LoraLibrary, transformer: Transformer) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape)

    def layer(name: str, **fields: torch.Tensor) -> dict[str, torch.Tensor]:
        return {f"{name}.{field}": tensor for field, tensor in fields.items()}

    write_lora(loras.folder / "plain.safetensors", rank=3)
    kinds = {
        "part": layer("transformer.transformer_blocks.0.attn.to_k", lora_A=zeros(2, 256), lora_B=zeros(256, 2)),
        "swapped": layer("transformer.norm_out.linear", lokr_w1=zeros(4, 4), lokr_w2=zeros(128, 64)),
        "lokr": layer(
            "single_blocks.0.linear1",
            lokr_w1=zeros(8, 4), lokr_w2_a=zeros(288, 3), lokr_w2_b=zeros(3, 64),
        ),
        "loha": layer(
            "double_blocks.1.img_attn.proj",
            hada_w1_a=zeros(256, 2), hada_w1_b=zeros(2, 256), hada_w2_a=zeros(256, 3), hada_w2_b=zeros(3, 256),
        ),
        "dora": layer(
            "double_blocks.0.img_attn.qkv",
            lora_A=zeros(2, 256), lora_B=zeros(768, 2), dora_scale=torch.ones(768, 1), alpha=torch.tensor(1.0),
        ),
        "diff": layer("double_blocks.0.img_attn.proj", diff=zeros(256, 256)),
    }  # fmt: skip
    for name, state in kinds.items():
        save_file(state, loras.folder / f"{name}.safetensors")
    for name in ("plain", *kinds):
        (applied,) = loras.apply_to(transformer, choose(name))
        assert not applied.report.unmatched, name
        beside = [
            buffer
            for module in transformer.modules()
            if isinstance(module, AdaptedLinear)
            for buffer in module.branches.buffers()
        ]
        assert loras.memory_bytes(choose(name), 4) == sum(buffer.nbytes for buffer in beside) > 0, name
    assert loras.memory_bytes((), 4) == loras.memory_bytes(choose("plain", 0), 4) == 0
    assert loras.memory_bytes((*choose("plain"), *choose("lokr", 2)), 2) == sum(
        loras.memory_bytes(choose(it), 2) for it in ("plain", "lokr")
    )


def test_what_cannot_be_put_on_changes_nothing(loras: LoraLibrary, transformer: Transformer) -> None:
    write_lora(loras.folder / "ink.safetensors")
    write_lora(loras.folder / "other.safetensors", 3072)
    loras.apply_to(transformer, choose("ink"))
    carried = adapted(transformer)
    for choices in (choose("other"), choose("nobody"), (*choose("ink"), *choose("other"))):
        with pytest.raises(StudioError):
            loras.apply_to(transformer, choices)
        assert adapted(transformer) == carried


def test_many_may_look_at_once(loras: LoraLibrary) -> None:
    for number in range(8):
        write_lora(loras.folder / f"{number}.safetensors", seed=number)
    found: list[object] = []
    threads = [threading.Thread(target=lambda: found.append(loras.load(choose("3"))[0][0])) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6 and len(set(map(id, found))) == 1


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 4000), flips=st.lists(st.tuples(st.integers(0, 1500), st.integers(0, 255)), max_size=4))
def test_damage_is_told_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flips: list[tuple[int, int]]
) -> None:
    loras = LoraLibrary(Settings(home=tmp_path_factory.mktemp("damaged")))
    path = write_lora(loras.folder / "ink.safetensors", 16, rank=1)
    data = bytearray(path.read_bytes())
    for place, value in flips:
        data[min(place, len(data) - 1)] = value
    path.write_bytes(data[: max(0, len(data) - cut)] if cut % 2 else data)
    entries, problems = loras.scan()
    assert len(entries) + len(problems) == 1
    try:
        loras.check(choose("ink"), NANO, open_transformer(TRANSFORMER).params)
    except StudioError as error:
        assert str(error).endswith(".")


def test_the_hash_of_a_lora_is_that_of_its_file_as_it_is_now(loras: LoraLibrary) -> None:
    path = write_lora(loras.folder / "ink.safetensors")
    (ink,) = choose("ink")
    assert loras.hash_of(ink) == hashlib.sha256(path.read_bytes()).hexdigest()
    write_lora(path, rank=8)
    os.utime(path, ns=(1, 1))
    assert loras.hash_of(ink) == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(RequestError, match="no LoRA called 'wash'"):
        loras.hash_of(choose("wash")[0])
