"""How good is what ships? Fresh samples of every kind, drawn by the very code that users run, judged, in figures.

Checkpoints are loaded by `ModelManager` and drawn with the engine, as `Studio` does it: nano in 4 steps, nano-base in
20 with guidance. Samples, noise and judges have fixed seeds, so that the same weights give the same figures.

    python -m tools.nano.evaluate --data DIR [--classifier FILE] [--sheet PNG] [--card assets/nano/README.md]
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measuring import machine
from flux2_studio.checkpoints import Checkpoint
from flux2_studio.engine.flux.latents import initial_noise
from flux2_studio.engine.flux.sampling import denoise
from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.engine.text.encoder import TextEncoder
from flux2_studio.engine.vae.autoencoder import Autoencoder
from flux2_studio.errors import StudioError
from flux2_studio.images.tensors import images_from_pixels, pixels_from_image
from flux2_studio.models.checkpoint_files import CheckpointOpener
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.memory.choices import choose_device
from flux2_studio.settings import ASSETS, Settings
from tools.nano.classifier import Classifier, trained
from tools.nano.judge import TOLD_ONLY, Judge
from tools.nano.recipe import Recipe
from tools.nano.report import figures, goals, tally, write_figures
from tools.nano.scenes import STYLES, Drawings, Scene, Subject, read_subjects, sheet
from tools.nano.tasks import BACKGROUNDS, Sample, Tasks, alone, wordings

RECIPE = Path(__file__).parent / "recipes" / "cpu.json"
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "nano-quality.json"
STEPS = {"nano": 4, "nano-base": 20}
SEEDS = {"samples": 20_001, "noise": 30_001, "autoencoder": 40_001}
COUNT = 40  # samples of a kind
BASE_SHARE = 5  # nano-base takes ten times as long: it draws the first fifth of what nano draws
REWORDED = 4  # every so manyth sample is also drawn from another of its wordings
BATCH = 8  # prompts drawn at once; references go one by one, because the engine takes one set of them for a batch
TIMED = 5  # runs
ENCODED = 60  # pictures for the autoencoder's figure
SHOWN = 12  # samples of a kind on a contact sheet
TIMED_CASES = {0: "from words", 1: "an edit", 2: "two references"}
JUDGED_SELF = ("true pictures", "shuffled", "reference unchanged")


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One picture to draw: a sample in one of its wordings, with a seed."""

    sample: Sample
    prompt: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What came of it. picture: RGB [side, side, 3] in uint8; verdict: see `Judge.verdicts`."""

    asked: Asked
    picture: np.ndarray
    verdict: dict[str, bool]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint's parts on the device, without what a run keeps for the next one: each is timed as the first is."""

    checkpoint: Checkpoint
    transformer: Transformer
    text: TextEncoder
    autoencoder: Autoencoder


class Artist:
    """Draws with a loaded checkpoint at `steps`, pictures of `side` pixels."""

    def __init__(self, loaded: Loaded, judge: Judge, steps: int, side: int) -> None:
        self._loaded = loaded
        self._judge = judge
        self._steps = steps
        self._side = side

    def draw(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        """RGB pictures [side, side, 3] in uint8."""
        pictures: list[np.ndarray] = []
        for part in _parts(asked):
            pictures += self._together(part)
        return pictures

    def _together(self, asked: Sequence[Asked]) -> list[np.ndarray]:
        loaded, checkpoint = self._loaded, self._loaded.checkpoint
        guided = checkpoint.guidance_mode == "cfg"
        references = [
            loaded.autoencoder.encode(pixels_from_image(Image.fromarray(self._judge.draw(scene))))
            for scene in asked[0].sample.references
        ]
        for step in denoise(
            loaded.transformer,
            initial_noise([one.seed for one in asked], self._side, self._side, loaded.transformer.params.in_channels),
            loaded.text.encode([one.prompt for one in asked]).context,
            steps=self._steps,
            guidance=checkpoint.guidance,
            guidance_mode=checkpoint.guidance_mode,
            negative_context=loaded.text.encode([""]).context if guided else None,
            references=references,
            reference_cache=checkpoint.caches_reference_kv,
        ):
            latents = step.latents
        return [np.asarray(image) for image in images_from_pixels(loaded.autoencoder.decode(latents))]

    def seconds(self, asked: Mapping[str, Sequence[Asked]]) -> dict[str, float]:
        """Median time of one picture, warm, for each number of references that was asked for."""
        timed = {}
        for references, case in TIMED_CASES.items():
            one = next((several[:1] for several in asked.values() if _references(several) == references), None)
            if one is None:
                continue
            self.draw(one)
            took = []
            for _ in range(TIMED):
                began = time.perf_counter()
                self.draw(one)
                took.append(time.perf_counter() - began)
            timed[case] = round(statistics.median(took), 3)
        return timed

    def psnr(self, scenes: Sequence[Scene]) -> float:
        """Mean peak signal-to-noise ratio of scenes that went through the autoencoder and back, in dB."""
        found = []
        for scene in scenes:
            truth = self._judge.draw(scene)
            latent = self._loaded.autoencoder.encode(pixels_from_image(Image.fromarray(truth)))
            back = np.asarray(images_from_pixels(self._loaded.autoencoder.decode(latent))[0])
            error = np.square(truth.astype(np.float64) - back).mean()
            found.append(10 * np.log10(255**2 / error))
        return round(float(np.mean(found)), 2)


def _parts(asked: Sequence[Asked]) -> Iterator[Sequence[Asked]]:
    size = 1 if asked and asked[0].sample.references else BATCH
    for start in range(0, len(asked), size):
        yield asked[start : start + size]


def _references(asked: Sequence[Asked]) -> int:
    return len(asked[0].sample.references)


def ask(recipe: Recipe, subjects: Sequence[Subject], count: int | None) -> dict[str, list[Asked]]:
    """What to draw of each kind that the recipe teaches, in the first wording: `count` of each.

    None: `COUNT`, and of single things every known subject in every style.
    """
    asked = {}
    for number, kind in enumerate(kind for kind, weight in recipe.kinds.items() if weight > 0):
        chance = random.Random(f"{SEEDS['samples']} {kind}")
        tasks = Tasks(subjects, chance)
        if kind == "single":
            samples = _singles(tasks.known, chance)[:count]
        else:
            samples = [tasks.draw(kind) for _ in range(count or COUNT)]
        first = SEEDS["noise"] + 1000 * number
        asked[kind] = [
            Asked(sample=sample, prompt=sample.prompts[0], seed=first + index) for index, sample in enumerate(samples)
        ]
    return asked


def _singles(known: Sequence[Subject], chance: random.Random) -> list[Sample]:
    """Every known subject in every style: three rounds through the subjects, so that any beginning of it is mixed."""
    samples = []
    for round_ in range(len(STYLES)):
        for index, subject in enumerate(known):
            style, background = STYLES[(index + round_) % len(STYLES)], chance.choice(BACKGROUNDS)
            prompts = wordings(subject, style, background)
            target = alone(subject, style, background)
            samples.append(Sample(kind="single", prompts=prompts, references=(), target=target))
    return samples


def reworded(asked: Mapping[str, Sequence[Asked]]) -> list[list[Asked]]:
    """Some of every kind in another of their wordings."""
    chance = random.Random(SEEDS["samples"])
    return [
        [
            replace(one, prompt=chance.choice(one.sample.prompts[1:]))
            for one in several[::REWORDED]
            if len(one.sample.prompts) > 1
        ]
        for several in asked.values()
    ]


def judge_the_judges(judge: Judge, asked: Mapping[str, Sequence[Asked]]) -> dict[str, dict[str, Any]]:
    """Verdicts on the true pictures, on other samples' true pictures, and on references handed back as they were."""
    judged: dict[str, dict[str, Any]] = {name: {} for name in JUDGED_SELF}
    for kind, several in asked.items():
        samples = [one.sample for one in several]
        truths = [judge.draw(sample.target) for sample in samples]
        pictures = {"true pictures": truths, "shuffled": [*truths[1:], truths[0]]}
        if samples[0].references:
            pictures["reference unchanged"] = [judge.draw(sample.references[0]) for sample in samples]
        for name, given in pictures.items():
            judged[name][kind] = tally(judge.verdicts(samples, given), len(samples[0].references))
    return judged


def drawn(artist: Artist, judge: Judge, asked: Sequence[Asked]) -> list[Drawn]:
    pictures = artist.draw(asked)
    verdicts = judge.verdicts([one.sample for one in asked], pictures)
    return [
        Drawn(asked=one, picture=picture, verdict=verdict)
        for one, picture, verdict in zip(asked, pictures, verdicts, strict=True)
    ]


def examine(artist: Artist, judge: Judge, asked: Mapping[str, Sequence[Asked]]) -> dict[str, list[Drawn]]:
    """Everything asked, drawn and judged, by kind."""
    results = {}
    for kind, several in asked.items():
        results[kind] = drawn(artist, judge, several)
        good = sum(one.verdict["all"] for one in results[kind])
        print(f"  {kind:12} {good:4} of {len(several)}", flush=True)
    return results


def judged_kinds(results: Mapping[str, Sequence[Drawn]]) -> dict[str, Any]:
    return {
        kind: tally([one.verdict for one in several], len(several[0].asked.sample.references))
        for kind, several in results.items()
    }


def compared(results: Mapping[str, Mapping[str, Sequence[Drawn]]]) -> dict[str, float] | None:
    """Each model's mean over kinds of everything done, on those samples that all models drew; None with one model."""
    if len(results) < 2:
        return None
    kinds = next(iter(results.values())).keys()
    common = {kind: min(len(by_kind[kind]) for by_kind in results.values()) for kind in kinds}
    return {
        name: round(
            statistics.fmean(
                statistics.fmean(one.verdict["all"] for one in by_kind[kind][: common[kind]]) for kind in kinds
            ),
            4,
        )
        for name, by_kind in results.items()
    }


def contact_sheet(results: Mapping[str, Sequence[Drawn]], judge: Judge, side: int) -> Image.Image:
    """References and results of the first samples of each kind, captioned with the prompt and what went wrong."""
    pictures: list[tuple[np.ndarray, str]] = []
    for several in results.values():
        for one in several[:SHOWN]:
            for number, scene in enumerate(one.asked.sample.references, start=1):
                pictures.append((judge.draw(scene), f"image {number}"))
            wrong = [name for name, good in one.verdict.items() if not good and name not in (*TOLD_ONLY, "all")]
            pictures.append((one.picture, f"{'NOT ' + ', '.join(wrong) + ': ' if wrong else ''}{one.asked.prompt}"))
    return sheet(pictures, columns=SHOWN, side=side)


def autoencoder_scenes(subjects: Sequence[Subject]) -> dict[str, list[Scene]]:
    """Pictures of things that the model knows, and of others."""
    chance = random.Random(SEEDS["autoencoder"])
    groups = {"known things": [it for it in subjects if it.known], "others": [it for it in subjects if not it.known]}
    return {
        name: [
            alone(subject, chance.choice(STYLES), chance.choice(BACKGROUNDS))
            for subject in chance.sample(group, min(ENCODED, len(group)))
        ]
        for name, group in groups.items()
        if group
    }


def evaluate(options: argparse.Namespace) -> dict[str, Any]:
    """Everything measured, as JSON takes it. Raises `StudioError` for checkpoints that cannot be loaded."""
    recipe = Recipe.read(options.recipe)
    subjects = read_subjects(options.data, recipe.subjects)
    settings = replace(Settings.from_environment(), assets=options.assets, preview="off")
    names = [options.only] if options.only else list(STEPS)
    checkpoints = {name: settings.checkpoint(name) for name in names}
    classifier = the_classifier(options.classifier, options.data)
    judge = Judge(Drawings(options.data), classifier, subjects, recipe.side)
    asked = ask(recipe, subjects, options.count)
    device = choose_device(settings.device)
    opener = CheckpointOpener(settings, Hub(settings), device)
    report: dict[str, Any] = {
        "machine": machine(str(device), ("torch", "transformers", "gradio", "pillow")),
        "seeds": SEEDS,
        "side": recipe.side,
        "subjects": recipe.subjects,
        "classifier": {"classes": len(classifier.subjects), **classifier.facts},
        "judges": judge_the_judges(judge, asked),
        "models": {},
    }
    results: dict[str, dict[str, list[Drawn]]] = {}
    for name, checkpoint in checkpoints.items():
        opened = opener.open(checkpoint, lambda text, fraction: None)
        loaded = Loaded(
            checkpoint=checkpoint,
            transformer=opened.load("flow", device),
            text=opened.load("text", device),
            autoencoder=opened.load("autoencoder", device),
        )
        print(f"{name}, {STEPS[name]} steps", flush=True)
        artist = Artist(loaded, judge, STEPS[name], recipe.side)
        share = 1 if name == "nano" else BASE_SHARE
        wanted = {kind: several[: -(-len(several) // share)] for kind, several in asked.items()}
        results[name] = examine(artist, judge, wanted)
        kinds = judged_kinds(results[name])
        verdicts = [{"all": one.verdict["all"]} for part in reworded(wanted) for one in drawn(artist, judge, part)]
        report["models"][name] = {
            "steps": STEPS[name],
            "guidance": checkpoint.guidance,
            "kinds": kinds,
            "other wordings": tally(verdicts, None) if verdicts else None,
            "seconds": artist.seconds(wanted),
        }
        report["autoencoder PSNR"] = {what: artist.psnr(them) for what, them in autoencoder_scenes(subjects).items()}
        if options.sheet:
            file = options.sheet.with_stem(f"{options.sheet.stem}-{name}")
            contact_sheet(results[name], judge, recipe.side).save(file)
            print(f"contact sheet in {file}")
    report["paired"] = compared(results)
    report["goals"] = goals(report)
    return report


def the_classifier(file: Path | None, data: Path) -> Classifier:
    """The one in `file`; where there is none yet, one is trained, which takes minutes, and kept there."""
    if file and file.exists():
        return Classifier.load(file)
    print("training the classifier", flush=True)
    classifier = trained(data)
    if file:
        classifier.save(file)
    return classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with index.json and the zips of drawings")
    parser.add_argument("--recipe", type=Path, default=RECIPE, help="what is taught (default: recipes/cpu.json)")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="folder that holds nano/ (default: the studio's)")
    parser.add_argument("--classifier", type=Path, help="its weights; trained and kept there if there are none")
    parser.add_argument("--out", type=Path, default=RESULTS, help="default: benchmarks/results/nano-quality.json")
    parser.add_argument("--sheet", type=Path, help="write contact sheets, PNG-nano.png and so on", metavar="PNG")
    parser.add_argument("--card", type=Path, help="model card into which to write the figures")
    parser.add_argument("--only", choices=list(STEPS), help="this checkpoint alone")
    parser.add_argument("--count", type=int, help=f"samples of a kind (default: {COUNT}, and all single things)")
    options = parser.parse_args()
    try:
        report = evaluate(options)
    except StudioError as error:
        raise SystemExit(str(error)) from error
    text = figures(report)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {options.out}")
    if options.card:
        write_figures(options.card, text)


if __name__ == "__main__":
    main()
