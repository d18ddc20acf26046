"""A saved picture tells what made it, to us and to anyone; and a hostile file can neither hurt nor mislead a reader."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import flux2_studio
from flux2_studio.outputs.metadata import png_info, read
from flux2_studio.request import LoraChoice, Request

REQUEST = Request(
    prompt='a "quoted" fox,\nüber 狐 🦊',
    negative_prompt="",
    checkpoint="klein-base-4b",
    references=(Path("/home/someone/secret-project/face.png"),),
    width=1024,
    height=768,
    steps=50,
    guidance=4.0,
    seed=9,
    loras=(LoraChoice(name="styles/ink", weight=0.5),),
)


def written(tmp_path: Path, request: Request = REQUEST, hashes: tuple[str, ...] = ("ab" * 32,)) -> Path:
    path = tmp_path / "picture.png"
    Image.new("RGB", (64, 64)).save(path, pnginfo=png_info(request, hashes, ["cd" * 32] * len(request.loras)))
    return path


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    everything = [(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)), *chunks]
    everything += [(b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in everything
    )


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    assert read(written(tmp_path)) == {
        "prompt": 'a "quoted" fox,\nüber 狐 🦊',
        "negative_prompt": "",
        "checkpoint": "klein-base-4b",
        "references": ["ab" * 32],
        "width": 1024,
        "height": 768,
        "steps": 50,
        "guidance": 4.0,
        "seed": 9,
        "count": 1,
        "loras": [{"name": "styles/ink", "weight": 0.5, "sha256": "cd" * 32}],
    }


def test_the_parameters_make_the_same_request_again(tmp_path: Path) -> None:
    parameters = read(written(tmp_path, hashes=()))
    assert parameters is not None
    assert Request.from_dict(parameters) == replace(REQUEST, references=())


def test_no_lora_is_written_without_its_hash() -> None:
    with pytest.raises(ValueError, match="shorter"):
        png_info(REQUEST, (), ())


def test_no_path_of_a_reference_is_in_the_file_and_the_software_is(tmp_path: Path) -> None:
    path = written(tmp_path)
    content = path.read_bytes()
    assert b"secret" not in content and b"face" not in content
    assert Image.open(path).info["Software"] == f"flux2-studio {flux2_studio.__version__}"


def test_any_prompt_can_be_written(tmp_path: Path) -> None:
    for prompt in ("nul \0 byte", "🦊" * 20_000, "x\x1b[0m\r\n"):
        request = Request(prompt=prompt, negative_prompt=prompt, checkpoint="dev", seed=1)
        parameters = read(written(tmp_path, request))
        assert parameters is not None and parameters["prompt"] == prompt


def test_other_peoples_text_entries_are_read_too(tmp_path: Path) -> None:
    path = tmp_path / "other.png"
    text = json.dumps({"prompt": "hello"}).encode()
    for chunk in ((b"iTXt", b"parameters\0\0\0\0\0" + text), (b"zTXt", b"parameters\0\0" + zlib.compress(text))):
        path.write_bytes(png(chunk))
        assert read(path) == {"prompt": "hello"}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a picture",
        png(),
        png((b"tEXt", b"parameters\0{broken")),
        png((b"tEXt", b"parameters\0[1, 2]")),
        png((b"tEXt", b"parameters\0steps: 20, sampler: Euler")),
        png((b"tEXt", b"parameters\0" + b"[" * 200_000)),
        png((b"tEXt", b"parameters\0" + b'{"seed": ' + b"9" * 100_000 + b"}")),
        png((b"tEXt", b"parameters\0" + b'{"prompt": "' + b"x" * 1_000_001 + b'"}')),
        png((b"zTXt", b"parameters\0\0" + zlib.compress(b" " * 50_000_000, 1))),
        png((b"iTXt", b"parameters\0\1\0\0\0" + b"\xff" * 100)),
        png((b"tEXt", b"parameters\0{}"))[:60],
        struct.pack(">8sI4s", b"\x89PNG\r\n\x1a\n", 0xFFFFFFFF, b"tEXt") + b"parameters\0{}",
    ],
)
def test_what_cannot_be_read_is_none(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.png"
    path.write_bytes(content)
    assert read(path) is None


def test_a_huge_file_a_folder_and_no_file_are_none(tmp_path: Path) -> None:
    with (tmp_path / "huge.png").open("wb") as file:
        file.write(png((b"tEXt", b"parameters\0{}")))
        file.truncate(200 * 10**6 + 1)
    assert read(tmp_path / "huge.png") is None
    assert read(tmp_path) is None
    assert read(tmp_path / "none.png") is None
    assert read(Path("a\0b")) is None


def test_another_format_is_none_even_with_the_same_entry(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", comment=b"parameters")
    assert read(tmp_path / "a.jpg") is None
