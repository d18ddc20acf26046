"""The whole story through `Studio.generate`: real pictures by nano, and every checkpoint's path on toys."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

from flux2_studio.engine.flux.transformer import Transformer
from flux2_studio.errors import DeviceError, OutOfMemory, RequestError, SaveError, StudioError, WeightsError
from flux2_studio.events import Event, Notice, Preview, Result, Status, Stopped
from flux2_studio.models.hub.repositories import Hub, ProgressCallback
from flux2_studio.models.manager import ModelManager
from flux2_studio.models.memory.plan import MemoryPlan
from flux2_studio.models.session import Sampler, Session
from flux2_studio.provenance import metadata
from flux2_studio.request import Request
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tests.tiny import TOY_NAMES, Toys


@pytest.fixture(scope="module")
def nano(tmp_path_factory: pytest.TempPathFactory) -> Studio:
    return Studio(Settings(home=tmp_path_factory.mktemp("home"), device="cpu"))


def run(studio: Studio, **fields: object) -> tuple[list[Event], Result]:
    events = list(studio.generate(Request(**fields)))  # type: ignore[arg-type]
    assert isinstance(events[-1], Result)
    return events, events[-1]


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def of(kind: type, events: list[Event]) -> list[Event]:
    return [event for event in events if isinstance(event, kind)]


def seed_in(path: Path) -> int | None:
    found = metadata.read_settings(path.read_bytes())
    assert found.record is not None, found.problem
    return found.record.request.seed


def border(image: np.ndarray) -> np.ndarray:
    """The mean colour along the picture's edge."""
    return np.concatenate([image[:6].reshape(-1, 3), image[-6:].reshape(-1, 3), image[:, :6].reshape(-1, 3)]).mean(0)


def test_a_prompt_becomes_the_picture_it_asks_for(nano: Studio) -> None:
    events, result = run(nano, prompt="a flat red apple on a yellow background", seed=3)
    picture = pixels(result.images[0])
    assert picture.shape == (128, 128, 3)
    red, green, blue = border(picture)
    assert red > 200 and green > 150 and blue < 120, "the background is yellow"
    red, green, blue = picture[44:90, 44:84].reshape(-1, 3).mean(0)
    assert red > 170 and green < 100 and blue < 100, "the apple is red"
    previews = of(Preview, events)
    assert [event.step for event in previews] == [1, 2, 3, 4]
    assert all(event.images[0].size == (128, 128) for event in previews)
    assert previews[-1].seconds_left == 0
    assert seed_in(result.images[0]) == 3


def test_an_edit_does_what_it_is_told_and_keeps_the_rest(nano: Studio) -> None:
    _, source = run(nano, prompt="a flat penguin on a pink background", seed=5)
    _, edit = run(nano, prompt="make the background green", references=source.images, seed=6)
    before, after = pixels(source.images[0]), pixels(edit.images[0])
    red, green, blue = border(after)
    assert green > red + 40 and green > blue + 40
    # the penguin's dark body is where it was
    dark = (before.max(-1) < 90) & (np.indices(before.shape[:2])[0] > 20)
    assert dark.sum() > 200 and (after.max(-1) < 130)[dark].mean() > 0.7


def test_two_references_are_both_used(nano: Studio) -> None:
    _, apple = run(nano, prompt="a flat red apple", seed=1)
    _, blue = run(nano, prompt="a flat lemon on a blue background", seed=1)
    prompt = "the object of image 1 on the background of image 2"
    _, both = run(nano, prompt=prompt, references=apple.images + blue.images, seed=2)
    picture = pixels(both.images[0])
    red, green, blue_level = border(picture)
    assert blue_level > 150 and blue_level > red + 60, "the background of image 2"
    red, green, blue_level = picture[50:90, 44:84].reshape(-1, 3).mean(0)
    assert red > green + 60 and red > blue_level + 60, "the object of image 1"


def test_the_same_seed_is_the_same_picture_and_another_is_not(nano: Studio) -> None:
    first = pixels(run(nano, prompt="a frog", seed=8)[1].images[0])
    assert np.array_equal(first, pixels(run(nano, prompt="a frog", seed=8)[1].images[0]))
    assert not np.array_equal(first, pixels(run(nano, prompt="a frog", seed=9)[1].images[0]))


def test_pictures_of_a_batch_are_those_of_their_seeds(nano: Studio) -> None:
    _, batch = run(nano, prompt="a house on a gray background", seed=20, count=3)
    assert batch.seeds == (20, 21, 22) and len(set(batch.images)) == 3
    for path, seed in zip(batch.images, batch.seeds, strict=True):
        single = pixels(run(nano, prompt="a house on a gray background", seed=seed)[1].images[0])
        assert abs(pixels(path) - single).max() <= 1
        assert seed_in(path) == seed


def test_what_was_altered_is_said(nano: Studio) -> None:
    events, result = run(nano, prompt="a cat " + "very " * 80, width=100, height=128)
    notices = " ".join(event.text for event in of(Notice, events))
    assert result.request.width == 96 and "from 100 to 96" in notices
    assert "too long" in notices and "32 tokens" in notices


def test_mistakes_are_refused_before_any_work(nano: Studio, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"not a picture")
    for fields in (
        {"checkpoint": "sdxl"},
        {"steps": 20},
        {"guidance": 3.0},
        {"negative_prompt": "blurry"},
        {"width": 5000},
        {"references": (rubbish,)},
    ):
        with pytest.raises(RequestError):
            next(nano.generate(Request(prompt="a cat", **fields)))  # type: ignore[arg-type]


class Cramped(torch.nn.Module):
    """A transformer on a device that has no room for more than `most` pictures at once."""

    def __init__(self, whole: Transformer, most: int) -> None:
        super().__init__()
        self._whole = whole
        self._most = most
        self.params, self.dtype, self.device = whole.params, whole.dtype, whole.device
        self.rope, self.modulations = whole.rope, whole.modulations

    def velocity(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if x.shape[0] > self._most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self._whole.velocity(x, *args, **kwargs)


class Watched:
    """A session in which something happens to what is drawn with, under a plan for `most` pictures at once."""

    def __init__(self, session: Session, most: int, happens: Callable[[Transformer], Transformer]) -> None:
        self._session = session
        self._happens = happens
        self.plan = replace(session.plan, batch_size=min(session.plan.batch_size, most))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def prepare_transformer(self, progress: ProgressCallback, batch_size: int = 1) -> Sampler:
        drawn = self._session.prepare_transformer(progress, batch_size)
        return replace(drawn, transformer=self._happens(drawn.transformer))


class Watching(ModelManager):
    """Models whose plans are for `believed` pictures at once; `happens` to each transformer before it is used."""

    believed = 2

    def __init__(self, settings: Settings, happens: Callable[[Transformer], Transformer]) -> None:
        super().__init__(settings, Hub(settings))
        self.happens = happens
        self.plans: list[MemoryPlan] = []

    def open(self, *args: Any, **kwargs: Any) -> Session:
        session = super().open(*args, **kwargs)
        self.plans.append(session.plan)
        return cast(Session, Watched(session, self.believed, self.happens))


class SmallDevice(Watching):
    """Models on a device that holds `most` pictures at once; in its first `tight` drawings it holds none."""

    most, tight = 1, 0

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings, self._cramped)

    def _cramped(self, whole: Transformer) -> Transformer:
        self.tight -= 1
        return cast(Transformer, Cramped(whole, self.most if self.tight < 0 else 0))


@pytest.fixture
def small(nano: Studio) -> tuple[Studio, SmallDevice]:
    models = SmallDevice(nano.settings)
    return Studio(nano.settings, models), models


def test_stopping_between_steps_keeps_what_was_finished(small: tuple[Studio, SmallDevice]) -> None:
    studio, models = small
    models.believed = 1
    seen: list[Event] = []

    def cancelled() -> bool:
        return any(isinstance(event, Preview) and event.first_index == 1 and event.step == 2 for event in seen)

    for event in studio.generate(Request(prompt="a cat", seed=4, count=3), cancelled):
        seen.append(event)
    assert isinstance(seen[-1], Stopped) and seen[-1].seeds == (4,) and seen[-1].images[0].is_file()
    assert [(event.first_index, event.step) for event in seen if isinstance(event, Preview)][-1] == (1, 2)


def test_a_run_that_is_cancelled_before_it_begins_stops(tmp_path: Path) -> None:
    events = list(Studio(Settings(home=tmp_path, device="cpu")).generate(Request(prompt="a cat"), lambda: True))
    assert events == [Stopped()]


def test_a_batch_that_does_not_fit_is_halved_and_said(small: tuple[Studio, SmallDevice]) -> None:
    studio, models = small
    events, result = run(studio, prompt="a cat", seed=1, count=3)
    assert result.seeds == (1, 2, 3) and "1 at a time" in " ".join(event.text for event in of(Notice, events))
    previews = of(Preview, events)
    assert previews[-1].seconds_left == 0 and previews[0].seconds_left > 0
    assert len(models.plans) == 1, "which is no reason to load anything anew"


def test_one_picture_that_does_not_fit_is_tried_once_more_with_less(small: tuple[Studio, SmallDevice]) -> None:
    studio, models = small
    models.tight = 1
    events, result = run(studio, prompt="a cat", seed=1)
    notices = [event.text for event in of(Notice, events)]
    assert any("ran out" in text and "once more" in text for text in notices)
    planned, leaner = models.plans
    assert leaner.peak < planned.peak
    begun = [event.text for event in of(Status, events) if event.fraction is None]
    loading = [text for text in begun if text.startswith("Loading")]
    assert sum("transformer" in text for text in loading) == 2, "everything was freed in between"
    whole = pixels(run(studio, prompt="a cat", seed=1)[1].images[0])
    assert abs(pixels(result.images[0]) - whole).max() <= 1
    assert models.plans[-1].peak == leaner.peak, "it is not tried in vain again"
    assert leaner.limit < planned.peak < leaner.budget, "what is made use of, and what there is"


def test_pictures_that_are_finished_are_not_drawn_again(small: tuple[Studio, SmallDevice]) -> None:
    studio, models = small
    models.believed = 1
    seen: list[Event] = []
    for event in studio.generate(Request(prompt="a cat", seed=4, count=2)):
        if isinstance(event, Preview) and event.first_index == 0:
            models.tight = 1  # the second one's first try
        seen.append(event)
    assert isinstance(seen[-1], Result) and seen[-1].seeds == (4, 5) and len(set(seen[-1].images)) == 2
    assert len(models.plans) == 2
    steps = [(event.first_index, event.step) for event in of(Preview, seen)]
    assert steps == [(0, 1), (0, 2), (0, 3), (0, 4), (1, 1), (1, 2), (1, 3), (1, 4)]


def test_what_never_fits_is_told_in_words_and_leaves_the_studio_usable(small: tuple[Studio, SmallDevice]) -> None:
    studio, models = small
    models.most = 0
    with pytest.raises(OutOfMemory, match="smaller"):
        list(studio.generate(Request(prompt="a cat")))
    assert len(models.plans) == 2, "one more try, not many"
    models.most = 1
    run(studio, prompt="a cat")


def test_other_errors_are_not_taken_for_memory(nano: Studio) -> None:
    def broken(transformer: Transformer) -> Transformer:
        raise RuntimeError("shape mismatch")

    models = Watching(nano.settings, broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        list(Studio(nano.settings, models).generate(Request(prompt="a cat")))
    assert len(models.plans) == 1


def test_memory_that_runs_out_while_loading_is_told_in_words(nano: Studio) -> None:
    def full(transformer: Transformer) -> Transformer:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(OutOfMemory, match="smaller checkpoint"):
        list(Studio(nano.settings, Watching(nano.settings, full)).generate(Request(prompt="a cat")))


def test_what_cannot_fit_is_refused_before_anything_is_loaded(nano: Studio) -> None:
    studio = Studio(replace(nano.settings, memory_limit_gb=0.06))
    seen: list[Event] = []
    with pytest.raises(OutOfMemory, match=r"at 256 x 256 needs about .* GB.* would fit"):
        seen.extend(studio.generate(Request(prompt="a cat", width=256, height=256)))
    assert not [event for event in seen if "Loading" in getattr(event, "text", "")]
    with pytest.raises(OutOfMemory):
        studio.estimate_run(Request(prompt="a cat", width=256, height=256))


def test_how_a_request_will_fit_can_be_asked_before(nano: Studio) -> None:
    plain = nano.estimate_run(Request(prompt="a cat"))
    assert plain.memory_fit.startswith("Fits: ")
    assert nano.estimate_run(Request(prompt="a cat"), [(512, 512)] * 2).memory_fit != plain.memory_fit
    elsewhere = Studio(replace(nano.settings, path_overrides={"KLEIN_4B_MODEL_PATH": Path("nowhere")}))
    missing = elsewhere.estimate_run(Request(prompt="a cat", checkpoint="klein-4b"))
    assert (missing.memory_fit, missing.seconds, missing.is_on_disk) == ("", None, False)


def test_a_failed_load_keeps_nothing_alive(nano: Studio) -> None:
    alive: list[weakref.ref[object]] = []

    class Half:
        pass

    def failing(transformer: Transformer) -> Transformer:
        half = Half()
        alive.append(weakref.ref(half))
        raise WeightsError("no")

    studio = Studio(nano.settings, Watching(nano.settings, failing))
    gc.disable()  # what only the garbage collector frees may stay for long, and be gigabytes
    try:
        with contextlib.suppress(WeightsError):
            list(studio.generate(Request(prompt="a cat")))
        assert alive[0]() is None
    finally:
        gc.enable()


def test_numbers_beyond_the_precision_are_told_instead_of_drawn(nano: Studio) -> None:
    def overflowing(transformer: Transformer) -> Transformer:
        transformer.final_layer.linear.weight = torch.nn.Parameter(
            torch.full_like(transformer.final_layer.linear.weight, float("inf")), requires_grad=False
        )
        return transformer

    studio = Studio(nano.settings, Watching(nano.settings, overflowing))
    with pytest.raises(DeviceError, match="bfloat16"):
        list(studio.generate(Request(prompt="a cat")))


def test_a_home_that_cannot_be_written_is_told_before_any_work(tmp_path: Path) -> None:
    occupied = tmp_path / "home"
    occupied.write_text("a file")
    with pytest.raises(SaveError):
        next(Studio(Settings(home=occupied, device="cpu")).generate(Request(prompt="a cat")))


def test_a_negative_prompt_that_does_nothing_or_is_too_long_is_told(toys: Toys, tmp_path: Path) -> None:
    studio = Studio(toys.settings(tmp_path, ["klein-base-4b"]))
    fields = {"prompt": "a house", "steps": 1, "width": 64, "height": 64, "watermark": False}
    events, _ = run(studio, **fields, negative_prompt="blue", guidance=1.0)
    assert "no effect" in " ".join(event.text for event in of(Notice, events))
    events, _ = run(studio, **fields, negative_prompt="blue " * 700, guidance=2.0)
    assert "The negative prompt is too long" in " ".join(event.text for event in of(Notice, events))
    events, _ = run(studio, **fields, negative_prompt="blue", guidance=2.0)
    assert not of(Notice, events)


@pytest.mark.parametrize("name", TOY_NAMES)
def test_every_kind_of_checkpoint_runs(toys: Toys, tmp_path: Path, name: str) -> None:
    studio = Studio(toys.settings(tmp_path, [name]))
    checkpoint = studio.settings.checkpoint(name)
    fields: dict[str, object] = {} if checkpoint.steps_fixed else {"steps": 2}
    if checkpoint.supports_negative_prompt:
        fields["negative_prompt"] = "blue"
    source = tmp_path / "source.png"
    Image.linear_gradient("L").convert("RGB").resize((80, 64)).save(source)
    events, drawn = run(studio, prompt="a red house", width=96, height=64, seed=1, **fields)
    assert pixels(drawn.images[0]).shape == (64, 96, 3)
    assert len(of(Preview, events)) == drawn.request.steps
    _, edited = run(studio, prompt="a red house", references=(source,), seed=1, **fields)
    assert pixels(edited.images[0]).shape == (64, 80, 3)
    _, other = run(studio, prompt="a red house", references=(source, source), width=80, height=64, seed=1, **fields)
    assert not np.array_equal(pixels(edited.images[0]), pixels(other.images[0])), "the second reference counts"


def test_a_swap_moves_only_what_differs(toys: Toys, tmp_path: Path) -> None:
    studio = Studio(toys.settings(tmp_path, ["klein-4b", "klein-base-4b"]))

    def loaded(name: str, **fields: object) -> str:
        events, _ = run(studio, prompt="a house", checkpoint=name, width=64, height=64, **fields)
        return " ".join(event.text for event in of(Status, events) if event.text.startswith("Loading"))

    first = loaded("klein-4b")
    assert all(part in first for part in ("text encoder", "transformer", "autoencoder"))
    assert not loaded("klein-4b")
    second = loaded("klein-base-4b", steps=1)
    assert "transformer" in second and "text encoder" not in second and "autoencoder" not in second


def test_a_preview_that_cannot_be_had_is_told_and_the_picture_made_all_the_same(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    missing = {**settings.path_overrides, "TAEF2_MODEL_PATH": tmp_path / "nowhere.safetensors"}
    pictures = []
    for number, overrides in enumerate((settings.path_overrides, missing)):
        studio = Studio(Settings(home=tmp_path / str(number), path_overrides=overrides, device="cpu", dtype="float32"))
        events, result = run(studio, prompt="a house", checkpoint="klein-4b", width=64, height=64, seed=1)
        told = [event.text for event in of(Notice, events) if "rough colours" in event.text]
        assert bool(told) == (overrides is missing)
        pictures.append(pixels(result.images[0]))
    assert np.array_equal(*pictures)


def test_previews_can_be_switched_off(toys: Toys, tmp_path: Path) -> None:
    studio = Studio(toys.settings(tmp_path, ["klein-4b"], preview="off"))
    events, _ = run(studio, prompt="a house", width=64, height=64)
    assert [event.images for event in of(Preview, events)] == [()] * 4


def test_an_abandoned_run_leaves_the_studio_usable(nano: Studio) -> None:
    events = nano.generate(Request(prompt="a cat"))
    while not isinstance(next(events), Preview):
        pass
    events.close()  # type: ignore[attr-defined]
    run(nano, prompt="a cat")


def test_the_files_of_another_checkpoint_are_refused_in_words(toys: Toys, tmp_path: Path) -> None:
    settings = toys.settings(tmp_path, ["klein-4b"])
    wrong = {
        "KLEIN_4B_MODEL_PATH": (toys.nine.file, "KLEIN_4B_MODEL_PATH"),  # a 9B file offered as 4B
        "QWEN3_4B_MODEL_PATH": (toys.wide_qwen.folder, "QWEN3_4B_MODEL_PATH"),
        "AE_MODEL_PATH": (toys.klein.file, "not a FLUX.2 autoencoder"),
    }
    for variable, (path, hint) in wrong.items():
        overrides = {**settings.path_overrides, variable: path}
        studio = Studio(Settings(home=tmp_path, path_overrides=overrides, device="cpu"))
        with pytest.raises(StudioError, match=hint) as refused:
            list(studio.generate(Request(prompt="a house", checkpoint="klein-4b")))
        assert path.name in str(refused.value)
    dev = {**settings.path_overrides, "KLEIN_4B_MODEL_PATH": toys.dev.file}
    with pytest.raises(StudioError):
        list(Studio(Settings(home=tmp_path, path_overrides=dev)).generate(Request(prompt="a", checkpoint="klein-4b")))
