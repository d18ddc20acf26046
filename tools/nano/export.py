"""Write trained weights as what ships: a folder in the layouts of klein, small enough to be part of the studio.

Transformers in Black Forest Labs' fp8 layout: the blocks' matrices in float8_e4m3fn with a float32 scale each, the
rest in bfloat16. (Their files also carry the range of every layer's inputs, for those who multiply in fp8; these are
for storage and do without.) The text encoder in bfloat16 under the names of Qwen3ForCausalLM, with the last layer,
the final norm and the tied head that conditioning never reads, as the published ones have them.

    python -m tools.nano.export --recipe tools/nano/recipes/cpu.json --init assets/nano --run DIR --out assets/nano
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.nano.model import initial_text
from tools.nano.recipe import Recipe

FP8_MAX = torch.finfo(torch.float8_e4m3fn).max


def fp8(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A transformer's tensors in Black Forest Labs' fp8 layout, and the file's metadata."""
    out: dict[str, Tensor] = {}
    layers: dict[str, dict[str, str]] = {}
    for key, tensor in state.items():
        if "_blocks." in key and tensor.ndim == 2:
            scale = tensor.abs().max().float().clamp(min=1e-12) / FP8_MAX
            out[key] = (tensor.float() / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).contiguous()
            out[f"{key}_scale"] = scale
            layers[key.removesuffix(".weight")] = {"format": "float8_e4m3fn"}
        else:
            out[key] = tensor.bfloat16().contiguous()
    return out, {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def export(recipe: Recipe, init: Path, run: Path, out: Path) -> None:
    """Raises FileNotFoundError for a run that was not trained and distilled."""
    averaged = torch.load(run / "state.pt", map_location="cpu", weights_only=True)["averaged"]
    student = torch.load(run / "student.pt", map_location="cpu", weights_only=True)
    tensors, about = fp8(averaged["transformer"])
    save_file(tensors, _ready(out / "transformer-base.safetensors"), about)
    tensors, about = fp8(student)
    save_file(tensors, _ready(out / "transformer.safetensors"), about)

    folder = out / "text_encoder"
    if folder.resolve() != (init / "text_encoder").resolve():
        shutil.copytree(init / "text_encoder", folder, dirs_exist_ok=True)
    text = initial_text(init, recipe)
    text.text_decoder.load_state_dict(averaged["text"])
    known = load_file(init / "text_encoder" / "model.safetensors")
    trained = {
        f"model.{name}": tensor.bfloat16().contiguous() for name, tensor in text.text_decoder.state_dict().items()
    }
    if unknown := trained.keys() - known.keys():
        raise RuntimeError(f"tensors that the text encoder does not have: {sorted(unknown)}")
    save_file(known | trained, folder / "model.safetensors", {"format": "pt"})

    decoder = run / "ae.safetensors"
    if not decoder.exists():
        print(f"{decoder} is not there, so the autoencoder stays that of {init}")
    shutil.copyfile(decoder if decoder.exists() else init / "ae.safetensors", out / "ae.safetensors.part")
    (out / "ae.safetensors.part").replace(out / "ae.safetensors")
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        print(f"{file.stat().st_size / 1e6:6.2f} MB  {file.relative_to(out)}")


def _ready(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True, help="the folder that the run started from")
    parser.add_argument("--run", type=Path, required=True, help="folder of the trained and distilled flow")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    export(Recipe.read(options.recipe), options.init, options.run, options.out)


if __name__ == "__main__":
    main()
