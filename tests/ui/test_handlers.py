"""The page without a browser: forms to requests, events to components, references sorted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from flux2_studio.checkpoints import CHECKPOINTS, DEV, NANO
from flux2_studio.errors import RequestError, UpsampleError
from flux2_studio.events import (
    Event,
    Failed,
    Notice,
    Preview,
    PromptEnhanced,
    PromptProgress,
    Queued,
    Result,
    Saved,
    Status,
    Stopped,
    Withheld,
)
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.jobs.queue import JobQueue
from flux2_studio.jobs.tasks import Job
from flux2_studio.models.hub.library import CheckpointLibrary
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.loras import LoraEntry, LoraLibrary
from flux2_studio.models.writers import WriterOffer
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE
from flux2_studio.record import Record
from flux2_studio.request import LoraChoice, Request, Upsampling
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.settings import Settings
from flux2_studio.ui import handlers
from flux2_studio.ui.app import build_page
from flux2_studio.ui.forms import fields, lora_panel, reference_panel, tabs, upsample_panel
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.gradio_compat import wiring
from flux2_studio.ui.stage.run_view import RunView


class Scripted:
    """A studio that resolves like the real one and then says what it was told to."""

    def __init__(self, settings: Settings, *events: Event) -> None:
        self.settings = settings
        self.loras = LoraLibrary(settings)
        self.guard = SafetyGuard("warn")
        self.signer = Signer(settings.identity)
        self.messages = (PUBLISHED_MESSAGE,)
        self.reference_store = None
        self.pictures = PictureCache()
        self._events = events

    def is_on_disk(self, checkpoint: object) -> bool:
        return True

    def resolve(self, request: Request, api_key: object = None) -> Request:
        return request.resolve(self.settings.checkpoint(request.checkpoint), [(128, 128)] * len(request.references))

    def generate(self, request: Request, cancelled: Callable[[], bool], api_key: object = None) -> Iterator[Event]:
        yield from self._events


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    file = tmp_path / "picture.png"
    Image.new("RGB", (160, 96), "teal").save(file)
    return file


def form_values(**changes: object) -> dict[str, object]:
    given = {"prompt": "a fox", "seed": 7, "width": 128, "height": 128, "steps": 4, "guidance": 1, "count": 2}
    return {**given, **dict.fromkeys(upsample_panel.UPSAMPLING_INPUTS), "upsample_by": "none", **changes}


def read_form(values: dict[str, object], **changes: object) -> Request:
    given: dict[str, Any] = {"locked": True, "checkpoint": NANO, "form_checkpoint": "nano", "aspect": "1:1", **changes}
    return handlers.read_form(values, **given)


def test_read_form_leaves_the_numbers_of_another_checkpoint_to_the_chosen_one() -> None:
    base = next(checkpoint for checkpoint in CHECKPOINTS if checkpoint.supports_negative_prompt)
    stale = form_values(width=1360, height=768, steps=50, guidance=4, negative_prompt="blur")
    kept = read_form(stale, checkpoint=base, form_checkpoint=base.name, aspect="16:9")
    assert (kept.width, kept.steps, kept.guidance, kept.negative_prompt) == (1360, 50, 4, "blur")
    left = read_form(stale, form_checkpoint=base.name, aspect="16:9")
    assert (left.width, left.height) == fields.size_of("16:9", NANO)
    assert (left.steps, left.guidance, left.negative_prompt) == (None, None, None)
    typed = read_form(stale, form_checkpoint=base.name, aspect=fields.FREE)
    assert (typed.width, typed.height) == (1360, 768)


def test_read_form_keeps_a_locked_seed_only() -> None:
    assert read_form(form_values()).seed == 7
    assert read_form(form_values(), locked=False).seed is None


def test_read_form_takes_a_gallery_as_references(picture: Path) -> None:
    asked = read_form(form_values(references=[(str(picture), "image 1")]))
    assert asked.references == (picture,)


@pytest.mark.parametrize("side", ["width", "height"])
def test_read_form_wants_both_sides_of_a_size(side: str, picture: Path) -> None:
    with pytest.raises(RequestError, match=f"Give the {side}"):
        read_form(form_values(**{side: None}), aspect=fields.FREE)
    both: dict[str, object] = {"width": None, "height": None, "references": [(str(picture), None)]}
    assert read_form(form_values(**both), aspect=fields.AS_REFERENCE).width is None


@pytest.mark.parametrize("empty", [None, []])
def test_read_form_wants_the_references_of_a_form_that_has_some(empty: object) -> None:
    with pytest.raises(RequestError, match="Add a picture"):
        read_form(form_values(references=empty))


def test_read_form_takes_rows_as_loras() -> None:
    rows = [{"name": "ink", "weight": 0.5}, {"name": "styles/grain", "weight": -1}]
    asked = read_form(form_values(loras=rows))
    assert asked.loras == (LoraChoice(name="ink", weight=0.5), LoraChoice(name="styles/grain", weight=-1))
    for none in (None, []):
        assert read_form(form_values(loras=none)).loras == ()


@pytest.mark.parametrize(
    "rows",
    ["ink", 5, [5], ["ink"], [{"name": "ink"}], [{"weight": 1}], {"name": "ink", "weight": 1}, [[["name", "ink"]]]],
)
def test_rows_of_another_shape_are_refused(rows: object) -> None:
    with pytest.raises(RequestError, match="LoRAs came in a form that is not read"):
        read_form(form_values(loras=rows))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"name": "../../etc/passwd", "weight": 1}, "is no LoRA's name"),
        ({"name": 5, "weight": 1}, "is no LoRA's name"),
        ({"name": "ink", "weight": "1"}, "must be a number from -4 to 4"),
        ({"name": "ink", "weight": 4.5}, "must be a number from -4 to 4"),
    ],
)
def test_rows_are_what_a_request_takes(row: object, says: str) -> None:
    with pytest.raises(RequestError, match=says):
        read_form(form_values(loras=[row]))


def entry(name: str, width: int, family: str) -> LoraEntry:
    return LoraEntry(name=name, kind="LoRA of rank 4", width=width, family=family)


def test_loras_that_fit_are_offered_first() -> None:
    entries = [entry("a", 3072, "klein 4B"), entry("b", NANO.hidden_width, "Nano"), entry("c", 6144, "dev")]
    choices = fields.lora_dropdown(entries, NANO).choices
    assert choices == [("b", "b"), ("a (for klein 4B)", "a"), ("c (for dev)", "c")]
    assert fields.lora_dropdown(entries, DEV).choices[0] == ("c", "c")
    assert fields.lora_dropdown(entries, NANO).visible and not fields.lora_dropdown((), NANO).visible


def test_another_checkpoint_drops_what_does_not_fit_it() -> None:
    entries = [entry("a", 3072, "klein 4B"), entry("b", NANO.hidden_width, "Nano")]
    rows = [{"name": name, "weight": 1} for name in ("a", "b", "gone")]
    staying, dropped = lora_panel.keep_compatible(rows, entries, NANO)
    assert staying == [{"name": "b", "weight": 1}]
    assert dropped == [
        f"a was taken off: it is for klein 4B, not for {NANO.label}.",
        "gone was taken off: its file is gone.",
    ]


def test_the_lora_panel_says_where_to_put_files_and_which_are_none(settings: Settings) -> None:
    loras = LoraLibrary(settings)
    assert f"Put their .safetensors files into {loras.folder}" in lora_panel.loras_note([], [], loras)
    assert lora_panel.loras_note([entry("a", 1, "x")], [], loras) == ""
    told = lora_panel.loras_note([entry("a", 1, "x")], [f"<{number}> is none." for number in range(9)], loras)
    assert "&lt;2&gt; is none." in told and "&lt;3&gt;" not in told and "6 more files" in told


def test_every_form_key_is_a_field_of_request(settings: Settings) -> None:
    editing = {"references", "mask", "outpaint", "match_colours"}
    known = {field.name for field in dataclass_fields(Request)}
    examples = Examples.load(settings.assets / "examples")
    with gr.Blocks():
        chosen = fields.checkpoint(settings.checkpoints, "nano")
        forms = [layout(chosen, NANO, examples, settings) for layout in (tabs.generate, tabs.edit, tabs.multi)]
    for form in forms:
        assert set(form.fields) <= known
        assert set(form.fields) == known - {"upsampling"} - (editing if form.name == "generate" else set())
        assert set(form.upsampling.inputs) == set(upsample_panel.UPSAMPLING_INPUTS)
        assert all(isinstance(component, gr.components.Component) for component in form.fields.values())


def test_builds_for_every_checkpoint(settings: Settings) -> None:
    for checkpoint in CHECKPOINTS:
        chosen = Settings(home=settings.home, default_checkpoint=checkpoint.name)
        jobs = JobQueue(Scripted(chosen))
        try:
            page = build_page(Scripted(chosen), jobs, CheckpointLibrary(chosen, Hub(chosen)))  # type: ignore[arg-type]
        finally:
            jobs.close()
        # Nothing but the page itself may call its events.
        assert {function.api_visibility for function in page.fns.values()} == {"private"}
        # Nothing has the browser think while nobody does anything, and each event has it think in one place only.
        assert {len(function.show_progress_on or ()) for function in page.fns.values()} == {1}
        assert not [it for it in page.blocks.values() if isinstance(it, gr.Timer) and it.active]


def test_follow_gives_every_event_up_to_the_last(settings: Settings) -> None:
    job = Job(Request(prompt="a fox").resolve(NANO), "me")
    told: list[Event] = [Status(text="one"), Notice(text="two"), Stopped()]

    async def followed() -> list[Event]:
        heard = []
        following = wiring.follow_task(job, poll_seconds=0)
        job.add_event(told[0])
        heard.append(await anext(following))
        job.add_event(told[1])
        job.add_event(told[2])
        return heard + [event async for event in following]

    # In a thread of its own: the browser tests leave an event loop running in this one.
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, followed()).result() == told


@pytest.fixture(scope="module")
def stage() -> tabs.StagePanel:
    with gr.Blocks():
        return tabs.build_stage()


@pytest.fixture(scope="module")
def panel() -> tabs.UpsamplingPanel:
    settings = Settings(home=Path("nowhere"))
    with gr.Blocks():
        chosen = fields.checkpoint(settings.checkpoints, "nano")
        return tabs.generate(chosen, NANO, Examples.load(settings.assets / "examples"), settings).upsampling


@pytest.fixture
def view(stage: tabs.StagePanel, panel: tabs.UpsamplingPanel) -> RunView:
    begun = RunView(stage, panel, NANO, PictureCache())
    begun.begin(Job(Request(prompt="a fox", seed=3).resolve(NANO), "me"))
    return begun


def preview(step: int, *, first: int = 0, count: int = 1, images: int = 1, left: float | None = None) -> Preview:
    drawn = tuple(Image.new("RGB", (16, 16), (step * 40, first * 40, 0)) for _ in range(images))
    return Preview(step=step, steps=4, images=drawn, first_index=first, count=count, seconds_left=left)


def test_view_keeps_every_notice(stage: tabs.StagePanel, view: RunView) -> None:
    view.update(Notice(text="The width was rounded."))
    html = view.update(Notice(text="A <long> prompt."))[stage.notices]
    assert "The width was rounded." in html
    assert "A &lt;long&gt; prompt." in html


def test_view_shows_steps_and_previews(stage: tabs.StagePanel, view: RunView) -> None:
    assert "2 runs before yours" in view.update(Queued(runs_ahead=2))[stage.progress]
    first = view.update(preview(1, left=None))
    second = view.update(preview(2, left=12.4))
    assert "Step 1 of 4<" in first[stage.progress]
    assert "Step 2 of 4 · 12 s left" in second[stage.progress]
    assert first[stage.preview] != second[stage.preview]


def test_view_without_preview_pictures_shows_the_step(stage: tabs.StagePanel, view: RunView) -> None:
    update = view.update(preview(3, images=0))
    assert "Step 3 of 4" in update[stage.progress]
    assert stage.preview not in update


def test_view_offers_the_saved_files(stage: tabs.StagePanel, view: RunView, picture: Path) -> None:
    resolved = Request(prompt="a fox", seed=3).resolve(NANO)
    update = view.update(Result(request=resolved, images=(picture,), seeds=(3,), seconds=1.5))
    assert "1 picture in 1.5 s" in update[stage.progress]
    assert update[stage.result_paths] == [str(picture)]
    assert update[stage.download]._constructor_args[0]["value"] == str(picture)
    assert view.failure is None


def test_view_of_a_stopped_run_keeps_the_preview(stage: tabs.StagePanel, view: RunView) -> None:
    update = view.update(Stopped())
    assert "Stopped" in update[stage.progress]
    assert stage.preview not in update
    assert stage.gallery not in update


def test_view_of_a_stopped_run_shows_what_was_finished(stage: tabs.StagePanel, view: RunView, picture: Path) -> None:
    update = view.update(Stopped(images=(picture,), seeds=(3,)))
    assert "1 finished picture was kept" in update[stage.progress]
    assert update[stage.result_paths] == [str(picture)]


def test_view_of_a_failed_run_says_why(stage: tabs.StagePanel, view: RunView) -> None:
    update = view.update(Failed(message="The file <x> is damaged."))
    assert "The file &lt;x&gt; is damaged." in update[stage.message]
    assert stage.preview not in update
    assert view.failure == "The file <x> is damaged."


def test_view_forgets_what_is_withheld(stage: tabs.StagePanel, view: RunView) -> None:
    view.update(preview(4, count=2, images=2))
    one = view.update(Withheld(index=1))[stage.preview]
    assert one.startswith("<img") and one != view.update(preview(4, count=2, images=2))[stage.preview]
    view.update(Withheld(index=0))
    assert view.update(Withheld(index=1))[stage.preview] == tabs.EMPTY_STAGE_HTML


def test_view_of_a_run_that_fails_late_shows_what_was_saved(
    stage: tabs.StagePanel, view: RunView, picture: Path
) -> None:
    record = Record(request=Request(prompt="x"), label="x")
    view.update(Saved(index=0, image=picture, seed=3, record=record))
    update = view.update(Failed(message="The disk is full."))
    assert update[stage.result_paths] == [str(picture)] and "The disk is full." in update[stage.message]


def test_view_shows_what_a_model_writes_and_what_is_drawn_then(
    stage: tabs.StagePanel, panel: tabs.UpsamplingPanel, view: RunView, picture: Path
) -> None:
    assert view.update(PromptProgress(text="A red"))[panel.enhanced_prompt]._constructor_args[0]["value"] == "A red"
    update = view.update(PromptEnhanced(original="a fox", prompt="A red <fox>.", by="some/model"))
    assert update[panel.enhanced_prompt]._constructor_args[0]["value"] == "A red <fox>."
    resolved = Request(prompt="A red <fox>.", seed=3).resolve(NANO)
    result = Result(request=resolved, images=(picture,), seeds=(3,), seconds=1.5, provenance=("It is <signed>.",))
    table = view.update(result)[stage.table]
    assert "<td>A red &lt;fox&gt;.</td>" in table and "<td>a fox</td>" in table and "<td>some/model</td>" in table
    assert "It is &lt;signed&gt;." in table
    assert '"prompt": "A red <fox>."' in view.update(result)[stage.json]


def test_view_of_a_prompt_that_was_not_enhanced_says_that_it_goes_without(view: RunView) -> None:
    view.update(Failed(message="No credit.", in_prompt_enhancement=True))
    assert view.upsampling_failed and view.failure == "No credit."


def test_a_panel_off_asks_nobody_whatever_else_is_in_it() -> None:
    asked = read_form(form_values(upsample_remote="x/y", temperature=9, api_key="sk-1"))
    assert asked.upsampling == Upsampling()


def test_a_panel_is_read_as_what_is_shown_of_it() -> None:
    filled = form_values(
        upsample_by="openrouter", upsample_local="qwen3-4b", upsample_remote=" x/y ", temperature=0.5, max_tokens=100.0
    )
    asked = read_form(filled)
    assert asked.upsampling == Upsampling(by="openrouter", model="x/y", temperature=0.5, max_tokens=100)
    local = read_form(filled | {"upsample_by": "local"})
    assert local.upsampling.model == "qwen3-4b"


def test_a_key_goes_beside_the_request_and_only_to_a_server() -> None:
    typed = form_values(upsample_by="openrouter", upsample_remote="x/y", api_key=" sk-1 ")
    key = upsample_panel.read_api_key(typed)
    assert key is not None and key.reveal() == "sk-1"
    assert "sk-1" not in repr(read_form(typed))
    assert upsample_panel.read_api_key(typed | {"upsample_by": "local"}) is None
    assert upsample_panel.read_api_key(typed | {"api_key": "  "}) is None
    with pytest.raises(UpsampleError, match="no API key"):
        upsample_panel.read_api_key(typed | {"api_key": "sk 1"})
    assert read_form(typed | {"api_key": "sk 1"}).prompt == "a fox", "so that one can go on without"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"temperature": 5}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"upsample_remote": ""}, "Choose a language model"),
        ({"upsample_remote": ["a"]}, "Choose a language model"),
        ({"upsample_by": "magic"}, "Upsample with one of"),
    ],
)
def test_rubbish_in_a_panel_is_refused(changes: dict[str, object], said: str) -> None:
    values = form_values(upsample_by="openrouter", upsample_remote="x/y") | changes
    with pytest.raises(RequestError, match=said):
        read_form(values)


def test_the_panel_says_what_each_choice_costs(settings: Settings) -> None:
    offer = WriterOffer(
        name="qwen3-4b",
        label="Qwen3 4B",
        has_vision=False,
        is_text_encoder=True,
        is_on_disk=True,
        download=0,
        memory=1,
        description="Loads more.",
    )
    told = upsample_panel.provider_note_html("local", [offer], DEV, "qwen3-4b", settings)
    assert "Loads more." in told and "references it does not see" in told
    assert "choose OpenRouter" in upsample_panel.provider_note_html("local", [], NANO, None, settings)
    assert "go to openrouter.ai" in upsample_panel.provider_note_html("openrouter", [], NANO, None, settings)
    assert upsample_panel.provider_note_html("none", [offer], DEV, None, settings) == ""


def test_examine_sorts_what_is_offered(picture: Path, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"nothing of the kind")
    examined = reference_panel.examine([rubbish, picture, picture, picture], DEV, 2, PictureCache())
    assert examined.usable == (picture, picture)
    assert examined.notes[0] == "As image 1: 160 x 96 pixels (1.67:1)."
    assert "rubbish.png" in examined.refused[0]
    assert "at most 2 pictures: picture.png was left out" in examined.refused[1]


@pytest.mark.parametrize(
    "over, names",
    [
        (1, "1.png was"),
        (2, "1.png and 2.png were"),
        (3, "1.png, 2.png and 3.png were"),
        (40, "2.png and 38 others were"),
    ],
)
def test_examine_lists_in_one_sentence_what_is_over_the_limit(picture: Path, over: int, names: str) -> None:
    examined = reference_panel.examine(
        [picture, *(picture.with_name(f"{n}.png") for n in range(1, over + 1))], DEV, 1, PictureCache()
    )
    assert len(examined.refused) == 1
    assert f"{names} left out." in examined.refused[0]


def test_newest_is_the_last_that_can_be_used(picture: Path, tmp_path: Path) -> None:
    rubbish = tmp_path / "rubbish.png"
    rubbish.write_bytes(b"nothing of the kind")
    small = tmp_path / "small.png"
    Image.new("RGB", (64, 64)).save(small)
    assert reference_panel.newest_usable([picture, small], DEV, PictureCache()).usable == (small,)
    fallen_back = reference_panel.newest_usable([small, picture, rubbish], DEV, PictureCache())
    assert fallen_back.usable == (picture,)
    assert len(fallen_back.refused) == 1
    assert "rubbish.png" in fallen_back.refused[0]
    assert reference_panel.newest_usable([rubbish], DEV, PictureCache()).usable == ()


def test_examine_tells_the_size_after_the_checkpoints_cap(tmp_path: Path) -> None:
    large = tmp_path / "large.png"
    Image.new("RGB", (512, 512)).save(large)
    assert reference_panel.examine([large], NANO, 1, PictureCache()).notes[0] == (
        "As image 1: 256 x 256 pixels (1:1). Image 1 is scaled from 512 x 512 to 256 x 256."
    )
    assert reference_panel.examine([], NANO, 1, PictureCache()) == reference_panel.ExaminedFiles()


@pytest.mark.parametrize(
    "index, by, expected, place",
    [
        (1, -1, "bac", 0),
        (1, 1, "acb", 2),
        (0, -1, "abc", 0),
        (2, 1, "abc", 2),
        (None, 1, "abc", None),
        (9, 1, "abc", None),
    ],
)
def test_reordered(index: int | None, by: int, expected: str, place: int | None) -> None:
    assert reference_panel.move_item([Path(c) for c in "abc"], index, by) == ([Path(c) for c in expected], place)


@pytest.mark.parametrize(
    "sent, expected",
    [("0,2", "bca"), ("2,0", "cab"), ("1,1", "abc"), ("0,3", None), ("-1,0", None), ("", None), ("0,1;", None)],
)
def test_dragged(sent: str, expected: str | None) -> None:
    assert reference_panel.apply_drag([Path(c) for c in "abc"], sent) == (
        None if expected is None else [Path(c) for c in expected]
    )


@pytest.mark.parametrize("sent, index", [("0", 0), ("12", 12), ("", None), (None, None), ("-1", None), ("1,0", None)])
def test_selected(sent: str | None, index: int | None) -> None:
    assert reference_panel.parse_selected_index(sent) == index


@pytest.mark.parametrize(
    "label, width, height, side, note, shape",
    [
        ("width", 130, 128, 128, "The width was rounded from 130 to 128", "1:1"),
        ("height", 128, 250, 256, "The height was rounded from 250 to 256", "Free"),
        ("width", 176, 96, 176, "", "16:9"),
        ("width", 40, 128, 40, "at least 64 pixels", "Free"),
        ("height", 512, 1024, 1024, "too large for Nano", "Free"),
        ("width", None, 128, None, "Give the width in pixels", "Free"),
        ("height", None, 256, 256, "Give the width in pixels", "Free"),
    ],
)
def test_settled(label: str, width: int | None, height: int | None, side: int | None, note: str, shape: str) -> None:
    typed = width if label == "width" else height
    became, told, fits = handlers.settle_side(typed, width, height, label, NANO)
    assert became == side
    assert note in told
    assert bool(told) == bool(note)
    assert fits == shape
