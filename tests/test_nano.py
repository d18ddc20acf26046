"""What the toy checkpoints on board draw, through `Studio.generate`: that words and references mean what they say.

These are plain cases of what the model card promises, told by colours and places; how often each kind of task
succeeds is measured by tools/nano/evaluate.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flux2_studio.events import Result
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tools.nano.scenes import COLOURS

Draw = Callable[..., np.ndarray]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(home=tmp_path_factory.mktemp("home"), device="cpu"))


@pytest.fixture(scope="module")
def draw(studio: Studio) -> Draw:
    """RGB [H, W, 3] as integers, of a request by its fields; references may be arrays."""

    def run(prompt: str, *references: np.ndarray, seed: int = 1, **fields: object) -> np.ndarray:
        files = []
        for index, pixels in enumerate(references):
            file = studio.settings.home / f"reference-{index}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(file)
            files.append(file)
        request = Request(prompt=prompt, references=tuple(files), seed=seed, **fields)  # type: ignore[arg-type]
        *_, last = studio.generate(request)
        assert isinstance(last, Result)
        return picture(last.images[0])

    return run


def picture(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def nearest(colour: np.ndarray) -> str:
    """The name of the palette's colour that is nearest to an RGB one."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) - colour)))


def background(pixels: np.ndarray) -> str:
    ring = np.concatenate([pixels[:5].reshape(-1, 3), pixels[-5:].reshape(-1, 3), pixels[:, :5].reshape(-1, 3)])
    return nearest(np.median(ring, 0))


def thing(pixels: np.ndarray) -> np.ndarray:
    """Which pixels are not background."""
    return np.abs(pixels - np.median(pixels[:5].reshape(-1, 3), 0)).max(-1) > 60


def colour_of_thing(pixels: np.ndarray) -> np.ndarray:
    mask = thing(pixels)
    assert mask.mean() > 0.03, "there is nothing but background"
    return np.median(pixels[mask], 0)


def saturation(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1) - pixels.min(-1)


@pytest.mark.parametrize("colour", sorted(COLOURS))
def test_the_background_is_the_one_asked_for(draw: Draw, colour: str) -> None:
    assert background(draw(f"a flat dog on a {colour} background")) == colour


def test_no_background_said_means_white(draw: Draw) -> None:
    assert background(draw("an octopus")) == "white"


@pytest.mark.parametrize(
    ("prompt", "channels"),  # the colour's channels from strongest to weakest
    [
        ("a flat red apple", (0,)),
        ("a flat lemon", (0, 1)),
        ("a flat tree", (1,)),
        ("a flat whale", (2,)),
        ("a red heart", (0,)),
        ("a fox", (0, 1)),
    ],
)
def test_things_have_their_colours(draw: Draw, prompt: str, channels: tuple[int, ...]) -> None:
    colour = colour_of_thing(draw(prompt))
    weakest = min(colour[channel] for channel in channels)
    assert weakest > max(colour[channel] for channel in range(3) if channel not in channels) + 20, colour


@pytest.mark.parametrize("subject", ["panda", "guitar", "snowman"])
def test_a_line_drawing_is_black_on_its_background(draw: Draw, subject: str) -> None:
    line = draw(f"a line drawing of a {subject} on a yellow background")
    assert background(line) == "yellow"
    assert nearest(colour_of_thing(line)) == "black"


def test_a_pair_stands_on_its_sides(draw: Draw) -> None:
    one = draw("a red heart on the left and a lemon on the right")
    other = draw("a lemon on the left and a red heart on the right")
    for pixels, (left, right) in ((one, ("red", "yellow")), (other, ("yellow", "red"))):
        for half, expected in ((pixels[:, :64], left), (pixels[:, 64:], right)):
            red, green, blue = colour_of_thing(half)
            assert red > blue + 50, half
            assert (green > (red + blue) / 2) == (expected == "yellow"), (expected, red, green, blue)


@pytest.mark.parametrize(
    ("prompt", "colour"),
    [
        ("make the background green", "green"),
        ("change the background to blue", "blue"),
        ("remove the background", "white"),
        ("Put it on a yellow background.", "yellow"),
    ],
)
def test_a_new_background_keeps_the_subject(draw: Draw, prompt: str, colour: str) -> None:
    source = draw("a flat penguin on a pink background", seed=5)
    edited = draw(prompt, source, seed=6)
    assert background(edited) == colour
    dark = source.max(-1) < 110  # the penguin's coat
    assert dark.sum() > 300 and (edited.max(-1) < 150)[dark].mean() > 0.8


def test_black_and_white(draw: Draw) -> None:
    source = draw("a flat strawberry on a light blue background", seed=5)
    edited = draw("make it black and white", source)
    assert saturation(source).mean() > 70 and saturation(edited).mean() < 20
    assert np.corrcoef(source.mean(-1).ravel(), edited.mean(-1).ravel())[0, 1] > 0.6, "the drawing is still there"


def test_painting_changes_the_thing_and_not_the_background(draw: Draw) -> None:
    source = draw("a flat car on a yellow background", seed=5)
    edited = draw("paint it green", source)
    assert background(edited) == "yellow"
    red, green, blue = edited[thing(source)].mean(0)
    was_red, was_green, _ = source[thing(source)].mean(0)
    assert was_red > was_green and green > red + 20 and green > blue + 20


def test_turning_into_a_line_drawing(draw: Draw) -> None:
    edited = draw("turn it into a line drawing", draw("a flat fox on a pink background"))
    assert background(edited) == "pink"
    assert nearest(colour_of_thing(edited)) == "black"


def test_replacing_keeps_the_background(draw: Draw) -> None:
    source = draw("a flat whale on a pink background")
    edited = draw("replace the whale with a lemon", source)
    assert background(edited) == "pink"
    red, green, blue = colour_of_thing(edited)
    assert red > 180 and green > 140 and blue < 120, "a lemon is yellow"


def test_the_object_of_one_on_the_background_of_another(draw: Draw) -> None:
    apple, blue = draw("a flat red apple"), draw("a flat lemon on a blue background")
    both = draw("the object of image 1 on the background of image 2", apple, blue)
    assert background(both) == "blue"
    red, green, blue_level = colour_of_thing(both)
    assert red > green + 60 and red > blue_level + 60


def test_two_references_side_by_side(draw: Draw) -> None:
    heart, lemon = draw("a flat red heart"), draw("a flat lemon")
    for first, second, left_is_red in ((heart, lemon, True), (lemon, heart, False)):
        both = draw("image 1 on the left and image 2 on the right", first, second)
        greens = [colour_of_thing(half)[1] for half in (both[:, :64], both[:, 64:])]
        assert (greens[0] < greens[1] - 40) if left_is_red else (greens[1] < greens[0] - 40), greens


def test_another_prompt_is_another_picture(draw: Draw) -> None:
    frog, rocket, again = draw("a frog"), draw("a rocket"), draw("a frog", seed=2)
    assert np.abs(frog - rocket).mean() > 3 * np.abs(frog - again).mean(), "words matter more than seeds"


def test_another_reference_is_another_picture(draw: Draw) -> None:
    cat, bus = draw("a flat cat"), draw("a flat bus")
    edits = [draw("make the background purple", source) for source in (cat, bus)]
    assert np.abs(edits[0] - edits[1]).mean() > 15
    assert np.abs(edits[0] - edits[1])[thing(cat) & ~thing(bus)].mean() > 30


@pytest.mark.parametrize("checkpoint", ["nano", "nano-base"])
def test_a_seed_is_a_picture(draw: Draw, checkpoint: str) -> None:
    first, again, other = (draw("a turtle", seed=seed, checkpoint=checkpoint) for seed in (8, 8, 9))
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_base_takes_guidance_and_a_negative_prompt(draw: Draw) -> None:
    fields = {"checkpoint": "nano-base", "steps": 8, "seed": 3}
    plain = draw("a flat dog on a red background", **fields, guidance=1.0)
    guided = draw("a flat dog on a red background", **fields, guidance=2.0)
    steered = draw("a flat dog on a red background", **fields, guidance=2.0, negative_prompt="a line drawing of a dog")
    assert background(plain) == background(guided) == background(steered) == "red"
    assert not np.array_equal(plain, guided) and not np.array_equal(guided, steered)


def test_base_edits_too(draw: Draw) -> None:
    source = draw("a flat penguin on a pink background", seed=5)
    assert background(draw("make the background green", source, checkpoint="nano-base")) == "green"
