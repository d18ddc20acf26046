"""A folder of one's own files: what is recognised, what is offered, and what is told of the rest."""

from __future__ import annotations

import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import orjson
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from flux2_studio.checkpoints import CHECKPOINTS, DEV, KLEIN_4B, KLEIN_9B_KV, KLEIN_BASE_4B, NANO
from flux2_studio.errors import RequestError, WeightsError
from flux2_studio.events import Result
from flux2_studio.models.hub.local_checkpoints import add_local_checkpoints, find_local_files, recognise_file
from flux2_studio.request import Request
from flux2_studio.settings import ASSETS, Settings
from flux2_studio.studio import Studio
from tests.tiny import Toys


def flow(folder: Path, name: str, width: int, prefix: str = "", dtype: torch.dtype = torch.bfloat16) -> Path:
    path = folder / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    weight = torch.zeros(2, width, dtype=dtype)
    save_file({f"{prefix}txt_in.weight": weight, f"{prefix}img_in.weight": torch.zeros(1)}, path)
    return path


@pytest.mark.parametrize(
    ("name", "width", "like"),
    [
        ("flux-2-klein-4b", 7680, KLEIN_4B),
        ("flux-2-klein-base-4b", 7680, KLEIN_BASE_4B),
        ("my_Klein_4B_BASE_v3", 7680, KLEIN_BASE_4B),
        ("rebased-4b", 7680, KLEIN_4B),
        ("flux-2-klein-9b-kv-fp8", 12288, KLEIN_9B_KV),
        ("anything at all", 15360, DEV),
        ("toy", 576, NANO),
    ],
)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model."])
def test_a_transformer_finds_its_family(tmp_path: Path, name: str, width: int, like: object, prefix: str) -> None:
    (found,) = find_local_files(flow(tmp_path, name, width, prefix).parent, CHECKPOINTS)
    assert found.kind == "transformer" and found.checkpoint is not None
    checkpoint = found.checkpoint
    assert checkpoint.name == name and name in checkpoint.label and "bfloat16" in checkpoint.label
    assert checkpoint.flow.path == str(found.path.absolute()) and checkpoint.flow.size == found.path.stat().st_size
    borrowed = {"name", "label", "good_for", "flow", "licence", "hidden_width"}
    assert checkpoint.hidden_width == 2
    same = {field: value for field, value in vars(checkpoint).items() if field not in borrowed}
    assert same == {field: value for field, value in vars(like).items() if field not in borrowed}


def test_the_number_format_is_named(tmp_path: Path) -> None:
    for dtype, word in ((torch.float8_e4m3fn, "fp8"), (torch.float16, "float16"), (torch.float32, "float32")):
        found = recognise_file(flow(tmp_path, f"a-{word}", 7680, dtype=dtype), "a", CHECKPOINTS)
        assert found.checkpoint is not None and f", {word})" in found.checkpoint.label


def test_gguf_files_are_recognised(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "klein-4b-Q8.gguf", "flux")
    codes = gguf.quants.quantize(np.ones((2, 7680), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("txt_in.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (found,) = find_local_files(tmp_path, CHECKPOINTS)
    assert found.checkpoint is not None and found.checkpoint.text == KLEIN_4B.text
    assert "Q8_0" in found.checkpoint.label


def test_equal_names_are_kept_apart(tmp_path: Path) -> None:
    flow(tmp_path, "nano", 576)
    flow(tmp_path, "a/mine", 576)
    flow(tmp_path, "b/mine", 576)
    names = [found.checkpoint.name for found in find_local_files(tmp_path, CHECKPOINTS) if found.checkpoint]
    assert names == ["mine", "b/mine", "nano-2"]


def test_what_is_no_checkpoint_says_what_it_is(toys: Toys, tmp_path: Path) -> None:
    save_file({"diffusion_model.single_blocks.0.linear1.lora_A.weight": torch.zeros(1, 2)}, tmp_path / "l.safetensors")
    save_file({"something.else": torch.zeros(1)}, tmp_path / "other.safetensors")
    flow(tmp_path, "odd", 7)
    (tmp_path / "torn.safetensors").write_bytes(toys.klein.file.read_bytes()[:100])
    for name, source in (("ae", toys.autoencoder.file), ("taef2", toys.taef2)):
        (tmp_path / f"{name}.safetensors").write_bytes(source.read_bytes())
    found = {file.path.stem: file for file in find_local_files(tmp_path, CHECKPOINTS)}
    assert {name: file.kind for name, file in found.items()} == {
        "ae": "autoencoder", "l": "lora", "odd": "transformer", "other": "unknown",
        "taef2": "tiny autoencoder", "torn": "unknown",
    }  # fmt: skip
    for name, file in found.items():
        assert file.checkpoint is None
        if name == "l":  # for `models.loras`, which offers it
            assert file.reason == ""
        else:
            assert file.path.name in file.reason and file.reason.endswith("."), name
    assert "7680" in found["odd"].reason and "AE_MODEL_PATH" in found["ae"].reason


ODD_NAMES = {
    b"\xff\xfebad.safetensors": None,
    b"two\nlines\x1b[2J.safetensors": "two_lines_[2J",
    b"\xe2\x80\xaeright to left.safetensors": "_right to left",
    "Füchslein 🦊.safetensors".encode(): "Füchslein 🦊",
    b"<b>bold.safetensors": "<b>bold",
}


def test_odd_names_do_not_keep_the_page_from_starting(tmp_path: Path) -> None:
    from flux2_studio.ui.forms import fields

    whole = flow(tmp_path / "elsewhere", "whole", 576).read_bytes()
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ODD_NAMES:
        (folder / os.fsdecode(name)).write_bytes(whole)
    (folder / "torn\nfile.safetensors").write_bytes(whole[:50])
    environment = {"FLUX2_HOME": str(tmp_path), "FLUX2_CHECKPOINTS_DIR": str(folder)}
    found, notes = add_local_checkpoints(Settings.from_environment(environment))
    offered = {it.name for it in found.checkpoints} - {it.name for it in CHECKPOINTS}
    assert offered == {name for name in ODD_NAMES.values() if name}
    assert all(it.label.isprintable() for it in found.checkpoints)
    dropdown = fields.checkpoint(found.checkpoints, found.default_checkpoint)
    assert offered <= {name for _, name in orjson.loads(orjson.dumps(dropdown.get_config()))["choices"]}
    assert len(notes) == 2 and all(note.isprintable() for note in orjson.loads(orjson.dumps(notes)))
    assert any(r"'\udcff\udcfebad.safetensors' is no text: rename it." in note for note in notes)
    assert any("torn_file.safetensors is not a whole" in note.replace("?", "_") for note in notes)


def test_a_file_that_goes_while_it_is_looked_at(tmp_path: Path) -> None:
    found = recognise_file(tmp_path / "gone.safetensors", "gone", CHECKPOINTS)
    assert found.kind == "unknown" and found.reason.startswith("gone.safetensors went")


def test_hidden_files_are_left_alone(tmp_path: Path) -> None:
    hidden = tmp_path / ".home" / "mine"  # where the folder itself lies does not matter
    for name in (".hidden", "._mine", ".cache/whole", "seen/.trash/old"):
        flow(hidden, name, 576)
    assert find_local_files(hidden, CHECKPOINTS) == []
    flow(hidden, "seen/whole", 576)
    assert [file.path.stem for file in find_local_files(hidden, CHECKPOINTS)] == ["whole"]


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="FLUX2_CHECKPOINTS_DIR"):
        find_local_files(tmp_path / "nowhere", CHECKPOINTS)


def test_settings_take_the_folder_in(tmp_path: Path) -> None:
    flow(tmp_path / "mine", "special", 576)
    flow(tmp_path / "mine", "odd", 7)
    given = {
        "FLUX2_HOME": str(tmp_path),
        "FLUX2_CHECKPOINTS_DIR": str(tmp_path / "mine"),
        "FLUX2_CHECKPOINT": "special",
    }
    found, notes = add_local_checkpoints(Settings.from_environment(given))
    assert found.checkpoint(None).label.startswith("special") and len(found.checkpoints) == len(CHECKPOINTS) + 1
    assert len(notes) == 1 and "odd.safetensors" in notes[0]
    with pytest.raises(RequestError, match="'other'"):
        add_local_checkpoints(Settings.from_environment(given | {"FLUX2_CHECKPOINT": "other"}))
    plain = Settings.from_environment({"FLUX2_HOME": str(tmp_path)})
    assert add_local_checkpoints(plain) == (plain, [])


def test_ones_own_file_draws(tmp_path: Path) -> None:
    mine = tmp_path / "own" / "my drawing model.safetensors"
    mine.parent.mkdir()
    mine.write_bytes((ASSETS / "nano" / "transformer.safetensors").read_bytes())
    (found,) = find_local_files(mine.parent, CHECKPOINTS)
    assert found.checkpoint is not None
    studio = Studio(
        replace(Settings(home=tmp_path / "home", device="cpu"), checkpoints=(*CHECKPOINTS, found.checkpoint))
    )
    *_, last = studio.generate(Request(prompt="a fox", checkpoint="my drawing model", seed=1))
    assert isinstance(last, Result)


@given(st.binary(max_size=300), st.one_of(st.none(), st.integers(0, 2**64 - 1)))
def test_rubbish_is_an_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, body: bytes, length: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "rubbish.safetensors"
    path.write_bytes(body if length is None else struct.pack("<Q", length) + body)
    found = recognise_file(path, "rubbish", CHECKPOINTS)
    assert found.checkpoint is None and found.reason


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(allow_nan=False),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["txt_in.weight", "shape", "dtype", "data_offsets", "x"]), inner, max_size=4
            )
        ),
        max_leaves=12,
    )
)
def test_hostile_headers_are_an_error_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, header: object
) -> None:
    path = tmp_path_factory.getbasetemp() / "hostile.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    found = recognise_file(path, "hostile", CHECKPOINTS)
    assert found.checkpoint is not None or found.reason
