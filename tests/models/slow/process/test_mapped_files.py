"""Files that become shorter while a process uses the weights that it read from them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.tiny import Toys

ROOT = Path(__file__).resolve().parents[4]


def test_files_of_ones_own_may_shrink_and_change_while_they_are_used(toys: Toys, tmp_path: Path) -> None:
    """In a process of its own: reading a mapped file that has become shorter would end it with SIGBUS."""
    settings = toys.settings(tmp_path, ["klein-4b"])
    copies: Mapping[str, str] = {name: str(tmp_path / name) for name in settings.path_overrides}
    for name, path in settings.path_overrides.items():
        (shutil.copytree if path.is_dir() else shutil.copy)(path, copies[name])
    done = subprocess.run(
        [sys.executable, "-c", USE, str(tmp_path), json.dumps(copies)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (0, "the same\n"), done.stderr


USE = """
import hashlib, json, os, sys
from pathlib import Path
import torch
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.checkpoint_files import CheckpointOpener
from flux2_studio.settings import Settings

home, copies = Path(sys.argv[1]), json.loads(sys.argv[2])
settings = Settings(
    home=home,
    device="cpu",
    dtype="float32",
    path_overrides={name: Path(path) for name, path in copies.items()},
)
opener = CheckpointOpener(settings, Hub(settings), torch.device("cpu"))
opened = opener.open(settings.checkpoint("klein-4b"), lambda *_: None)
parts = {kind: opened.load(kind, torch.device("cpu")) for kind in opened.keys}
assert set(parts) == {"flow", "autoencoder", "text", "tiny"}
modules = [getattr(part, "text_decoder", part) for part in parts.values()]


def digest():
    found = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            found.update(tensor.contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest(), parts["text"].encode(["a fox"]).context


(before, context) = digest()
files = [file for path in copies.values() for file in [Path(path), *Path(path).glob("*")] if file.is_file()]
for file in files:
    if file.suffix == ".safetensors" or file in map(Path, copies.values()):
        with file.open("r+b") as data:
            data.write(bytes(file.stat().st_size))
        os.truncate(file, 10)
(after, again) = digest()
print("the same" if after == before and again.equal(context) else "changed")
"""
