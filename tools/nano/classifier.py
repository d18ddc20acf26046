"""An eye that owes the model nothing: a small network, trained on the data set's drawings alone, never on a model's.

It says what a picture shows (of all subjects in subjects.json, so also of many that the model was never taught) and in
which style. It is trained on any background, size and place, now and then in grey or repainted, so that it goes by
shape as well as by colour, and on pictures small and sharp as well as scaled down, so that it can judge one of two
things too. The drawings' fourth style, "color", is kept from it: how well it does there says how far to trust it.

    python -m tools.nano.classifier --data DIR --out FILE.safetensors
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tools.nano.scenes import COLOURS, PAINTS, STYLES, Drawings, Item, Scene, Subject, read_subjects

SIDE = 64  # pixels of what it looks at
UNSEEN = "color"  # the style that it is never trained on; its shading is that of "3d"
SIZES = (
    0.42,
    0.56,
    0.7,
    0.84,
    0.93,
)  # few, because scaling a drawing costs more than placing it; `_jittered` varies them
CHANNELS = (3, 32, 64, 128, 256)
STYLE_WEIGHT = 0.3  # of the style's loss: three styles are learnt long before 148 subjects
BATCH = 128
LOG_EVERY = 100  # steps


@dataclass(frozen=True)
class Seen:
    """What the classifier takes a picture for. subjects: all ids, the likeliest first."""

    subjects: tuple[str, ...]
    style: str


class Network(nn.Module):
    """Pixels [B, 3, 64, 64] in 0..1 -> logits of subjects [B, S] and styles [B, 3]."""

    def __init__(self, subjects: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(CHANNELS):
            layers += [
                nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        self.stages = nn.Sequential(*layers)
        self.subject = nn.Linear(2 * CHANNELS[-1], subjects)
        self.style = nn.Linear(2 * CHANNELS[-1], len(STYLES))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stages(pixels - 0.5)
        x = torch.cat((x.mean((2, 3)), x.amax((2, 3))), 1)
        return self.subject(x), self.style(x)


class Classifier:
    """A trained network with the names of its classes. `facts` tell how it was trained and how well it does."""

    def __init__(self, network: Network, subjects: Sequence[str], facts: dict[str, Any]) -> None:
        self._network = network.eval()
        self.subjects = tuple(subjects)
        self.facts = facts

    @torch.inference_mode()
    def look(self, pictures: Sequence[np.ndarray]) -> list[Seen]:
        """What square RGB pictures in uint8, [side, side, 3] of any side, show."""
        seen = []
        for start in range(0, len(pictures), BATCH):
            stacked = _stack(scaled_down(picture) for picture in pictures[start : start + BATCH])
            subjects, styles = self._network(_pixels(stacked))
            for order, style in zip(subjects.argsort(1, descending=True).tolist(), styles.argmax(1), strict=True):
                seen.append(Seen(tuple(self.subjects[index] for index in order), STYLES[int(style)]))
        return seen

    def save(self, file: Path) -> None:
        """Write `file` (safetensors) and, beside it, its classes and facts as JSON."""
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(self._network.state_dict(), file)
        about = {"subjects": self.subjects, "facts": self.facts}
        file.with_suffix(".json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> Classifier:
        """Raises OSError for a missing file, RuntimeError for weights that are not this network's."""
        about = json.loads(file.with_suffix(".json").read_text("utf-8"))
        network = Network(len(about["subjects"]))
        network.load_state_dict(load_file(file))
        return cls(network, about["subjects"], about["facts"])


class AllDrawings(Drawings):
    """The drawings with their fourth style."""

    def __init__(self, data: Path) -> None:
        super().__init__(data)
        self._files[UNSEEN] = zipfile.ZipFile(data / f"{UNSEEN}-256.zip")


def scaled_down(picture: np.ndarray) -> np.ndarray:
    """A square RGB picture at the size that the classifier looks at."""
    if picture.shape[0] == SIDE:
        return picture
    return np.asarray(Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def train_classifier(
    data: Path, subjects: Sequence[Subject], *, steps: int = 1000, views: int = 40, batch: int = BATCH, seed: int = 0
) -> Classifier:
    """A classifier of `subjects`, trained for `steps` batches on `views` pictures of each drawing."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    began = time.monotonic()
    pictures, subject_of, style_of = _pool(data, subjects, views, chance)
    print(f"{len(pictures)} pictures in {time.monotonic() - began:.0f} s", flush=True)
    network = Network(len(subjects)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.2)
    losses: list[float] = []
    for step in range(1, steps + 1):
        chosen = torch.randint(len(pictures), (batch,))
        subject, style = network(_jittered(_pixels(pictures[chosen])))
        loss = F.cross_entropy(subject, subject_of[chosen], label_smoothing=0.1)
        loss = loss + STYLE_WEIGHT * F.cross_entropy(style, style_of[chosen], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses.append(loss.item())
        if step % LOG_EVERY == 0:
            recent = sum(losses[-LOG_EVERY:]) / LOG_EVERY
            print(f"step {step}: loss {recent:.3f}, {time.monotonic() - began:.0f} s", flush=True)
    facts = {"steps": steps, "views": views, "seed": seed, "seconds": round(time.monotonic() - began)}
    return Classifier(network, [subject.id for subject in subjects], facts)


def held_out_accuracy(
    classifier: Classifier, data: Path, *, views: int = 2, seed: int = 10_001
) -> dict[str, dict[str, float]]:
    """Accuracy on backgrounds, sizes and places of another seed, for each style, then for the style never trained on.

    Every row: n, subject top-1 and top-5; and style, which "color" has none of that the classifier could name.
    """
    drawings = AllDrawings(data)
    rows = {}
    for style in (*STYLES, UNSEEN):
        chance = random.Random(f"{seed} {style}")
        asked = [subject for subject in classifier.subjects for _ in range(views)]
        pictures = [
            drawings.render(_scene(subject, style, chance.uniform(0.45, 0.93), chance), 2 * SIDE) for subject in asked
        ]
        seen = classifier.look(pictures)
        row = {
            "n": float(len(asked)),
            "top-1": _share(subject == it.subjects[0] for subject, it in zip(asked, seen, strict=True)),
            "top-5": _share(subject in it.subjects[:5] for subject, it in zip(asked, seen, strict=True)),
        }
        if style != UNSEEN:
            row["style"] = _share(it.style == style for it in seen)
        rows[style] = row
    return rows


def _pool(data: Path, subjects: Sequence[Subject], views: int, chance: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [N, 64, 64, 3] in uint8, and the numbers of their subjects and styles [N]."""
    drawings = Drawings(data)
    pictures: list[np.ndarray] = []
    subject_of: list[int] = []
    style_of: list[int] = []
    for number, subject in enumerate(subjects):
        for style in STYLES:
            for _ in range(views):
                pictures.append(_view(drawings, subject.id, style, chance))
                subject_of.append(number)
                style_of.append(STYLES.index(style))
        drawings.scaled.cache_clear()  # these are not drawn again, and all of them together are large
    return _stack(pictures), torch.tensor(subject_of), torch.tensor(style_of)


def _view(drawings: Drawings, subject: str, style: str, chance: random.Random) -> np.ndarray:
    """One drawing as training shows it, [64, 64, 3] in uint8."""
    scene = _scene(subject, style, chance.choice(SIZES), chance)
    recoloured = chance.random()
    if recoloured < 0.15:
        scene = replace(scene, grey=True)
    elif recoloured < 0.3 and style != "line":  # nobody asks for a painted line drawing
        paint = chance.choice([paint for paint in PAINTS if paint != scene.background])
        scene = replace(scene, items=(replace(scene.items[0], paint=paint),))
    picture = scaled_down(drawings.render(scene, chance.choice((SIDE, 2 * SIDE))))
    if chance.random() < 0.35:
        blur = ImageFilter.GaussianBlur(chance.uniform(0.3, 0.9))
        picture = np.asarray(Image.fromarray(picture).filter(blur))
    return picture


def _scene(subject: str, style: str, size: float, chance: random.Random) -> Scene:
    x, y = (0.5 + chance.uniform(-1, 1) * (1 - size) / 2 for _ in range(2))
    item = Item(subject=subject, style=style, x=x, y=y, size=size)
    return Scene(background=chance.choice(list(COLOURS)), items=(item,))


def _jittered(pixels: Tensor) -> Tensor:
    """[B, 3, S, S] in 0..1, each a little scaled, shifted, recoloured and noisy. Never mirrored or turned."""
    count = len(pixels)
    scale = torch.empty(count).uniform_(0.88, 1.14)
    zero = torch.zeros(count)
    shift = torch.empty(2, count).uniform_(-0.1, 0.1)
    rows = torch.stack((scale, zero, shift[0], zero, scale, shift[1]), 1)
    grid = F.affine_grid(rows.view(count, 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels, grid, padding_mode="border", align_corners=False)
    contrast = torch.empty(count, 3, 1, 1).uniform_(0.9, 1.1)
    brightness = torch.empty(count, 3, 1, 1).uniform_(-0.05, 0.05)
    return (moved * contrast + brightness + 0.02 * torch.randn_like(moved)).clamp(0, 1)


def _stack(pictures: Iterable[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(list(pictures)))


def _pixels(pictures: Tensor) -> Tensor:
    """[B, S, S, 3] in uint8 -> [B, 3, S, S] in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def _share(hits: Iterable[bool]) -> float:
    values = list(hits)
    return round(sum(values) / len(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with index.json and the zips of drawings")
    parser.add_argument("--out", type=Path, required=True, help="where to write the weights; a .json goes beside them")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--views", type=int, default=40, help="pictures of each drawing (default: 40)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    classifier = trained(options.data, steps=options.steps, views=options.views, seed=options.seed)
    classifier.save(options.out)
    print(f"written to {options.out}")


def trained(data: Path, *, steps: int = 1000, views: int = 40, seed: int = 0) -> Classifier:
    """A classifier of everything in subjects.json, its held-out accuracy printed and among its facts."""
    subjects = [subject for subject in read_subjects(data, count=sys.maxsize) if subject.known]
    classifier = train_classifier(data, subjects, steps=steps, views=views, seed=seed)
    classifier.facts["held out"] = held_out_accuracy(classifier, data)
    for style, row in classifier.facts["held out"].items():
        print(f"{style:8}" + "".join(f"{name:>8} {value:<7.4g}" for name, value in row.items()), flush=True)
    return classifier


if __name__ == "__main__":
    main()
