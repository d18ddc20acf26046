"""The trainer of the toy checkpoints really trains, on five polygons: a run from start to export."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from flux2_studio.engine.weights.loading import load_autoencoder, load_transformer
from flux2_studio.settings import ASSETS
from tools.nano import autoencoder, flow
from tools.nano.distil import distil
from tools.nano.export import export
from tools.nano.recipe import Recipe

CPU = torch.device("cpu")
NANO = ASSETS / "nano"
SMALL = Recipe(
    subjects=3,
    side=64,
    minutes=0.02,
    batch=2,
    rate=1e-4,
    text_length=32,
    by_references={"0": 0.5, "1": 0.5},
    kinds={"single": 1, "background": 1},
    pools={"single": 4, "background": 4},
)


def test_a_run_goes_on_is_distilled_and_ships(nano_data: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    flow.train(SMALL, nano_data, NANO, run, CPU, compiled=False)
    first = torch.load(run / "state.pt", weights_only=True)
    assert first["step"] >= 1
    longer = first["elapsed"] / 60 + 0.02  # however slow the machine was
    flow.train(replace(SMALL, minutes=longer), nano_data, NANO, run, CPU, compiled=False)
    second = torch.load(run / "state.pt", weights_only=True)
    assert second["step"] > first["step"] and second["elapsed"] > first["elapsed"]
    changed = [
        key
        for key, value in second["averaged"]["transformer"].items()
        if not value.equal(first["averaged"]["transformer"][key])
    ]
    assert len(changed) > 40, "every matrix learns"

    distil(SMALL, nano_data, NANO, run, CPU, minutes=0.01, guidance=2.0, steps=4, rate=1e-4)
    autoencoder.train_decoder(SMALL, nano_data, NANO, run, run / "ae.safetensors", CPU, minutes=0.005, drawn=70)
    export(SMALL, NANO, run, out)
    assert {path.name for path in out.iterdir()} == {
        "transformer.safetensors", "transformer-base.safetensors", "ae.safetensors", "text_encoder",
    }  # fmt: skip
    shipped = load_transformer(out / "transformer-base.safetensors", device=CPU, dtype=torch.float32)
    trained = second["averaged"]["transformer"]
    for key, value in shipped.state_dict().items():
        assert (value - trained[key]).norm() <= 0.04 * trained[key].norm() + 1e-6, key
    encoder = load_autoencoder(out / "ae.safetensors", device=CPU, dtype=torch.float32).encoder
    before = load_autoencoder(NANO / "ae.safetensors", device=CPU, dtype=torch.float32).encoder
    for (name, now), then in zip(encoder.state_dict().items(), before.state_dict().values(), strict=True):
        assert now.equal(then), f"{name}: the latents' language must not change"


def test_an_autoencoder_from_scratch_loads(nano_data: Path, tmp_path: Path) -> None:
    small = replace(SMALL, kinds={"single": 1})
    autoencoder.train_all(
        small, nano_data, tmp_path / "ae.safetensors", CPU, minutes=0.003, channels=[32, 32, 32, 32], pictures=40
    )
    model = load_autoencoder(tmp_path / "ae.safetensors", device=CPU, dtype=torch.float32)
    drawn = torch.zeros(1, 3, 64, 64)
    latent = model.encode(drawn)
    assert latent.shape == (1, 128, 4, 4) and model.decode(latent).shape == drawn.shape
    assert (model.bn.running_var > 0).all() and not model.bn.running_var.equal(torch.ones(128))
