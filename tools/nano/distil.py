"""Burn guidance and the few-step schedule into a student: nano from nano-base.

The student sees real latents, noised to the very times that the sampler visits in so many steps, and learns the
teacher's guided velocity there, v = v_empty + guidance * (v_prompt - v_empty). The text encoder is shared, so it
stays as it is.

    python -m tools.nano.distil --recipe tools/nano/recipes/cpu.json --data DIR --init assets/nano --run DIR --minutes 6
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import time
from pathlib import Path

import torch

from flux2_studio.engine.flux.sampling import timestep_schedule
from flux2_studio.engine.weights.loading import load_autoencoder
from tools.nano.flow import Averaged, Feed, autocast, sequence_ids
from tools.nano.latent_store import LatentStore
from tools.nano.model import initial_text, initial_transformer
from tools.nano.recipe import Recipe
from tools.nano.scenes import Drawings, read_subjects
from tools.nano.tasks import Tasks

LOG_EVERY = 20  # steps


def distil(
    recipe: Recipe,
    data: Path,
    init: Path,
    run: Path,
    device: torch.device,
    *,
    minutes: float,
    guidance: float,
    steps: int,
    rate: float,
) -> None:
    """Write run/student.pt. Raises FileNotFoundError if the flow has not been trained yet."""
    chance = random.Random(1)
    torch.manual_seed(1)
    state = torch.load(run / "state.pt", map_location="cpu", weights_only=True)["averaged"]
    teacher = initial_transformer(init, recipe)
    teacher.load_state_dict(state["transformer"])
    teacher = teacher.to(device).eval().requires_grad_(False)
    text = initial_text(init, recipe)
    text.text_decoder.load_state_dict(state["text"])
    text = text.to(device).eval().requires_grad_(False)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    averaged = Averaged({"transformer": student}, recipe.ema)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)

    autoencoder = load_autoencoder(init / "ae.safetensors", device=device, dtype=torch.float32)
    store = LatentStore(Drawings(data), autoencoder, recipe.side)
    subjects = read_subjects(data, recipe.subjects)
    feed = Feed(recipe, Tasks(subjects, chance), store, chance, dropout=0.0, share=0.3)
    times = torch.tensor(timestep_schedule((recipe.side // 16) ** 2, steps)[:-1], device=device)
    with torch.no_grad():
        empty = text([""])
    ropes = {
        count: teacher.rope(sequence_ids(recipe.text_length, recipe.side, count))
        for count in map(int, recipe.by_references)
    }
    started, step, losses = time.monotonic(), 0, []
    while (passed := (time.monotonic() - started) / (60 * minutes)) < 1:
        samples, prompts = feed.batch()
        rope = ropes[len(samples[0].references)]
        clean, shown = (tensor.to(device) for tensor in feed.tensors(samples))
        t = times[torch.randint(len(times), (len(samples),), device=device)]
        x = torch.cat((torch.lerp(clean, torch.randn_like(clean), t[:, None, None]), shown), 1)
        with autocast(device):
            with torch.no_grad():
                context = text(prompts)
                v = teacher(x, context, t, rope, outputs=clean.shape[1]).float()
                v_empty = teacher(x, empty.expand(len(samples), -1, -1), t, rope, outputs=clean.shape[1]).float()
            predicted = student(x, context, t, rope, outputs=clean.shape[1])
        loss = (predicted.float() - torch.lerp(v_empty, v, guidance)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate * min(1.0, (step + 1) / 20) * (1 + math.cos(math.pi * passed)) / 2
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update(step)
        step += 1
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            print(f"step {step}, {passed:.0%}, loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
    torch.save(averaged.modules["transformer"].state_dict(), run / "student.pt")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--init", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True, help="folder of the trained flow")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rate", type=float, default=3e-4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    o = parser.parse_args()
    distil(
        Recipe.read(o.recipe),
        o.data,
        o.init,
        o.run,
        torch.device(o.device),
        minutes=o.minutes,
        guidance=o.guidance,
        steps=o.steps,
        rate=o.rate,
    )


if __name__ == "__main__":
    main()
