"""What the safety check costs: seconds per picture of 1024 x 1024 and per prompt, on the CPU.

    python -m benchmarks.safety [--runs N] [--threads N]

Prints a line each, and writes benchmarks/results/safety.json.
Falconsai's classifier is timed with random weights of its size. The bar is 0.15 s per picture on two cores, which holds
for NudeNet, of which everybody has the weights; Falconsai's, which a user has to fetch, takes longer there.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.measuring import Arm, interleave, machine, summary, write
from flux2_studio.safety.falconsai import Falconsai
from flux2_studio.safety.nudity import SECOND_PASS_PIXELS, NudeNet
from flux2_studio.safety.prompt_rules import apply_prompt_rules
from flux2_studio.settings import ASSETS

SIDE = 1024
PACKAGES = ("torch", "transformers", "onnxruntime", "nudenet", "numpy", "pillow")
PROMPT = "A lighthouse on a cliff at dusk, long exposure, the beam cuts through mist over dark water. " * 20


def main() -> None:
    parser = argparse.ArgumentParser(description="Time the safety check.")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    picture = Image.open(ASSETS / "examples" / "fox.png").convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    nudenet = NudeNet()
    nudenet.load()
    with tempfile.TemporaryDirectory() as folder:
        config = ViTConfig(id2label={0: "normal", 1: "nsfw"}, label2id={"normal": 0, "nsfw": 1})
        ViTForImageClassification(config).save_pretrained(folder)
        falconsai = Falconsai(Path(folder))
        falconsai.load()
    arms = {
        "NudeNet, a drawing": Arm(run=lambda: nudenet(picture)),
        "NudeNet, noise": Arm(run=lambda: nudenet(noise)),
        "NudeNet, both looks": Arm(run=lambda: (nudenet.detect(picture), nudenet.detect(picture, SECOND_PASS_PIXELS))),
        "Falconsai": Arm(run=lambda: falconsai(picture)),
        "a prompt of 300 words": Arm(run=lambda: apply_prompt_rules(PROMPT)),
    }
    report: dict[str, Any] = {"machine": machine("cpu", PACKAGES), "seconds": {}}
    for name, seconds in interleave(arms, options.runs, 3).items():
        told = report["seconds"][name] = summary(seconds)
        print(f"{name}: " + ", ".join(f"{key} {1000 * told[key]:.1f} ms" for key in ("median", "p10", "p90")))
    print(write(report, "safety.json"))


if __name__ == "__main__":
    main()
