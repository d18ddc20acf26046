"""What the page says and shows: words, escaping, contact sheets, looks."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS, KLEIN_9B, KLEIN_BASE_4B, NANO
from flux2_studio.events import Preview
from flux2_studio.request import MAX_COUNT, LoraChoice, Request
from flux2_studio.settings import ASSETS
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.gradio_compat.theme import StudioTheme
from flux2_studio.ui.stage import render


@pytest.mark.parametrize(
    "seconds, words",
    [(0.01, "0.1 s"), (2.34, "2.3 s"), (42.4, "42 s"), (60, "1 min 0 s"), (125, "2 min 5 s"), (7260, "2 h 1 min")],
)
def test_duration(seconds: float, words: str) -> None:
    assert render.duration_text(seconds) == words


def preview(*, first: int, images: int, count: int, step: int = 1) -> Preview:
    pictures = (Image.new("RGB", (16, 16)),) * images
    return Preview(step=step, steps=4, images=pictures, first_index=first, count=count, seconds_left=None)


@pytest.mark.parametrize(
    "event, words, fraction",
    [
        (preview(first=0, images=1, count=1), "Step 1 of 4", "0.250"),
        (preview(first=0, images=4, count=4, step=4), "Step 4 of 4", "1.000"),
        (preview(first=4, images=4, count=16, step=2), "Pictures 5-8 of 16 · Step 2 of 4", "0.375"),
        (preview(first=15, images=1, count=16, step=4), "Picture 16 of 16 · Step 4 of 4", "1.000"),
    ],
)
def test_step_tells_the_picture_and_how_far(event: Preview, words: str, fraction: str) -> None:
    html = render.step(event)
    assert f">{words}</p>" in html
    assert f'value="{fraction}"' in html


@pytest.mark.parametrize("count", range(1, MAX_COUNT + 1))
def test_contact_sheet_has_room_for_all_and_fits(count: int) -> None:
    images = {index: Image.new("RGB", (640, 320), "red") for index in range(count)}
    sheet = render.preview_sheet(images, count)
    assert max(sheet.size) <= render.PREVIEW_SHEET_PIXELS + 100  # the gaps come on top
    red = sum(1 for pixel in sheet.resize((96, 96), Image.Resampling.NEAREST).get_flattened_data() if pixel[0] == 255)
    assert red >= 96 * 96 * 0.5


def test_contact_sheet_of_one_is_the_picture() -> None:
    image = Image.effect_noise((64, 48), 50).convert("RGB")
    assert render.preview_sheet({0: image}, 1).convert("RGB").tobytes() == image.tobytes()


def test_picture_is_carried_in_the_page() -> None:
    html = render.picture({0: Image.new("RGB", (32, 16), "teal")}, 1)
    data = re.search(r'src="data:image/webp;base64,([^"]+)"', html)
    assert data
    assert Image.open(io.BytesIO(base64.b64decode(data[1]))).size == (32, 16)


def test_a_problems_pages_can_be_opened() -> None:
    html = render.problem('Accept it at https://hub.example/a/b?c=d&e, then <go> to "http://x.example/y".')
    assert re.findall(r'href="([^"]*)"', html) == ["https://hub.example/a/b?c=d&amp;e", "http://x.example/y"]
    assert "</a>, then &lt;go&gt; to" in html and "javascript" not in html
    assert "<a" not in render.problem("javascript://x, https://")


def test_settings_escape_and_hide_folders() -> None:
    asked = Request(prompt="<script>", references=(Path("/secret/place/fox.png"),), seed=5).resolve(NANO, [(128, 128)])
    table = render.settings(asked, [5], NANO)
    assert "&lt;script&gt;" in table
    assert "<script>" not in table
    assert "LoRAs" not in table
    with_loras = replace(asked, loras=(LoraChoice(name="ink", weight=0.5), LoraChoice(name="a<b")))
    assert "ink (0.5), a&lt;b (1)" in render.settings(with_loras, [5], NANO)
    told = json.loads(render.settings_json(asked))
    assert told["references"] == ["fox.png"]
    assert "secret" not in table
    assert told["seed"] == 5


def test_about_tells_what_a_choice_costs() -> None:
    assert "on disk" in fields.checkpoint_summary_html(NANO, True)
    assert "Gated" not in fields.checkpoint_summary_html(NANO, True)
    gated = fields.checkpoint_summary_html(KLEIN_9B, False)
    assert "first run downloads up to 34.5 GB" in gated
    assert "https://huggingface.co/black-forest-labs/FLUX.2-klein-9B" in gated
    assert "HF_TOKEN" in gated
    assert "Gated" not in fields.checkpoint_summary_html(KLEIN_9B, True)
    assert "Gated" not in fields.checkpoint_summary_html(KLEIN_BASE_4B, False)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda checkpoint: checkpoint.name)
def test_every_preset_can_be_run(checkpoint) -> None:
    for aspect in fields.ASPECTS:
        width, height = fields.size_of(aspect, checkpoint)
        resolved = Request(prompt="a fox", width=width, height=height).resolve(checkpoint)
        assert (resolved.width, resolved.height) == (width, height)


@pytest.mark.parametrize("size, words", [((128, 128), "1:1"), ((1360, 768), "16:9"), ((160, 96), "1.67:1")])
def test_ratio(size: tuple[int, int], words: str) -> None:
    assert fields.ratio(*size) == words


def test_examples_can_be_run_as_they_are() -> None:
    examples = Examples.load(ASSETS / "examples")
    for table in (examples.toy, examples.full):
        assert set(table) == {"generate", "edit", "multi"}
        for form, entries in table.items():
            assert entries
            for example in entries:
                assert example.prompt
                assert all(file.is_file() for file in example.references)
                assert len(example.references) == {"generate": 0, "edit": 1, "multi": 2}[form]
    assert (ASSETS / "examples" / "LICENSE.txt").read_text(encoding="utf-8").count("Microsoft") == 1


def test_looks_need_no_network() -> None:
    theme = StudioTheme()
    assert theme._stylesheets == []
    assert set(re.findall(r"url\(\W*(\w+:)", theme._get_theme_css())) == {"data:"}
    style = (ASSETS / "style.css").read_text(encoding="utf-8")
    assert "url(" not in style
    assert "@import" not in style
