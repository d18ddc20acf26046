"""Train the flow transformer together with its text encoder: rectified flow on latents, with the engine's own model.

    x_t = (1 - t) * clean + t * noise        the model learns v = noise - clean

Ids, order of the sequence and the sign of v are the engine's. A run goes by wall-clock, so that its learning rate
always ends at 0, and goes on where it was stopped.

    python -m tools.nano.flow --recipe tools/nano/recipes/cpu.json --data DIR --init assets/nano --run DIR
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flux2_studio.engine.flux.latents import REFERENCE_OFFSET, image_position_ids, text_position_ids
from flux2_studio.engine.weights.loading import load_autoencoder
from tools.nano.latent_store import LatentStore
from tools.nano.model import initial_text, initial_transformer
from tools.nano.recipe import Recipe
from tools.nano.scenes import Drawings, read_subjects
from tools.nano.tasks import Sample, Tasks

SAVE_EVERY = 180  # seconds
LOG_EVERY = 20  # steps


class Feed:
    """Batches of one number of references each, from pools of samples whose latents are in the store."""

    def __init__(
        self,
        recipe: Recipe,
        tasks: Tasks,
        store: LatentStore,
        chance: random.Random,
        *,
        dropout: float,
        share: float = 1.0,
    ) -> None:
        """dropout: share of samples that lose their prompt, which teaches the empty one. share: of the pools' sizes."""
        self._recipe = recipe
        self._dropout = dropout
        self._chance = chance
        self._store = store
        self.pools = {
            kind: [tasks.draw(kind) for _ in range(math.ceil(share * size))] for kind, size in recipe.pools.items()
        }
        self._kinds: dict[int, list[str]] = {}
        for kind, pool in self.pools.items():
            self._kinds.setdefault(len(pool[0].references), []).append(kind)
        for pool in self.pools.values():
            store.fill(scene for sample in pool for scene in (*sample.references, sample.target))

    def batch(self) -> tuple[list[Sample], list[str]]:
        """Samples, and the wording of each: sometimes with a capital and a full stop, sometimes empty."""
        shares = self._recipe.by_references
        references = int(self._chance.choices(list(shares), list(shares.values()))[0])
        kinds = self._kinds[references]
        weights = [self._recipe.kinds[kind] for kind in kinds]
        chosen = self._chance.choices(kinds, weights, k=self._recipe.batch)
        samples = [self._chance.choice(self.pools[kind]) for kind in chosen]
        return samples, [self._worded(sample) for sample in samples]

    def _worded(self, sample: Sample) -> str:
        if self._chance.random() < self._dropout:
            return ""
        prompt = self._chance.choice(sample.prompts)
        if self._chance.random() < 0.15:
            prompt = prompt[0].upper() + prompt[1:]
        return f"{prompt}." if self._chance.random() < 0.1 else prompt

    def tensors(self, samples: list[Sample]) -> tuple[Tensor, Tensor]:
        """Target tokens [B, n, 128] and the references' [B, r*n, 128]."""
        clean = self._store.stack(sample.target for sample in samples)
        count = len(samples[0].references)
        references = [self._store.stack(sample.references[i] for sample in samples) for i in range(count)]
        return clean, torch.cat(references, 1) if references else clean[:, :0]


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 on a GPU. On the CPUs tried, which lack matrix units, float32 was 1.4 times as fast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def sequence_ids(text: int, side: int, references: int) -> Tensor:
    """Ids of text, the picture's tokens and as many references of the same size."""
    h = side // 16
    parts = [image_position_ids(h, h, REFERENCE_OFFSET * i) for i in range(references + 1)]
    return torch.cat([text_position_ids(text), *parts])


class Averaged:
    """An exponential moving average of parameters, kept beside them."""

    def __init__(self, modules: dict[str, nn.Module], decay: float) -> None:
        self.modules = {name: copy.deepcopy(module).eval().requires_grad_(False) for name, module in modules.items()}
        self._decay = decay
        self._pairs: list[tuple[list[Tensor], list[Tensor]]] = [
            (list(self.modules[name].parameters()), list(module.parameters())) for name, module in modules.items()
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self._decay, (1 + step) / (10 + step))
        for averaged, current in self._pairs:
            torch._foreach_lerp_(averaged, current, 1 - decay)


def rate_at(recipe: Recipe, step: int, passed: float) -> float:
    """Share of the full learning rate after `passed` (0..1) of the run."""
    left = max(0.0, 1 - passed) / recipe.decay
    return min(1.0, (step + 1) / recipe.warmup) * min(1.0, left)


def train(
    recipe: Recipe,
    data: Path,
    init: Path,
    run: Path,
    device: torch.device,
    *,
    compiled: bool,
    stretch: float = math.inf,
) -> None:
    """Train for what is left of the recipe's minutes, or for `stretch` minutes if that is less; state goes to `run`."""
    run.mkdir(parents=True, exist_ok=True)
    chance = random.Random(0)
    torch.manual_seed(0)
    subjects = read_subjects(data, recipe.subjects)
    autoencoder = load_autoencoder(init / "ae.safetensors", device=device, dtype=torch.float32)
    store = LatentStore(Drawings(data), autoencoder, recipe.side)
    started = time.monotonic()
    feed = Feed(recipe, Tasks(subjects, chance), store, chance, dropout=recipe.caption_dropout)
    print(f"{len(store)} latents of {len(subjects)} subjects in {time.monotonic() - started:.0f} s", flush=True)

    transformer = initial_transformer(init, recipe).to(device).train()
    text = initial_text(init, recipe).to(device)
    averaged = Averaged({"transformer": transformer, "text": text.text_decoder}, recipe.ema)
    parameters = [*transformer.parameters(), *text.text_decoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=recipe.rate, betas=(0.9, 0.95), weight_decay=recipe.weight_decay, fused=True
    )
    step, elapsed = 0, 0.0
    saved = run / "state.pt"
    if saved.exists():
        state = torch.load(saved, map_location=device, weights_only=True)
        step, elapsed = state["step"], state["elapsed"]
        transformer.load_state_dict(state["transformer"])
        text.text_decoder.load_state_dict(state["text"])
        for name, module in averaged.modules.items():
            module.load_state_dict(state["averaged"][name])
        optimizer.load_state_dict(state["optimizer"])
        chance.seed(step)
        torch.manual_seed(step)
        print(f"goes on at step {step}, {elapsed / 60:.1f} minutes", flush=True)

    def save() -> None:
        state = {
            "step": step,
            "elapsed": elapsed,
            "transformer": transformer.state_dict(),
            "text": text.text_decoder.state_dict(),
            "averaged": {name: module.state_dict() for name, module in averaged.modules.items()},
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, run / "state.part")
        (run / "state.part").replace(saved)

    model: Any = torch.compile(transformer, dynamic=False) if compiled else transformer
    ropes: dict[int, Any] = {}
    sums: dict[int, list[float]] = {}
    began = last = kept_at = time.monotonic()
    total = recipe.minutes * 60
    until = min(total, elapsed + 60 * stretch)
    while elapsed < until:
        samples, prompts = feed.batch()
        references = len(samples[0].references)
        clean, shown = (tensor.to(device) for tensor in feed.tensors(samples))
        noise = torch.randn_like(clean)
        uniform = torch.rand(len(samples), device=device)
        t = recipe.shift * uniform / (1 + (recipe.shift - 1) * uniform)
        x = torch.lerp(clean, noise, t[:, None, None])
        if references not in ropes:
            ropes[references] = transformer.rope(sequence_ids(recipe.text_length, recipe.side, references))
        with autocast(device):
            context = text(prompts)
            v = model(torch.cat((x, shown), 1), context, t, ropes[references], outputs=x.shape[1])
        loss = (v.float() - (noise - clean)).square().mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        share = rate_at(recipe, step, elapsed / total)
        optimizer.param_groups[0]["lr"] = recipe.rate * share
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        averaged.update(step)
        step += 1
        now = time.monotonic()
        elapsed += now - last
        last = now
        sums.setdefault(references, []).append(loss.item())
        if not math.isfinite(sums[references][-1]):
            raise RuntimeError(f"the loss is {sums[references][-1]} at step {step}: go on from {saved} at a lower rate")
        if step % LOG_EVERY == 0:
            line = {
                "step": step,
                "minutes": round(elapsed / 60, 2),
                "samples_per_s": round(step_rate(began, now, recipe.batch, LOG_EVERY), 1),
                "rate": round(recipe.rate * share, 6),
                "norm": round(float(norm), 3),
                "loss": {str(count): round(sum(values) / len(values), 4) for count, values in sorted(sums.items())},
            }
            with (run / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            print(json.dumps(line), flush=True)
            sums, began = {}, now
        if now - kept_at > SAVE_EVERY:
            save()
            kept_at = last = time.monotonic()
    save()


def step_rate(began: float, now: float, batch: int, steps: int) -> float:
    return batch * steps / (now - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with index.json and the zips of drawings")
    parser.add_argument("--init", type=Path, required=True, help="checkpoint folder whose weights to start from")
    parser.add_argument("--run", type=Path, required=True, help="folder for the run's state and log")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--stretch", type=float, default=math.inf, help="minutes after which to stop; run again to go on"
    )
    parser.add_argument("--eager", action="store_true", help="do not compile")
    options = parser.parse_args()
    recipe = Recipe.read(options.recipe)
    train(
        recipe,
        options.data,
        options.init,
        options.run,
        torch.device(options.device),
        compiled=not options.eager,
        stretch=options.stretch,
    )


if __name__ == "__main__":
    main()
