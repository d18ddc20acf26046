"""Train the autoencoder: all of it from scratch, or the decoder alone on top of latents that must stay valid.

Loss: L1 on pixels, L1 on their gradients at three scales (icons are all edges), a pull of latents towards 0, and a
little noise on what the decoder reads. Never retrain the encoder after the flow: its latents are the flow's language.

The decoder alone, with --run: half of what it sees then are latents that the trained student drew, with the true
picture as the goal, so that it learns to finish what the transformer leaves rough.

    python -m tools.nano.autoencoder --recipe R --data DIR --out ae.safetensors --minutes 20
    python -m tools.nano.autoencoder --recipe R --data DIR --out DIR/ae.safetensors --init assets/nano --run DIR
"""

from __future__ import annotations

import argparse
import math
import random
import time
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from flux2_studio.engine.flux.latents import from_tokens
from flux2_studio.engine.flux.sampling import timestep_schedule
from flux2_studio.engine.params import AutoencoderParams
from flux2_studio.engine.vae.autoencoder import Autoencoder, pack_latent, unpack_latent
from flux2_studio.engine.weights.loading import load_autoencoder
from tools.nano.flow import Feed, autocast, sequence_ids
from tools.nano.latent_store import LatentStore, pixels_of
from tools.nano.model import initial_text, initial_transformer
from tools.nano.recipe import Recipe
from tools.nano.scenes import Drawings, Scene, read_subjects
from tools.nano.tasks import Tasks

NOISE = 0.08  # on the latent, in its own units
PULL = 5e-4
EDGES = 0.5
LOG_EVERY = 20  # steps


def edges(x: Tensor, y: Tensor) -> Tensor:
    """L1 between the horizontal and vertical differences of x and y [B, 3, H, W], at full, half and quarter size."""
    total = x.new_zeros(())
    for _ in range(3):
        d = x - y
        total = total + d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    return total / 3


def psnr(x: Tensor, y: Tensor) -> float:
    """Of pixels in -1..1, in dB."""
    return -10 * math.log10(float(((x.clamp(-1, 1) - y) / 2).square().mean()))


def train_all(
    recipe: Recipe, data: Path, out: Path, device: torch.device, *, minutes: float, channels: list[int], pictures: int
) -> None:
    """Encoder, decoder and latent statistics from scratch, on as many `pictures` of every kind."""
    params = AutoencoderParams(
        encoder_channels=tuple(channels),
        decoder_channels=tuple(channels),
        encoder_blocks=0,
        decoder_blocks=1,
        latent_channels=32,
    )
    torch.manual_seed(0)
    model = Autoencoder(params).to(device)
    drawings, pool = Drawings(data), _scenes(recipe, data, pictures)
    pixels = pixels_of(drawings.render(scene, recipe.side) for scene in pool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (passed := (time.monotonic() - started) / (60 * minutes)) < 1:
        x = pixels[torch.randint(len(pixels), (12,))].to(device)
        with autocast(device):
            z = model.encoder(x).float()
            y = model.decoder(z + NOISE * torch.randn_like(z)).float()
        loss = (y - x).abs().mean() + EDGES * edges(y, x) + PULL * z.square().mean()
        _advance(optimizer, loss, 2e-3, step, passed)
        step += 1
        if step % LOG_EVERY == 0:
            print(f"step {step}, {passed:.0%}, loss {float(loss):.4f}, {psnr(y.detach(), x):.2f} dB", flush=True)
    with torch.inference_mode():
        z = torch.cat([pack_latent(model.encoder(part.to(device))) for part in pixels[:2048].split(32)]).float()
    model.bn.running_mean.copy_(z.mean((0, 2, 3)))
    model.bn.running_var.copy_(z.var((0, 2, 3)))
    save(model, out)


def train_decoder(
    recipe: Recipe, data: Path, init: Path, run: Path, out: Path, device: torch.device, *, minutes: float, drawn: int
) -> None:
    """The decoder of `init` for `minutes`, on true latents and on `drawn` ones of the student in `run`."""
    torch.manual_seed(0)
    model = load_autoencoder(init / "ae.safetensors", device=device, dtype=torch.float32)
    drawings = Drawings(data)
    store = LatentStore(drawings, model, recipe.side)
    chance = random.Random(2)
    scenes = _scenes(recipe, data, 2500)
    store.fill(scenes)
    side = recipe.side // 16
    true = from_tokens(store.stack(scenes), side, side)
    rough, goals = _draw(recipe, data, init, run, store, chance, drawn, device)
    pictures = pixels_of(drawings.render(scene, recipe.side) for scene in [*scenes, *goals])
    held_out = _scenes(recipe, data, 64, seed=9)
    store.fill(held_out)
    held_latents = from_tokens(store.stack(held_out), side, side).to(device)
    held_pictures = pixels_of(drawings.render(scene, recipe.side) for scene in held_out).to(device)

    def measured() -> str:
        with torch.inference_mode():
            known = psnr(model.decoder(unpack_latent(model.bn.denormalise(held_latents))), held_pictures)
            last = slice(-64, None)
            theirs = model.decoder(unpack_latent(model.bn.denormalise(rough[last].to(device))))
            drawn_ones = psnr(theirs, pictures[last].to(device))
            return f"held-out true latents {known:.2f} dB, held-out drawn ones {drawn_ones:.2f} dB"

    print(f"before: {measured()}", flush=True)
    latents = torch.cat((true, rough))
    usable = len(latents) - 64
    model.decoder.train().requires_grad_(True)
    rate = 6e-4
    optimizer = torch.optim.AdamW(model.decoder.parameters(), lr=rate, weight_decay=0.0)
    started, step = time.monotonic(), 0
    while (passed := (time.monotonic() - started) / (60 * minutes)) < 1:
        half = torch.cat((torch.randint(len(true), (6,)), torch.randint(len(true), usable, (6,))))
        x = pictures[half].to(device)
        with torch.no_grad():
            z = unpack_latent(model.bn.denormalise(latents[half].to(device)))
        with autocast(device):
            y = model.decoder(z + NOISE / 2 * torch.randn_like(z)).float()
        loss = (y - x).abs().mean() + EDGES * edges(y, x)
        _advance(optimizer, loss, rate, step, passed)
        step += 1
        if step % LOG_EVERY == 0:
            print(f"step {step}, {passed:.0%}, loss {float(loss):.4f}", flush=True)
    print(f"after: {measured()}", flush=True)
    save(model, out)


def save(model: Autoencoder, out: Path) -> None:
    """In Black Forest Labs' layout, whose batch norm also counts the batches of training; nobody reads that."""
    tensors = {name: tensor.float().contiguous().cpu() for name, tensor in model.state_dict().items()}
    save_file(tensors | {"bn.num_batches_tracked": torch.tensor(0)}, out)


def _advance(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, step: int, passed: float) -> None:
    loss.backward()
    for group in optimizer.param_groups:
        torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        group["lr"] = rate * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * passed)) / 2
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _scenes(recipe: Recipe, data: Path, count: int, seed: int = 0) -> list[Scene]:
    """Pictures of every kind that the recipe teaches, references and targets."""
    tasks = Tasks(read_subjects(data, recipe.subjects), random.Random(seed))
    scenes: dict[Scene, None] = {}
    kinds = list(recipe.kinds)
    while len(scenes) < count:
        sample = tasks.draw(tasks.chance.choice(kinds))
        scenes |= dict.fromkeys((*sample.references, sample.target))
    return list(scenes)[:count]


@torch.inference_mode()
def _draw(
    recipe: Recipe,
    data: Path,
    init: Path,
    run: Path,
    store: LatentStore,
    chance: random.Random,
    count: int,
    device: torch.device,
) -> tuple[Tensor, list[Scene]]:
    """Latents [count, 128, h, w] that the student draws in four steps, and the scenes that they are meant to be."""
    student = initial_transformer(init, recipe)
    student.load_state_dict(torch.load(run / "student.pt", map_location="cpu", weights_only=True))
    student = student.to(device).eval()
    text = initial_text(init, recipe)
    text.text_decoder.load_state_dict(
        torch.load(run / "state.pt", map_location="cpu", weights_only=True)["averaged"]["text"]
    )
    text = text.to(device).eval()
    feed = Feed(recipe, Tasks(read_subjects(data, recipe.subjects), chance), store, chance, dropout=0.0, share=0.1)
    side = recipe.side // 16
    times = timestep_schedule(side * side, 4)
    latents: list[Tensor] = []
    goals: list[Scene] = []
    while len(goals) < count:
        samples, prompts = feed.batch()
        clean, shown = (tensor.to(device) for tensor in feed.tensors(samples))
        rope = student.rope(sequence_ids(recipe.text_length, recipe.side, len(samples[0].references)))
        context, x = text(prompts), torch.randn_like(clean)
        for t, t_next in pairwise(times):
            at = torch.full((len(samples),), t, device=device)
            x = x + (t_next - t) * student(torch.cat((x, shown), 1), context, at, rope, outputs=x.shape[1])
        latents.append(from_tokens(x, side, side).cpu())
        goals += [sample.target for sample in samples]
    return torch.cat(latents)[:count].clone(), goals[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="checkpoint folder; with --run, its decoder is trained on")
    parser.add_argument("--run", type=Path, help="folder of a trained and distilled flow")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--pictures", type=int, default=4000)
    parser.add_argument("--drawn", type=int, default=2500)
    parser.add_argument("--channels", type=int, nargs="+", default=[64, 64, 64, 64])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    recipe, device = Recipe.read(o.recipe), torch.device(o.device)
    if o.run is None:
        train_all(recipe, o.data, o.out, device, minutes=o.minutes, channels=o.channels, pictures=o.pictures)
    elif o.init is None:
        parser.error("--run needs --init")
    else:
        train_decoder(recipe, o.data, o.init, o.run, o.out, device, minutes=o.minutes, drawn=o.drawn)


if __name__ == "__main__":
    main()
