"""The trainer of the toy checkpoints, on a data set of five polygons: pictures, prompts, a run from start to export."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from flux2_studio.settings import ASSETS
from tools.nano import flow
from tools.nano.export import fp8
from tools.nano.recipe import Recipe
from tools.nano.scenes import COLOURS, PAINTS, Drawings, Item, Scene, Subject, read_subjects
from tools.nano.tasks import Tasks, alone

NANO = ASSETS / "nano"
RECIPES = sorted((Path(flow.__file__).parent / "recipes").glob("*.json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_read_and_fit_together(path: Path) -> None:
    recipe = Recipe.read(path)
    assert recipe.kinds.keys() == recipe.pools.keys()
    tasks = Tasks([Subject(id=str(n), words=(f"thing {n}",), known=True) for n in range(5)], random.Random(0))
    taught = {str(len(tasks.draw(kind).references)) for kind in recipe.kinds}
    assert taught == recipe.by_references.keys()
    assert recipe.side % 16 == 0 and sum(recipe.by_references.values()) == pytest.approx(1)


def test_a_recipe_with_a_typing_error_is_refused(tmp_path: Path) -> None:
    content = json.loads(RECIPES[0].read_text("utf-8"))
    (tmp_path / "r.json").write_text(json.dumps(content | {"learning_rate": 1}), encoding="utf-8")
    with pytest.raises(TypeError, match="learning_rate"):
        Recipe.read(tmp_path / "r.json")


def test_scenes_are_drawn_as_described(nano_data: Path) -> None:
    drawings, (dog, *_) = Drawings(nano_data), read_subjects(nano_data, 3)
    assert [dog.name, dog.known] == ["dog", True]
    scene = alone(dog, "flat", "blue")
    picture = drawings.render(scene, 128)
    assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
    assert tuple(picture[2, 2]) == COLOURS["blue"]
    assert np.abs(picture[64, 64].astype(int) - (200, 60, 40)).max() <= 2
    grey = drawings.render(replace(scene, grey=True), 128)
    assert (grey.max(-1) == grey.min(-1)).all()
    for paint in PAINTS:
        green = drawings.render(replace(scene, items=(replace(scene.items[0], paint=paint),)), 128)[64, 64]
        asked = np.array(COLOURS[paint], dtype=float)
        assert np.corrcoef(green, asked)[0, 1] > 0.95, paint
    moved = drawings.render(replace(scene, items=(replace(scene.items[0], x=0.3, size=0.4),)), 128)
    assert tuple(moved[64, 110]) == COLOURS["blue"] and tuple(moved[64, 38]) != COLOURS["blue"]
    lit = alone(dog, "3d", "blue")  # the light comes from the upper left
    as_it_is = drawings.render(lit, 128)
    for changes, turned in (({"mirrored": True}, np.fliplr(as_it_is)), ({"turns": 1}, np.rot90(as_it_is))):
        changed = drawings.render(replace(lit, items=(replace(lit.items[0], **changes),)), 128)
        assert np.abs(changed.astype(int) - turned).mean() < 6 < np.abs(changed.astype(int) - as_it_is).mean()
    ink = drawings.render(alone(dog, "line", "black"), 128)
    assert ink.max() > 200, "lines on black are drawn in white"


def test_what_stands_partly_outside_is_cut(nano_data: Path) -> None:
    drawings = Drawings(nano_data)
    picture = drawings.render(Scene(background="white", items=(Item(subject="1f40", style="flat", x=0.0),)), 64)
    assert tuple(picture[32, 2]) != COLOURS["white"] and tuple(picture[32, 60]) == COLOURS["white"]


def test_samples_say_what_they_show(nano_data: Path) -> None:
    subjects = read_subjects(nano_data, 4)
    tasks = Tasks(subjects, random.Random(3))
    names = {subject.id: subject for subject in subjects}
    for kind in tasks.makers:
        for _ in range(30):
            sample = tasks.draw(kind)
            assert sample.kind == kind and sample.prompts and all(prompt.strip() for prompt in sample.prompts)
            if kind in ("single", "painted", "pair"):
                assert not sample.references
                for item in sample.target.items:
                    words = names[item.subject].words
                    assert all(any(word in prompt for word in words) for prompt in sample.prompts)
                background = sample.target.background
                assert background == "white" or all(background in prompt for prompt in sample.prompts)
            if kind in ("background", "remove", "grey", "paint"):
                assert sample.references[0] != sample.target
                before, after = sample.references[0].items[0], sample.target.items[0]
                assert replace(after, paint=None) == before, "the thing stays where and what it is"
            if kind == "beside":
                left, right = (item.subject for item in sample.target.items)
                assert {left, right} == {scene.items[0].subject for scene in sample.references}
                swapped = sample.references[0].items[0].subject == right
                assert all(("image 2 on the left" in p or "right of" in p) == swapped for p in sample.prompts)


def test_names_take_their_article() -> None:
    assert Subject(id="", words=("owl",), known=True).phrase() == "an owl"
    assert Subject(id="", words=("unicorn",), known=True).phrase() == "a unicorn"
    assert Subject(id="", words=("owl",), known=True).phrase(style="flat") == "a flat owl"
    assert Subject(id="", words=("grapes",), known=True, plural=True).phrase(style="red") == "red grapes"


def test_fp8_keeps_a_scale_for_every_matrix_of_a_block(tmp_path: Path) -> None:
    weight = torch.randn(8, 4) * 30
    tensors, about = fp8({"single_blocks.0.linear1.weight": weight, "img_in.weight": weight})
    assert tensors["single_blocks.0.linear1.weight"].dtype is torch.float8_e4m3fn
    assert tensors["img_in.weight"].dtype is torch.bfloat16
    restored = tensors["single_blocks.0.linear1.weight"].float() * tensors["single_blocks.0.linear1.weight_scale"]
    assert (restored - weight).abs().max() <= weight.abs().max() / 16
    assert json.loads(about["_quantization_metadata"])["layers"].keys() == {"single_blocks.0.linear1"}
    with safe_open(NANO / "transformer.safetensors", framework="pt") as shipped:
        assert "_quantization_metadata" in shipped.metadata()
