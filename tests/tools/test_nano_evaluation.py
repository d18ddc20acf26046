"""The judges of nano's pictures, on a small data set drawn here: true pictures pass, wrong ones do not."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tools.shapes import KNOWN, drawing
from tools.nano.classifier import Classifier, Seen, train_classifier
from tools.nano.evaluate import Asked, Drawn, ask, compared, reworded
from tools.nano.judge import BACKGROUND_BOUND, CHECKS, Judge, border_colour, cut
from tools.nano.recipe import Recipe
from tools.nano.report import BEGIN, END, goals, interval, tally, write_figures
from tools.nano.scenes import COLOURS, STYLES, Drawings, Item, Scene, Subject
from tools.nano.tasks import Sample, Tasks, alone

SIDE = 96


class Silhouettes(Classifier):
    """A stand-in that needs no training: it goes by the outline of what differs from the border's colour."""

    def __init__(self, known: int) -> None:
        self.subjects = tuple(f"{number:x}" for number in range(known))
        self._templates = {
            (subject, style): framed(np.asarray(drawing(number, style).getchannel("A")) > 127)
            for number, subject in enumerate(self.subjects)
            for style in ("flat", "line")
        }

    def look(self, pictures: Sequence[np.ndarray]) -> list[Seen]:
        return [self._look(picture.astype(np.float32)) for picture in pictures]

    def _look(self, picture: np.ndarray) -> Seen:
        thing = np.abs(picture - border_colour(picture)).max(-1) > 20
        rows = np.flatnonzero(thing.any(1))
        if len(rows) < 2:  # in grey, a thing may be as light as what is behind it
            return Seen(self.subjects, "flat")
        apart = {key: float(np.abs(framed(thing) - template).mean()) for key, template in self._templates.items()}
        order = sorted(self.subjects, key=lambda subject: min(apart[subject, "flat"], apart[subject, "line"]))
        _, style = min(apart, key=lambda key: apart[key])
        middle = int(rows[len(rows) // 2])
        upper, lower = (
            part[mask].mean() for part, mask in zip(np.split(picture, [middle]), np.split(thing, [middle]), strict=True)
        )
        return Seen(tuple(order), "3d" if style == "flat" and upper > 1.2 * lower else style)


def framed(mask: np.ndarray) -> np.ndarray:
    """What `mask` holds, at one size."""
    image = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(image.crop(image.getbbox()).resize((25, 25), Image.Resampling.BOX), dtype=np.float32) / 255


@pytest.fixture(scope="module")
def trained(data: Path, subjects: list[Subject]) -> Iterator[Classifier]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train_classifier(data, subjects[:3], steps=2, views=2, batch=4)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def judge(data: Path, subjects: list[Subject]) -> Judge:
    return Judge(Drawings(data), Silhouettes(KNOWN), subjects, SIDE)


def whole_rate(judge: Judge, samples: list[Sample], pictures: list[np.ndarray]) -> float:
    return tally(judge.verdicts(samples, pictures), None)["rates"]["all"]["rate"]


def test_a_saved_classifier_sees_the_same(data: Path, trained: Classifier, tmp_path: Path) -> None:
    file = tmp_path / "new" / "eye.safetensors"
    trained.save(file)
    again = Classifier.load(file)
    drawings = Drawings(data)
    pictures = [
        drawings.render(alone(Subject(id=subject, words=("it",), known=True), "3d", "green"), side)
        for subject in trained.subjects
        for side in (64, 128)
    ]
    assert again.look(pictures) == trained.look(pictures)
    assert (again.subjects, again.facts) == (trained.subjects, trained.facts)


@pytest.mark.parametrize("kind", CHECKS)
def test_true_pictures_pass_and_other_pictures_fail(kind: str, judge: Judge, subjects: list[Subject]) -> None:
    tasks = Tasks(subjects, random.Random(kind))
    samples = [tasks.draw(kind) for _ in range(12)]
    truths = [judge.draw(sample.target) for sample in samples]
    assert whole_rate(judge, samples, truths) >= 0.9
    assert whole_rate(judge, samples, [*truths[1:], truths[0]]) <= 0.25


@pytest.mark.parametrize("kind", ["background", "remove", "style", "grey", "replace", "add", "onto", "beside", "like"])
def test_handing_the_reference_back_is_no_edit(kind: str, judge: Judge, subjects: list[Subject]) -> None:
    tasks = Tasks(subjects, random.Random(kind))
    samples = [tasks.draw(kind) for _ in range(8)]
    assert whole_rate(judge, samples, [judge.draw(sample.references[0]) for sample in samples]) <= 0.25


def verdict(judge: Judge, kind: str, target: Scene, shown: Scene, *references: Scene) -> dict[str, bool]:
    sample = Sample(kind=kind, prompts=("",), references=references, target=target)
    return judge.verdicts([sample], [judge.draw(shown)])[0]


def test_each_fault_is_found_by_its_own_check(judge: Judge, subjects: list[Subject]) -> None:
    flat = alone(subjects[0], "flat", "blue")
    elsewhere = Scene(background="light blue", items=flat.items)
    line = alone(subjects[0], "line", "blue")
    assert not verdict(judge, "single", flat, elsewhere)["background"]
    assert verdict(judge, "single", flat, elsewhere)["subject"]
    assert not verdict(judge, "single", flat, line)["style"]
    assert verdict(judge, "single", flat, line)["background"]
    assert not verdict(judge, "remove", flat, alone(subjects[1], "flat", "blue"), flat)["kept"]
    assert not verdict(judge, "grey", Scene(background="red", items=flat.items, grey=True), flat, flat)["colourless"]


def test_paint_goes_by_hue(judge: Judge, subjects: list[Subject]) -> None:
    def painted(paint: str | None) -> Scene:
        item = Item(subject=subjects[2].id, style="3d", paint=paint)
        return Scene(background="white", items=(item,))

    for paint in ("red", "orange", "yellow", "green", "blue", "purple", "pink"):
        for shown in ("red", "orange", "yellow", "green", "blue", "purple", "pink"):
            found = verdict(judge, "paint", painted(paint), painted(shown), painted(None))["paint"]
            assert found == (paint == shown), f"{shown} was taken for {paint}"
    grey = Scene(background="white", items=painted("red").items, grey=True)
    assert not verdict(judge, "paint", painted("red"), grey, painted(None))["paint"]


def test_a_drawing_that_the_classifier_does_not_know_is_told_from_its_rivals(
    judge: Judge, subjects: list[Subject]
) -> None:
    target, other = (alone(subject, "flat", "pink") for subject in subjects[-2:])
    assert not subjects[-1].known
    assert verdict(judge, "background", target, target, other)["subject"]
    assert not verdict(judge, "background", target, other, other)["subject"]


def test_no_colour_is_within_the_bound_of_two_of_the_palette() -> None:
    apart = min(float(np.linalg.norm(np.subtract(a, b))) for a, b in combinations(COLOURS.values(), 2))
    assert apart >= 2 * BACKGROUND_BOUND


def test_cut_keeps_to_the_picture_and_to_its_thing() -> None:
    picture = np.zeros((100, 100, 3), np.uint8)
    picture[:, 50:] = 255
    left, right = (cut(picture, Item(subject="1", style="3d", x=x, size=0.47)) for x in (0.26, 0.74))
    assert left.shape == right.shape == (50, 50, 3)
    assert left.max(initial=0, where=np.indices(left.shape)[1] < 48) == 0
    assert right.min(initial=255, where=np.indices(right.shape)[1] >= 2) == 255


def test_interval_is_wilsons() -> None:
    assert interval(5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    with pytest.raises(ValueError, match="no share"):
        interval(0, 0)


def recipe(**kinds: float) -> Recipe:
    return Recipe(subjects=KNOWN, side=SIDE, minutes=1, batch=1, rate=1, by_references={}, kinds=kinds, pools={})


def test_the_same_is_asked_every_time_and_every_third_of_singles_has_all_subjects(subjects: list[Subject]) -> None:
    asked = ask(recipe(single=1, style=1, onto=0), subjects, None)
    assert asked == ask(recipe(single=1, style=1, onto=0), subjects, None)
    assert list(asked) == ["single", "style"]
    items = [one.sample.target.items[0] for one in asked["single"]]
    assert len({(item.subject, item.style) for item in items}) == len(items) == 3 * KNOWN
    assert len({item.subject for item in items[:KNOWN]}) == KNOWN
    assert {item.style for item in items[:KNOWN]} == set(STYLES)
    assert all(one.prompt == one.sample.prompts[0] for one in asked["single"])
    assert all(one.prompt in one.sample.prompts[1:] for part in reworded(asked) for one in part)
    seeds = [one.seed for several in asked.values() for one in several]
    assert len(set(seeds)) == len(seeds)


def test_models_are_compared_on_what_all_of_them_drew(subjects: list[Subject]) -> None:
    sample = Tasks(subjects, random.Random(0)).draw("single")

    def results(*good: bool) -> dict[str, list[Drawn]]:
        asked = Asked(sample=sample, prompt="", seed=0)
        return {"single": [Drawn(asked=asked, picture=np.zeros(0), verdict={"all": value}) for value in good]}

    assert compared({"one": results(True)}) is None
    both = {"one": results(True, False, False, False), "two": results(True, True)}
    assert compared(both) == {"one": 0.5, "two": 1.0}


def report(**rates: float) -> dict[str, Any]:
    def kind(references: int, rate: float) -> dict[str, Any]:
        checks = {name: {"rate": rate} for name in ("subject", "style", "background", "all")}
        return {"n": 1, "references": references, "rates": checks}

    kinds = {"single": kind(0, rates["single"]), "style": kind(1, rates["edit"]), "grey": kind(1, 1.0)}
    return {"models": {"nano": {"kinds": kinds, "seconds": {"an edit": 3.5}}}, "paired": None, "side": 128}


def test_goals_are_reached_or_not_or_not_measured() -> None:
    rows = goals(report(single=0.92, edit=0.8))
    assert [row["reached"] for row in rows] == [True, False, False, True, None, None, False, True]
    assert rows[3]["measured"] == pytest.approx(0.9)  # the mean of two kinds of edits


def test_the_cards_figures_are_replaced_and_nothing_else(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        write_figures(card, "| new |")
        assert card.read_text("utf-8") == f"before\n{BEGIN}\n| new |\n{END}\nafter\n"


@pytest.mark.parametrize("content", ["nothing", BEGIN, f"{END} {BEGIN}", f"{BEGIN} {END} {BEGIN} {END}"])
def test_a_card_without_its_markers_is_left_alone(content: str, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="each once"):
        write_figures(card, "new")
    assert card.read_text("utf-8") == content
