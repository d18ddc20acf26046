"""What a run does beside drawing: the prompt enhanced, everything checked, the pictures marked; and made again."""

from __future__ import annotations

import hashlib
import io
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flux2_studio.checkpoints import LOCAL_WRITERS
from flux2_studio.errors import ClassifierError, CredentialsError, SafetyError, StudioError, UpsampleError
from flux2_studio.events import (
    Event,
    Notice,
    Preview,
    PromptEnhanced,
    PromptProgress,
    Ready,
    Result,
    Saved,
    Stopped,
    Withheld,
)
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.images.references import fit, load_reference
from flux2_studio.images.tensors import pixels_from_image
from flux2_studio.models.hub.repositories import Hub
from flux2_studio.models.manager import ModelManager
from flux2_studio.prompting.instructions import build_instructions
from flux2_studio.prompting.openai_server import ApiKey
from flux2_studio.provenance import metadata, watermark
from flux2_studio.record import Record
from flux2_studio.request import Request, Upsampling
from flux2_studio.safety.guard import SafetyGuard
from flux2_studio.safety.policy import Policy, Verdict
from flux2_studio.safety.questions import judge_with_model, make_yes_no_model
from flux2_studio.settings import Settings
from flux2_studio.studio import Studio
from tests.fake_openai import FakeOpenAI, refuses, says, silent
from tests.tiny import Toys

KEY = "sk-or-v1-0123456789abcdef"
REMOTE = Upsampling(by="openrouter", model="toy/model")
RICH = "A flat icon of a red fox that sits on a pink background."


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def settings(home: Path) -> Settings:
    return Settings(home=home, device="cpu", preview="off", safety="off")


@pytest.fixture(scope="module")
def studio(settings: Settings) -> Studio:
    return Studio(settings, reference_store=ReferenceStore(settings.references))


def run(studio: Studio, key: ApiKey | None = None, **fields: Any) -> tuple[list[Event], Result]:
    events = list(studio.generate(Request(**fields), api_key=key))
    assert isinstance(events[-1], Result)
    return events, events[-1]


def notices(events: Sequence[Event]) -> str:
    return "\n".join(event.text for event in events if isinstance(event, Notice))


def record_in(path: Path) -> Record:
    found = metadata.read_settings(path.read_bytes())
    assert found.record is not None, found.problem
    return found.record


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


# --- enhancing the prompt ---------------------------------------------------------------------------------------


def test_what_the_model_wrote_is_drawn_and_written_down(settings: Settings) -> None:
    with FakeOpenAI(says("A flat icon of a red fox ", "that sits on a pink background.")) as server:
        studio = Studio(replace(settings, openrouter_url=server.url))
        events, result = run(studio, prompt="fox", upsampling=REMOTE, seed=2)
    assert [event.text for event in events if isinstance(event, PromptProgress)] == ["A flat icon of a red fox ", RICH]
    assert [event for event in events if isinstance(event, PromptEnhanced)] == [
        PromptEnhanced(original="fox", prompt=RICH, by="toy/model")
    ]
    assert (result.request.prompt, result.request.upsampling) == (RICH, Upsampling())
    record = record_in(result.images[0])
    assert (record.request.prompt, record.original_prompt, record.upsampled_by) == (RICH, "fox", "toy/model")
    _, plain = run(studio, prompt=RICH, seed=2)
    np.testing.assert_array_equal(pixels(result.images[0]), pixels(plain.images[0]))
    (asked,) = server.asked
    assert asked.body["seed"] == 2 and asked.body["messages"][1]["content"] == "fox"


def test_references_are_shown_to_the_model_scaled_down(settings: Settings, tmp_path: Path) -> None:
    photo = tmp_path / "photo.png"
    Image.effect_noise((2000, 1000), 60).convert("RGB").save(photo)
    with FakeOpenAI(says("Make the background of the photo blue.")) as server:
        run(
            Studio(replace(settings, openrouter_url=server.url)),
            prompt="blue",
            references=(photo,),
            upsampling=REMOTE,
        )
    parts = server.asked[0].body["messages"][1]["content"]
    assert sum(part["type"] == "image_url" for part in parts) == 1
    assert len(parts[1]["image_url"]["url"]) < 500_000


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (refuses(401), "does not accept the API key"),
        (refuses(402), "no credit left"),
        (says(""), "empty answer"),
        (says("I'm sorry, but I cannot help with that."), "refused"),
        (says("Sure! Here is your prompt: a fox"), "talked about the prompt"),
        (says("word " * 10_000), "where a prompt has"),
    ],
)
def test_without_a_prompt_nothing_is_drawn_and_the_reason_told(settings: Settings, reply: Any, said: str) -> None:
    with FakeOpenAI(reply) as server:
        studio = Studio(replace(settings, openrouter_url=server.url, openrouter_key=KEY))
        events: list[Event] = []
        with pytest.raises(UpsampleError, match=said) as refused:
            events.extend(studio.generate(Request(prompt="fox", upsampling=REMOTE)))
    assert "generate without enhancing" in str(refused.value)
    assert not [event for event in events if isinstance(event, Preview)]


@pytest.mark.parametrize(
    ("upsampling", "said"),
    [(Upsampling(by="openrouter"), "needs an API key"), (Upsampling(by="local"), "has no language model")],
)
def test_what_cannot_be_asked_is_refused_when_it_is_submitted(
    studio: Studio, upsampling: Upsampling, said: str
) -> None:
    with pytest.raises(UpsampleError, match=said):
        studio.resolve(Request(prompt="fox", upsampling=upsampling))


def test_a_prompt_can_be_enhanced_without_drawing(settings: Settings) -> None:
    with FakeOpenAI(says(RICH)) as server:
        studio = Studio(replace(settings, openrouter_url=server.url))
        events = list(studio.enhance_prompt(Request(prompt="fox", upsampling=REMOTE)))
    assert events[-2:] == [PromptEnhanced(original="fox", prompt=RICH, by="toy/model"), Ready(checkpoint="nano")]


def test_stopping_while_the_model_writes(settings: Settings) -> None:
    with FakeOpenAI(silent("A red ")) as server:
        studio = Studio(replace(settings, openrouter_url=server.url))
        events: list[Event] = []
        begun = lambda: any(isinstance(event, PromptProgress) for event in events)  # noqa: E731
        for event in studio.generate(Request(prompt="fox", upsampling=REMOTE), begun):
            events.append(event)
        assert server.gone.wait(60), "the connection is closed"
    assert events[-1] == Stopped()


def test_the_key_is_nowhere_but_in_the_request(settings: Settings, tmp_path: Path, caplog: Any) -> None:
    caplog.set_level(logging.DEBUG)
    events: list[Event] = []
    with FakeOpenAI(says(RICH), refuses(402)) as server:
        studio = Studio(replace(settings, home=tmp_path, openrouter_url=server.url, openrouter_key="sk-of-the-studio"))
        events.extend(studio.generate(Request(prompt="fox", upsampling=REMOTE), api_key=ApiKey(KEY)))
        with pytest.raises(UpsampleError) as failed:
            events.extend(studio.generate(Request(prompt="fox", upsampling=REMOTE), api_key=ApiKey(KEY)))
    assert [asked.headers["authorization"] for asked in server.asked] == [f"Bearer {KEY}"] * 2
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 2  # a picture, and the identity
    for secret in (KEY, "sk-of-the-studio"):
        assert not any(secret.encode() in data for data in files)
        assert secret not in repr(events) + str(failed.value) + caplog.text + repr(studio.settings)


@pytest.mark.parametrize(("name", "writer"), [("klein-4b", "qwen3-4b"), ("dev", "mistral")])
def test_a_model_of_this_machine_writes_and_then_reads(
    toys: Toys, tmp_path: Path, apple: Path, name: str, writer: str
) -> None:
    """What a toy writes is no prompt, but it is written by the right model, of the right question, and told."""
    studio = Studio(toys.settings(tmp_path, [name], safety="off"))
    chosen = Upsampling(by="local", model=writer, temperature=0.7, top_p=0.9, max_tokens=16)
    asked = Request(prompt="fox", upsampling=chosen, references=(apple,), seed=3, width=64, height=64)
    events: list[Event] = []
    with pytest.raises(UpsampleError, match="was not done after 16 tokens") as failed:
        for event in studio.generate(asked):
            events.append(event)
    assert "generate without enhancing" in str(failed.value)
    (offer,) = (it for it in studio.list_writers(studio.settings.checkpoint(name)) if it.name == writer)
    assert offer.is_text_encoder and offer.is_on_disk
    wrote = [event.text for event in events if isinstance(event, PromptProgress)]
    assert wrote and all(later.startswith(earlier) for earlier, later in itertools.pairwise(wrote))
    models = ModelManager(studio.settings, Hub(studio.settings))
    model = next(it for it in LOCAL_WRITERS if it.name == writer)
    image = fit(load_reference(apple).image, 10**6)
    sizes = [(image.height, image.width)] if model.has_vision else []
    whole = models.acquire_writer(model, lambda *_: None, sizes).writer
    expected = "".join(
        whole.write(
            build_instructions("edit", 1, seen=model.has_vision),
            "fox",
            [pixels_from_image(image)] if model.has_vision else [],
            seed=3,
            max_tokens=16,
            temperature=0.7,
            top_p=0.9,
        )
    )
    assert wrote[-1] == expected


def test_a_writer_that_does_not_fit_is_told_with_a_way_out(toys: Toys, tmp_path: Path) -> None:
    studio = Studio(toys.settings(tmp_path, ["klein-4b"], safety="off", memory_limit_gb=0.0001))
    with pytest.raises(UpsampleError, match=r"could not be enhanced\. .*needs about .*generate without enhancing"):
        list(studio.generate(Request(prompt="fox", upsampling=Upsampling(by="local"), width=64, height=64)))


# --- the safety check -------------------------------------------------------------------------------------------


class Flags:
    """A classifier that flags the pictures whose number, in the order of looking, is in `numbers`."""

    def __init__(self, *numbers: int) -> None:
        self.numbers = numbers
        self.seen: list[Image.Image] = []

    def load(self) -> None:
        pass

    def __call__(self, image: Image.Image) -> Verdict:
        self.seen.append(image)
        if len(self.seen) - 1 in self.numbers:
            return Verdict(allowed=False, reasons=("seems to show a test",))
        return Verdict(allowed=True)


class Broken:
    def load(self) -> None:
        raise ClassifierError("There is no classifier: install one.")

    def __call__(self, image: Image.Image) -> Verdict:
        self.load()
        raise AssertionError


def guarded(settings: Settings, policy: Policy, classifier: Any, tmp_path: Path, **changes: Any) -> Studio:
    return Studio(replace(settings, home=tmp_path, **changes), guard=SafetyGuard(policy, classifier=classifier))


def written(folder: Path) -> list[Path]:
    return [path for path in (folder / "outputs").rglob("*") if path.is_file()]


@pytest.fixture
def apple(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "apple.png"
    Image.new("RGB", (128, 128), "red").save(path)
    yield path


def test_a_flagged_picture_is_neither_saved_nor_shown(settings: Settings, tmp_path: Path) -> None:
    studio = guarded(settings, "on", Flags(0), tmp_path)
    events: list[Event] = []
    with pytest.raises(SafetyError, match=r"neither saved nor shown. Change the prompt"):
        for event in studio.generate(Request(prompt="a fox")):
            events.append(event)
    assert events[-1] == Withheld(index=0), "whoever shows its preview must take it away"
    assert written(tmp_path) == []


def test_of_several_pictures_only_the_flagged_ones_are_withheld(settings: Settings, tmp_path: Path) -> None:
    events, result = run(guarded(settings, "on", Flags(1), tmp_path), prompt="a fox", seed=5, count=3)
    first, withheld, last = [event for event in events if isinstance(event, Saved | Withheld)]
    assert isinstance(first, Saved) and (first.index, first.image, first.seed) == (0, result.images[0], 5)
    assert withheld == Withheld(index=1)
    assert isinstance(last, Saved) and (last.index, last.image, last.seed) == (2, result.images[1], 7)
    assert [it.record for it in (first, last)] == [record_in(path) for path in result.images]
    assert result.seeds == (5, 7) and [record_in(path).request.seed for path in result.images] == [5, 7]
    assert "neither saved nor shown" in notices(events) and "(Seed 6.)" in notices(events)
    assert len(written(tmp_path)) == 2


def test_a_warning_is_told_and_the_picture_kept(settings: Settings, tmp_path: Path) -> None:
    events, result = run(guarded(settings, "warn", Flags(0), tmp_path), prompt="a fox")
    assert "was flagged by the safety check, because it seems to show a test" in notices(events)
    assert written(tmp_path) == list(result.images)


def test_a_flagged_reference_stops_the_run_before_it_begins(settings: Settings, tmp_path: Path, apple: Path) -> None:
    kept = ReferenceStore(tmp_path / "references")
    studio = Studio(
        replace(settings, home=tmp_path), guard=SafetyGuard("on", classifier=Flags(0)), reference_store=kept
    )
    events: list[Event] = []
    with pytest.raises(SafetyError, match="Image 1 was stopped"):
        events.extend(studio.generate(Request(prompt="make it blue", references=(apple,))))
    assert events == [] and written(tmp_path) == []
    assert kept.find(hashlib.sha256(apple.read_bytes()).hexdigest()) is None


def test_prompts_are_checked_before_anything_is_sent_and_what_comes_back_too(
    settings: Settings, tmp_path: Path
) -> None:
    with FakeOpenAI(says("Hardcore porn of two adults.")) as server:
        studio = guarded(settings, "on", Flags(), tmp_path, openrouter_url=server.url)
        with pytest.raises(SafetyError, match="pornography"):
            list(studio.generate(Request(prompt="hardcore porn", upsampling=REMOTE)))
        assert server.asked == []
        for run_it in (studio.generate, studio.enhance_prompt):
            with pytest.raises(UpsampleError, match=r"wrote what does not pass.*pornography.*without enhancing"):
                list(run_it(Request(prompt="a couple", upsampling=REMOTE)))
        assert len(server.asked) == 2
    assert written(tmp_path) == []


def test_previews_of_a_studio_with_guests_are_looked_at(settings: Settings, tmp_path: Path) -> None:
    classifier = Flags(0, 2)
    events, _ = run(guarded(settings, "on", classifier, tmp_path, preview="tiny"), prompt="a fox", seed=1)
    previews = [event.images[0] for event in events if isinstance(event, Preview)]
    assert len(previews) == 4 and len(classifier.seen) == 5
    veiled = [image.getcolors(256) is not None for image in previews]  # a mosaic has few
    assert veiled == [True, False, True, False]


@pytest.mark.parametrize(("policy", "stops"), [("on", True), ("warn", False)])
def test_without_a_classifier_a_studio_with_guests_draws_nothing(
    settings: Settings, tmp_path: Path, policy: Policy, stops: bool
) -> None:
    studio = guarded(settings, policy, Broken(), tmp_path)
    if stops:
        with pytest.raises(ClassifierError):
            list(studio.generate(Request(prompt="a fox")))
        assert written(tmp_path) == []
    else:
        assert "was not checked" in notices(run(studio, prompt="a fox")[0])


def test_off_looks_at_nothing(settings: Settings, tmp_path: Path) -> None:
    classifier = Flags(0)
    run(guarded(settings, "off", classifier, tmp_path), prompt="a nude")
    assert classifier.seen == []


def test_where_guests_are_the_language_model_is_asked_too(toys: Toys, tmp_path: Path, apple: Path) -> None:
    settings = toys.settings(tmp_path, ["dev"])
    models = ModelManager(settings, Hub(settings))
    mistral = next(it for it in LOCAL_WRITERS if it.has_vision)
    ask = make_yes_no_model(models.acquire_writer(mistral, lambda *_: None, [(128, 128)]).writer)
    picture = fit(load_reference(apple).image, 10**6)
    verdicts = [judge_with_model(ask, "a red house"), judge_with_model(ask, "", [picture])]
    reasons = [verdict.reason_text for verdict in verdicts if not verdict.allowed]
    fields: dict[str, Any] = {"prompt": "a red house", "references": (apple,), "steps": 1, "width": 64, "height": 64}
    events, _ = run(Studio(settings, guard=SafetyGuard("warn", classifier=Flags())), **fields)
    assert "seems to show" not in notices(events), "not where its owner is alone, and the model is not whole"
    studio = Studio(settings, guard=SafetyGuard("on", classifier=Flags()))
    if reasons:
        with pytest.raises(SafetyError, match=re.escape(reasons[0])):
            run(studio, **fields)
    else:
        run(studio, **fields)


# --- marks, and making a picture again --------------------------------------------------------------------------


def test_a_file_says_how_it_was_made(studio: Studio) -> None:
    events, result = run(studio, prompt="a flat fox", seed=4, width=256, height=256)
    (path,) = result.images
    record = record_in(path)
    weights = studio.settings.assets / "nano" / "transformer.safetensors"
    assert record.checkpoint == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert (record.label, record.request) == (studio.settings.checkpoint("nano").label, result.request)
    assert record.versions == studio.versions and record.computed["device"] == "cpu"
    mark = watermark.detect_watermark(Image.open(path), studio.message)
    assert mark is not None and mark.match_ratio >= 0.95
    assert studio.signer.read(path).own
    assert len(result.provenance) == 3 and "signed with this installation's own identity" in result.provenance[-1]
    assert "atermark" not in notices(events)


def test_a_small_picture_is_told_to_have_no_watermark_once(studio: Studio) -> None:
    events, _ = run(studio, prompt="a flat fox", count=3)
    assert notices(events).count("No watermark: at 128 x 128") == 1


@pytest.mark.parametrize(("format", "ending"), [("jpeg", ".jpg"), ("webp", ".webp")])
def test_other_formats(studio: Studio, format: Any, ending: str) -> None:
    _, result = run(studio, prompt="a flat fox", seed=4, format=format)
    assert result.images[0].suffix == ending and Image.open(result.images[0]).format == format.upper()
    assert record_in(result.images[0]).request == result.request


def test_an_edit_names_its_reference_and_keeps_its_credentials(studio: Studio) -> None:
    _, first = run(studio, prompt="a flat fox", seed=4)
    _, edit = run(studio, prompt="make the background blue", references=first.images, seed=5)
    data = first.images[0].read_bytes()
    assert record_in(edit.images[0]).references == (hashlib.sha256(data).hexdigest(),)
    found = studio.signer.read(edit.images[0])
    assert [action.name for action in found.actions][:2] == ["c2pa.opened", "c2pa.edited"]
    (ingredient,) = found.ingredients
    assert ingredient.signed and ingredient.generator.startswith("flux2-studio") and not ingredient.problems


def test_a_changed_reference_is_told(studio: Studio, tmp_path: Path) -> None:
    _, first = run(studio, prompt="a flat fox", seed=4)
    forged = tmp_path / "forged.png"
    with Image.open(io.BytesIO(first.images[0].read_bytes())) as image:
        image.load()
        image.putpixel((3, 3), (1, 2, 3))
        changed = io.BytesIO()
        image.save(changed, "PNG")
    source = first.images[0].read_bytes()
    start = source.index(b"caBX") - 4
    length = int.from_bytes(source[start : start + 4], "big") + 12
    bare = changed.getvalue()
    forged.write_bytes(bare[:33] + source[start : start + length] + bare[33:])
    events, _ = run(studio, prompt="make the background blue", references=(forged,), seed=5)
    assert "Image 1: Not intact" in notices(events)


def again(studio: Studio, record: Record, kept: ReferenceStore) -> list[Path]:
    """The pictures of a run that does what `record` says."""
    references = tuple(path for sha256 in record.references if (path := kept.find(sha256)))
    assert len(references) == len(record.references)
    assert record.request.seed is not None
    request = replace(
        record.request,
        references=references,
        seed=record.request.seed - record.place,
        count=record.together,
        loras=(),
    )
    return list(run(studio, **vars(request))[1].images)


@pytest.mark.parametrize(
    "fields",
    [
        {"references": 1},
        {"references": 2, "count": 3},
        {"checkpoint": "nano-base", "steps": 2, "guidance": 3.0, "negative_prompt": "blue", "width": 160, "count": 2},
    ],
)
def test_a_picture_is_made_again_to_the_last_bit(
    studio: Studio, settings: Settings, tmp_path: Path, apple: Path, fields: dict[str, Any]
) -> None:
    assert studio.reference_store is not None
    fields["references"] = (apple,) * fields.get("references", 0)
    if "width" in fields:
        fields["height"] = 128
    _, result = run(studio, prompt="make the background green", seed=9, **fields)
    apple.unlink()
    path = result.images[-1]
    record = record_in(path)
    made = again(Studio(replace(settings, home=tmp_path)), record, studio.reference_store)[record.place]
    np.testing.assert_array_equal(pixels(path), pixels(made))


def test_references_are_not_kept_without_settings_or_a_place(studio: Studio, settings: Settings, apple: Path) -> None:
    assert studio.reference_store is not None
    sha256 = hashlib.sha256(apple.read_bytes()).hexdigest()
    before = studio.reference_store.find(sha256)
    run(studio, prompt="make it blue", references=(apple,), metadata=False)
    assert studio.reference_store.find(sha256) == before
    _, result = run(Studio(settings), prompt="make it blue", references=(apple,))
    assert studio.reference_store.find(sha256) == before and record_in(result.images[0]).references == (sha256,)


def test_an_identity_that_cannot_sign_is_told_before_any_work(settings: Settings, tmp_path: Path) -> None:
    studio = Studio(replace(settings, home=tmp_path, c2pa_certificate=tmp_path / "none.pem", c2pa_key=tmp_path / "k"))
    with pytest.raises(CredentialsError, match="FLUX2_C2PA_CERTIFICATE"):
        list(studio.generate(Request(prompt="a fox")))
    run(studio, prompt="a fox", sign=False)


def test_a_picture_outlives_an_identity_that_fails_after_the_work(settings: Settings, tmp_path: Path) -> None:
    studio = Studio(replace(settings, home=tmp_path))
    events: list[Event] = []
    for event in studio.generate(Request(prompt="a fox", seed=3, count=2)):
        if isinstance(event, Saved):
            key = tmp_path / "identity" / "identity.pem"
            studio.signer._loaded = replace(studio.signer.identity, key=b"no key any more")  # as if it broke meanwhile
            assert key.is_file()
        events.append(event)
    end = events[-1]
    assert isinstance(end, Result) and end.seeds == (3, 4)
    assert "The picture is not signed." in notices(events) and "(seed 4)" in notices(events)
    assert [studio.signer.read(path).present for path in end.images] == [True, False]
    assert any(text.startswith("Content credentials") and text.endswith("(seed 3)") for text in end.provenance)


def test_strips_are_written_down_for_they_change_a_shade(settings: Settings, tmp_path: Path) -> None:
    short = Studio(replace(settings, home=tmp_path, memory_limit_gb=0.2))
    _, result = run(short, prompt="a fox", width=512, height=512, watermark=False, sign=False)
    assert record_in(result.images[0]).computed["autoencoder"].startswith("in strips of")
    _, result = run(short, prompt="a fox", watermark=False, sign=False)
    assert record_in(result.images[0]).computed == short.compute_settings(short.settings.checkpoint("nano"))


def test_a_watermark_that_cannot_be_laid_is_told_at_once(settings: Settings) -> None:
    with pytest.raises(StudioError, match="FLUX2_WATERMARK_MESSAGE"):
        Studio(replace(settings, watermark_message="x"))
