"""`presets`, and `generate --preset`: the preset first, and what is said beside it counts more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from flux2_studio.cli import main as cli
from flux2_studio.cli import presets as cli_presets
from flux2_studio.errors import RequestError
from flux2_studio.provenance import metadata
from flux2_studio.request import LoraChoice
from flux2_studio.settings import PRESETS, Settings
from flux2_studio.storage.presets import Presets
from tests.command_line import ROOT, Home


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def completed(name: str, images: int = 0, **given: Any) -> dict[str, Any]:
    return cli_presets.complete_from_preset(given, name, images, Settings(home=Path("/nonexistent")))


def write(folder: Path, **request: Any) -> str:
    card = {"name": "Mine", "group": "Yours", "form": "generate", "description": "Mine.", "request": request}
    file = folder / "mine.json"
    file.write_text(json.dumps(card), encoding="utf-8")
    return str(file)


def test_the_list_names_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["presets"]) == 0
    out, err = capsys.readouterr()
    shipped = Presets.load(PRESETS).by_slug
    for slug, preset in shipped.items():
        assert f"  {slug}" in out
        assert preset.description in out
    assert err == ""
    assert cli.main(["presets", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [it["preset"] for it in listed] == list(shipped)
    assert listed[0]["request"] == dict(next(iter(shipped.values())).request)


def test_the_prompt_is_the_subject_where_there_is_a_place_for_it() -> None:
    assert completed("icon-flat") == {"prompt": "a flat icon of a fox on a yellow background"}
    assert completed("icon-flat", prompt="a bus") == {"prompt": "a flat icon of a bus on a yellow background"}
    assert completed("icon-grey", 1, prompt="my own words") == {"prompt": "my own words"}


def test_what_is_said_beside_it_counts_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = write(
        tmp_path,
        prompt="x",
        checkpoint="klein-base-4b",
        steps=30,
        count=4,
        width=512,
        height=768,
        loras=[{"name": "a"}],
    )
    assert completed(mine) == {
        "prompt": "x",
        "checkpoint": "klein-base-4b",
        "steps": 30,
        "count": 4,
        "width": 512,
        "height": 768,
        "loras": (LoraChoice(name="a"),),
    }
    other = (LoraChoice(name="b"),)
    said = completed(mine, checkpoint="klein-4b", count=1, height=640, loras=other)
    assert said == {"prompt": "x", "checkpoint": "klein-4b", "count": 1, "height": 640, "loras": other}
    assert capsys.readouterr().err.startswith("note: Left out of the preset: steps. FLUX.2 klein 4B always runs")


@pytest.mark.parametrize(
    ("name", "images", "reason"),
    [
        ("icon-flat", 1, "leave --image out"),
        ("edit-relight", 0, "give it with --image"),
        ("multi-style", 1, "give two or more"),
        ("none.json", 0, "plain file"),
        ("none", 0, "no preset called 'none'"),
    ],
)
def test_what_does_not_fit_is_told(name: str, images: int, reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        completed(name, images)


def test_drawing_with_a_preset(home: Home, tmp_path: Path) -> None:
    out = tmp_path / "line.png"
    printed, _ = home.generate(
        "--preset", "Line icon", "--prompt", "a cactus", "--seed", "3", "--no-check", "--out", out
    )
    assert printed.splitlines() == [str(out)]
    record = metadata.read_settings(out.read_bytes()).record
    assert record is not None
    assert record.request.prompt == "a line drawing of a cactus on a white background"
    grey = tmp_path / "grey.webp"
    home.generate(
        "--preset", "icon-grey", "--image", ROOT / "assets" / "examples" / "fox.png", "--no-check", "--out", grey
    )
    with Image.open(grey) as image:
        assert image.format == "WEBP"


def test_without_prompt_and_preset_nothing_is_drawn(
    home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["generate", "--out", str(tmp_path / "a.png")]) == 2
    assert "--prompt" in capsys.readouterr().err
    assert cli.main(["generate", "--preset", write(tmp_path, count=2), "--out", str(tmp_path / "a.png")]) == 2
    assert "--prompt" in capsys.readouterr().err
