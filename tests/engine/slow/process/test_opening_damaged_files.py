"""Damaged files are refused in a process that may grow by 256 MB only."""

from __future__ import annotations

import json
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from flux2_studio.engine.vae.autoencoder import Autoencoder
from tests.engine.damaged import AUTOENCODER, lora_state, transformer_state

OPEN_ALL = """
import resource, sys, time
from pathlib import Path
import torch
from flux2_studio.engine.lora.file import open_lora
from flux2_studio.engine.weights.loading import open_autoencoder, open_transformer
from flux2_studio.errors import StudioError

held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + 2**28, held + 2**28))
for path in sorted(Path(sys.argv[1]).iterdir()):
    for opened in (open_transformer, open_autoencoder, open_lora):
        start = time.monotonic()
        try:
            opened(path)
            print("opened", path.name)
        except StudioError as error:
            print("refused", path.name, round(time.monotonic() - start, 2), str(error)[:200])
"""


def sparse(path: Path, start: bytes, length: int) -> None:
    """A file of `length` bytes, of which the disk holds only the first ones."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(length)


def tensors(shapes: dict[str, list[int]]) -> bytes:
    """A header of many small tensors with their data."""
    header, end = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 2 * torch.Size(shape).numel()]}
        end += 2 * torch.Size(shape).numel()
    raw = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(raw)) + raw + bytes(end)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not keep a process to a size")
def test_no_file_takes_much_time_or_memory(tmp_path: Path) -> None:
    """Opened by a process that may grow by 256 MB, of which the mapped files take up to 100."""
    chance = random.Random(6)
    sparse(tmp_path / "a long header", struct.pack("<Q", 99_000_000) + b"{", 99_000_100)
    sparse(tmp_path / "a long header of spaces", struct.pack("<Q", 2**24) + b"{" + b" " * 2**24, 2**24 + 8)
    (tmp_path / "a deep header").write_bytes(struct.pack("<Q", 2**24) + b"[" * 2**24)
    (tmp_path / "a deep entry").write_bytes(struct.pack("<Q", 2**24) + (b'{"a":' * 2**22)[: 2**24])
    (tmp_path / "tensors").write_bytes(tensors({f"{number}": [1] for number in range(150_000)}))
    flow = {name: list(tensor.shape) for name, tensor in transformer_state().items()}
    with torch.device("meta"):
        pictures = {name: list(tensor.shape) for name, tensor in Autoencoder(AUTOENCODER).state_dict().items()}
    for kind in ("double", "single"):
        blocks = {f"{kind}_blocks.{number}.none.weight": [1] for number in range(19_000)}
        (tmp_path / f"{kind} blocks").write_bytes(tensors(flow | blocks))
    levels = {f"encoder.down.{number}.block.0.conv2.weight": [1] for number in range(19_000)}
    (tmp_path / "levels").write_bytes(tensors(pictures | levels))
    layers = {f"decoder.up.0.block.{number}.conv2.weight": [1] for number in range(19_000)}
    (tmp_path / "layers").write_bytes(tensors(pictures | layers))
    wide = {"dtype": "BF16", "shape": [2**25, 1], "data_offsets": [0, 2**26]}
    raw = json.dumps({"img_in.weight": wide}).encode()
    sparse(tmp_path / "a wide model", struct.pack("<Q", len(raw)) + raw, 8 + len(raw) + 2**26)
    head = b"GGUF" + struct.pack("<I", 3)
    text = struct.pack("<Q", 4) + b"list" + struct.pack("<I", 9)
    (tmp_path / "texts").write_bytes(
        head + struct.pack("<QQ", 0, 1) + text + struct.pack("<IQ", 8, 2**60) + bytes(2**24)
    )
    (tmp_path / "fields").write_bytes(head + struct.pack("<QQ", 0, 2**60) + bytes(2**24))
    (tmp_path / "infos").write_bytes(head + struct.pack("<QQ", 2**40, 0) + bytes(2**24))
    index = tmp_path / "an index"
    index.mkdir()
    sparse(index / "model.safetensors.index.json", b"{", 2**36)
    lora = tmp_path / "a configuration"
    lora.mkdir()
    (lora / "adapter_model.safetensors").write_bytes(save(lora_state()))
    sparse(lora / "adapter_config.json", b"{", 2**36)
    for number in range(20):
        (tmp_path / f"noise {number}").write_bytes(
            struct.pack("<Q", chance.choice([9, 99, 2**20])) + chance.randbytes(99)
        )
    done = subprocess.run(
        [sys.executable, "-c", OPEN_ALL, str(tmp_path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert len(lines) == 3 * len(list(tmp_path.iterdir()))
    assert [line for line in lines if not line.startswith("refused")] == []
