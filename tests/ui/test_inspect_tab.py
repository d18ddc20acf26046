"""The Inspect tab without a browser: what it says of a picture, and that Restore asks for the very same run again."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from PIL import Image

from flux2_studio.checkpoints import DEV, KLEIN_BASE_4B, NANO, Checkpoint
from flux2_studio.errors import RequestError, WeightsError
from flux2_studio.images.picture_cache import PictureCache
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.models.loras import LoraEntry
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.inspect import Inspection, inspect_picture
from flux2_studio.provenance.metadata import encode_picture, request_to_reproduce
from flux2_studio.provenance.watermark import PUBLISHED_MESSAGE
from flux2_studio.record import Record
from flux2_studio.request import LoraChoice, Request
from flux2_studio.settings import Settings
from flux2_studio.ui import handlers, inspect_tab
from flux2_studio.ui.forms import fields, tabs
from flux2_studio.ui.forms.examples import Examples

HOSTILE = '<img src=x onerror="alert(1)">'
INK, GRAIN = "1f" * 32, "2f" * 32
REQUEST = Request(
    prompt=f"a fox\n{HOSTILE}",
    negative_prompt="blur",
    checkpoint="klein-base-4b",
    width=1360,
    height=768,
    steps=31,
    guidance=3.55,
    seed=4_000_000_001,
    loras=(LoraChoice(name="styles/ink", weight=0.5), LoraChoice(name="grain", weight=-1.0)),
    format="webp",
    watermark=False,
    sign=False,
    sign_prompt=True,
)
RECORD = Record(
    request=REQUEST,
    label=KLEIN_BASE_4B.label,
    checkpoint="ab" * 32,
    loras=(INK, GRAIN),
    versions={"torch": "2.13.0", "flux2-studio": "0.1.0"},
    computed={"device": "cpu", "precision": "float32"},
)


class Loras:
    """A folder of LoRAs by name: the width each is for, and the hash of its file."""

    def __init__(self, **found: tuple[int, str]) -> None:
        self.found = {name.replace("__", "/"): it for name, it in found.items()}

    def scan(self) -> tuple[list[LoraEntry], list[str]]:
        return [LoraEntry(name=name, kind="LoRA", width=it[0], family="x") for name, it in self.found.items()], []

    def hash_of(self, choice: LoraChoice) -> str:
        if choice.name not in self.found:
            raise RequestError(f"There is no LoRA called {choice.name!r}.")
        return self.found[choice.name][1]


class Studio:
    """What Restore asks a studio; by default one in which everything is as it was."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home)
        width = KLEIN_BASE_4B.hidden_width
        self.pictures = PictureCache()
        self.loras = Loras(styles__ink=(width, INK), grain=(width, GRAIN))
        self.hash: str | WeightsError | None = "ab" * 32
        self.versions: Mapping[str, str] = RECORD.versions
        self.here: Mapping[str, str] = RECORD.computed
        self.downloaded = True

    def is_on_disk(self, checkpoint: Checkpoint) -> bool:
        return self.downloaded

    def checkpoint_hash(self, checkpoint: Checkpoint) -> str | None:
        if isinstance(self.hash, WeightsError):
            raise self.hash
        return self.hash

    def compute_settings(self, checkpoint: Checkpoint) -> Mapping[str, str]:
        return self.here


class Page:
    """The forms and the tab laid out and wired in a page of their own, and the tab's events as functions."""

    def __init__(self, studio: Studio, references: ReferenceStore | None = None) -> None:
        settings = studio.settings
        examples = Examples.load(settings.assets / "examples")
        with gr.Blocks() as self.page:
            self.chosen = fields.checkpoint(settings.checkpoints, "nano")
            with gr.Tabs() as self.tabs:
                self.forms = [
                    layout(self.chosen, NANO, examples, settings) for layout in (tabs.generate, tabs.edit, tabs.multi)
                ]
                self.tab = inspect_tab.build_inspect_tab()
            inspect_tab.wire_inspect_tab(
                self.tab,
                studio,  # type: ignore[arg-type]
                Signer(settings.identity),
                [PUBLISHED_MESSAGE],
                forms=self.forms,
                checkpoint_dropdown=self.chosen,
                tabs=self.tabs,
                reference_store=references,
            )

    def form(self, name: str) -> tabs.Form:
        return next(form for form in self.forms if form.name == name)

    def on(self, component: Any, event: str) -> Callable[..., Any]:
        """What happens on `event`, besides what the browser does alone."""
        found = [fn for fn in self.page.fns.values() if (component._id, event) in fn.targets and fn.fn is not None]
        (only,) = found
        assert only.fn is not None
        self.outputs = only.outputs
        return only.fn

    def look(self, *files: Path) -> list[dict[Any, Any]]:
        updates = list(
            self.on(self.tab.picture, "upload")(
                [(str(file), None) for file in files], 1, inspect_tab.LatestInspection()
            )
        )
        assert all(set(update) <= set(self.outputs) for update in updates)
        return updates

    def restore(self, seen: Inspection | None) -> dict[Any, Any]:
        update: dict[Any, Any] = self.on(self.tab.restore, "click")(seen)
        assert set(update) <= set(self.outputs), "Gradio refuses an update of what is no output"
        return update

    def request(self, name: str, update: Mapping[Any, Any]) -> Request:
        """What form `name` asks for, once it shows `update` and its button is pressed."""
        form = self.form(name)
        # What the update leaves alone stays as the page shows it.
        shown = {key: value_of(update.get(component, component)) for key, component in form.fields.items()}
        untouched = {key: component.value for key, component in form.upsampling.inputs.items()}
        by = {"upsample_by": value_of(update[form.upsampling.provider])}
        references = {"references": shown["references"]} if "references" in shown else {}
        return handlers.read_form(
            {**untouched, **shown, **by, **references},
            locked=value_of(update[form.seed_lock]),
            checkpoint=Settings(home=Path()).checkpoint(shown["checkpoint"]),
            form_checkpoint=value_of(update[form.form_checkpoint]),
            aspect=value_of(update[form.aspect]),
        )


def as_the_page_has_it(request: Request) -> Request:
    """`request` with what its file says of itself as a new page has it: restoring leaves that alone."""
    return replace(request, metadata=True, sign=True, sign_prompt=False)


def value_of(update: Any) -> Any:
    """The value that an update gives its component, as the browser would send it back."""
    if isinstance(update, gr.Gallery):
        return [(item["image"]["path"], item["caption"]) for item in update.value or []]
    return update.value if isinstance(update, gr.components.Component) else update


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    return Studio(tmp_path)


@pytest.fixture
def store(tmp_path: Path) -> ReferenceStore:
    return ReferenceStore(tmp_path / "references")


def reference(colour: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (160, 96), colour).save(out, "PNG")
    return out.getvalue()


def plan(studio: Studio, record: Record = RECORD, store: ReferenceStore | None = None) -> inspect_tab.Restoration:
    return inspect_tab.plan_restoration(record, studio, store)  # type: ignore[arg-type]


def seen(record: Record | None = RECORD, size: tuple[int, int] = (64, 64), home: Path = Path("/nowhere")) -> Inspection:
    data = encode_picture(Image.new("RGB", size, "teal"), record.request.format if record else "png", record).data
    return inspect_picture(data, Signer(home), [PUBLISHED_MESSAGE])


# --- what can be restored -----------------------------------------------------------------------------------------


def test_where_everything_is_as_it_was_there_is_nothing_to_say(studio: Studio) -> None:
    found = plan(studio)
    assert found.notes == () and found.form == "generate" and found.checkpoint == KLEIN_BASE_4B
    assert found.request == REQUEST


def test_the_form_is_the_one_for_so_many_references(studio: Studio, store: ReferenceStore) -> None:
    hashes = tuple(store.save(reference(colour)) for colour in ("red", "green", "blue"))
    for count, name in enumerate(("generate", "edit", "multi", "multi")):
        found = plan(studio, replace(RECORD, references=hashes[:count]), store)
        assert found.form == name and found.notes == ()
        assert [path.stem for path in found.references] == list(hashes[:count])


def test_references_that_are_not_kept_are_named(studio: Studio, store: ReferenceStore) -> None:
    kept = store.save(reference("red"))
    one = plan(studio, replace(RECORD, references=("cd" * 32,)), store)
    assert one.form == "edit" and one.references == ()
    assert one.notes == (f"Image 1 is not kept here: add it again. Its SHA-256 is {'cd' * 32}.",)
    two = plan(studio, replace(RECORD, references=("cd" * 32, kept)), store)
    assert two.form == "multi" and [path.stem for path in two.references] == [kept]
    assert two.notes[0].startswith("Image 1 is not kept here: add it again, in its place.")


def test_where_others_come_by_no_reference_is_handed_out(studio: Studio) -> None:
    found = plan(studio, replace(RECORD, references=("cd" * 32, "ef" * 32)))
    assert found.request is not None and found.references == () and found.form == "multi"
    assert found.notes == ("It was made from 2 references. Pictures are not handed out here: add them again.",)


def test_a_checkpoint_that_is_not_here(studio: Studio) -> None:
    found = plan(studio, replace(RECORD, request=replace(REQUEST, checkpoint="my-own")))
    assert found.request is None
    assert "no checkpoint called 'my-own'" in found.notes[0] and "FLUX2_CHECKPOINTS_DIR" in found.notes[0]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"checkpoint": "nano", "width": 128, "height": 128}, "does not use a negative prompt"),
        ({"checkpoint": "klein-4b", "negative_prompt": "", "steps": 50}, "always runs with steps"),
        ({"width": 9000, "height": 9000}, "too large"),
        ({"width": 16}, "at least 64 pixels"),
        ({"steps": 5000}, "takes steps from"),
        ({"guidance": 900.0}, "takes guidance from"),
    ],
)
def test_forged_settings_are_not_put_into_a_form(studio: Studio, changes: dict[str, Any], says: str) -> None:
    found = plan(studio, replace(RECORD, request=replace(REQUEST, **changes)))
    assert found.request is None
    assert found.notes[0].startswith("These settings cannot be restored here") and says in found.notes[0]


def test_more_references_than_the_checkpoint_takes(studio: Studio, store: ReferenceStore) -> None:
    found = plan(studio, replace(RECORD, references=("cd" * 32,) * 11), store)
    assert found.request is None and "at most 10 references" in found.notes[0]


def test_loras_that_are_gone_or_others_by_now(studio: Studio) -> None:
    width = KLEIN_BASE_4B.hidden_width
    studio.loras = Loras(grain=(width, "00" * 32))
    found = plan(studio)
    assert found.request is not None and found.request.loras == (LoraChoice(name="grain", weight=-1.0),)
    gone, other = found.notes
    assert gone == "The LoRA styles/ink is left out. There is no LoRA called 'styles/ink'."
    assert other == "The LoRA grain is another file here than it was: the picture will differ."
    studio.loras = Loras(styles__ink=(width, INK), grain=(DEV.hidden_width, GRAIN))
    found = plan(studio)
    assert found.request is not None and [lora.name for lora in found.request.loras] == ["styles/ink"]
    assert found.notes == ("The LoRA grain is left out: what has that name here is for another checkpoint.",)


def test_the_checkpoints_file_is_compared(studio: Studio) -> None:
    studio.hash = "00" * 32
    assert "is another one here than it was: the picture will differ" in plan(studio).notes[0]
    studio.hash = None
    assert "is not known" in plan(studio).notes[0]
    assert plan(studio, replace(RECORD, checkpoint="")).notes == (), "the file does not say which it was"
    studio.hash = WeightsError("It cannot be read: allow it.")
    assert plan(studio).notes == ("It cannot be read: allow it.",)
    studio.downloaded = False
    assert "the run downloads it first" in plan(studio).notes[0]
    assert plan(studio).request is not None


def test_another_torch_or_device_is_told(studio: Studio) -> None:
    studio.versions = {"torch": "2.14.0", "transformers": "6"}
    studio.here = {"device": "cuda", "precision": "float32"}
    assert plan(studio).notes == (
        "It was made with torch 2.13.0 (here 2.14.0), device cpu (here cuda): the picture may differ in tiny ways.",
    )


def test_pictures_drawn_together_are_drawn_together_again(studio: Studio) -> None:
    found = plan(studio, replace(RECORD, place=2, together=4))
    assert found.request is not None
    assert (found.request.seed, found.request.count) == (REQUEST.seed - 2, 4)  # type: ignore[operator]
    assert found.notes[0].startswith("The picture was number 3 of 4 drawn together.")


# --- restoring ----------------------------------------------------------------------------------------------------


def test_restoring_asks_for_the_very_same_run(studio: Studio) -> None:
    page = Page(studio)
    update = page.restore(seen())
    assert update[page.tabs].selected == "generate"
    assert page.request("generate", update) == as_the_page_has_it(REQUEST)
    form = page.form("generate")
    assert update[form.aspect] == fields.FREE and update[form.size_note] == ""
    assert update[form.fields["width"]].visible and update[form.fields["height"]].visible
    assert update[form.fields["negative_prompt"]].visible
    assert update[form.fields["steps"]].maximum == KLEIN_BASE_4B.max_steps
    assert update[form.loras.accordion].label == "LoRAs (2)"
    assert update[page.tab.note] == ""


@pytest.mark.parametrize("count", [1, 2, 10])
def test_restoring_puts_the_references_back(studio: Studio, store: ReferenceStore, count: int) -> None:
    hashes = tuple(store.save(reference(f"#0000{number:02x}")) for number in range(count))
    record = replace(RECORD, references=hashes, place=1, together=2)
    page = Page(studio, store)
    name = "edit" if count == 1 else "multi"
    update = page.restore(seen(record))
    assert update[page.tabs].selected == name
    asked = page.request(name, update)
    assert [path.stem for path in asked.references] == list(hashes)
    assert replace(asked, references=()) == as_the_page_has_it(request_to_reproduce(record))
    panel = page.form(name).reference_panel
    assert panel is not None and update[panel.problems] == ""


def test_restoring_takes_away_the_references_of_before(studio: Studio) -> None:
    """Others' pictures are not handed out here, and what stood in the form must not be taken for them."""
    page = Page(studio)
    update = page.restore(seen(replace(RECORD, references=("cd" * 32,))))
    form = page.form("edit")
    assert value_of(update[form.fields["references"]]) == []
    with pytest.raises(RequestError, match="Add a picture first"):
        page.request("edit", update)
    assert "not handed out here" in update[page.tab.note]


def test_other_forms_stay_as_they_are(studio: Studio) -> None:
    page = Page(studio)
    update = page.restore(seen())
    for name in ("edit", "multi"):
        form = page.form(name)
        own = {*form.fields.values(), form.seed_lock, form.aspect, form.form_checkpoint, form.upsampling.provider} - {
            page.chosen
        }
        assert not own & set(update)


def test_a_checkpoint_without_a_negative_prompt_gets_an_empty_one(studio: Studio) -> None:
    record = replace(
        RECORD,
        request=replace(
            REQUEST, checkpoint="nano", negative_prompt="", width=128, height=128, steps=4, guidance=1.0, loras=()
        ),
        loras=(),
    )
    page = Page(studio)
    update = page.restore(seen(record))
    negative = update[page.form("generate").fields["negative_prompt"]]
    assert negative.value == "" and not negative.visible
    assert page.request("generate", update) == as_the_page_has_it(record.request)


@pytest.mark.parametrize("nothing", [None, seen(None)])
def test_there_must_be_something_to_restore(studio: Studio, nothing: Inspection | None) -> None:
    with pytest.raises(gr.Error, match="no settings to restore"):
        Page(studio).restore(nothing)


def test_what_went_in_the_meantime_is_told(studio: Studio) -> None:
    page = Page(studio)
    found = seen()
    studio.settings = replace(studio.settings, checkpoints=(NANO,))
    with pytest.raises(gr.Error, match="no checkpoint called 'klein-base-4b'"):
        page.restore(found)


# --- what is shown ------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"{HOSTILE.replace('/', '')}.webp"
    path.write_bytes(encode_picture(Image.new("RGB", (64, 64), "teal"), "webp", RECORD).data)
    return path


def text(html: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", html).split())


def test_looking_at_a_picture(studio: Studio, file: Path) -> None:
    page = Page(studio)
    first, last = page.look(file)
    tab = page.tab
    assert first[tab.findings] == inspect_tab.INSPECTING_HTML and first[tab.inspection] is None, (
        "nothing old is left meanwhile"
    )
    assert "only what the file claims" in text(last[tab.findings])
    assert "Steps 31" in text(last[tab.report]) and "Guidance 3.55" in text(last[tab.report])
    assert last[tab.restore].visible and last[tab.note] == ""
    assert last[tab.inspection].settings.record == RECORD
    assert json.loads(last[tab.json])["settings"]["request"]["seed"] == REQUEST.seed
    assert not last[tab.credentials].visible


def test_nothing_of_a_file_is_html(studio: Studio, file: Path) -> None:
    page = Page(studio)
    record = replace(
        RECORD,
        label=HOSTILE,
        upsampled_by=HOSTILE,
        original_prompt=HOSTILE,
        versions={HOSTILE: HOSTILE},
        computed={HOSTILE: HOSTILE},
        request=replace(REQUEST, checkpoint=HOSTILE, loras=(LoraChoice(name="<b>"),)),
        loras=(INK,),
    )
    file.write_bytes(encode_picture(Image.new("RGB", (64, 64)), "webp", record).data)
    *_, last = page.look(file)
    for html in (last[page.tab.findings], last[page.tab.report], last[page.tab.note]):
        assert "<img" not in html and "<b>" not in html
    assert "&lt;img src=x" in last[page.tab.report]
    assert not last[page.tab.restore].visible, "there is no such checkpoint"
    assert "cannot be restored here" in last[page.tab.note]


def test_signed_pictures_show_who_signed(studio: Studio, tmp_path: Path) -> None:
    signer = Signer(studio.settings.identity)
    data = encode_picture(Image.new("RGB", (256, 256), "teal"), "png", None).data
    (tmp_path / "a.png").write_bytes(signer.sign(data, HOSTILE, prompt=HOSTILE).data)
    page = Page(studio)
    *_, last = page.look(tmp_path / "a.png")
    report = last[page.tab.report]
    assert "flux2-studio, local identity (this installation)" in text(report)
    assert "Prompt, published" in report and "<img" not in report
    assert "Bits that agree" in report
    assert last[page.tab.credentials].visible and '"manifests"' in last[page.tab.credentials].value
    assert "report" not in json.loads(last[page.tab.json])["credentials"], "it has a place of its own"
    assert not last[page.tab.restore].visible


def test_no_picture_and_no_file(studio: Studio, tmp_path: Path) -> None:
    page = Page(studio)
    (tmp_path / "x.png").write_bytes(b"rubbish")
    *_, last = page.look(tmp_path / "x.png")
    assert "not a picture" in text(last[page.tab.findings]) and not last[page.tab.restore].visible
    *_, gone = page.look(tmp_path / "gone.png")
    assert "There is no file gone.png" in gone[page.tab.findings]


def test_the_newest_of_several_is_looked_at(studio: Studio, file: Path, tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(reference("red"))
    page = Page(studio)
    first, last = page.look(tmp_path / "old.png", file)
    ((shown, _),) = value_of(first[page.tab.picture])
    assert Path(shown).read_bytes() == file.read_bytes()
    assert last[page.tab.inspection].settings.record == RECORD


def test_an_emptied_gallery_empties_the_tab(studio: Studio, file: Path) -> None:
    page = Page(studio)
    (update,) = page.look()
    assert update[page.tab.inspection] is None and not update[page.tab.restore].visible
    cleared, asked = page.on(page.tab.picture, "change"), inspect_tab.LatestInspection()
    assert cleared([(str(file), None)], 1, asked) == gr.skip()
    assert cleared([], 1, asked)[page.tab.findings] == inspect_tab.INSPECT_INTRO_HTML


@pytest.mark.parametrize("event, items", [("change", []), ("upload", [("other.png", None)]), ("delete", [])])
def test_what_was_found_is_not_told_when_the_picture_is_another(
    studio: Studio, file: Path, event: str, items: list[tuple[str, None]]
) -> None:
    page, asked = Page(studio), inspect_tab.LatestInspection()
    looking = page.on(page.tab.picture, "upload")([(str(file), None)], 1, asked)
    next(looking)
    meanwhile = page.on(page.tab.picture, event)(items, 2, asked)
    if event != "change":
        next(meanwhile)
    assert list(looking) == [gr.skip()]
    # Nor is it looked at where it was asked first and comes second.
    assert list(page.on(page.tab.picture, "upload")([(str(file), None)], 1, asked)) == [gr.skip()]


def test_a_report_of_great_length_is_cut() -> None:
    assert inspect_tab._truncate("x" * 200_000) == "x" * 200_000
    cut = inspect_tab._truncate("x" * 300_000)
    assert len(cut) < 200_100 and cut.endswith("100,000 characters more")


def test_the_tab_and_its_parts_can_be_found(studio: Studio) -> None:
    page = Page(studio)
    ids = {block.elem_id for block in page.page.blocks.values() if getattr(block, "elem_id", None)}
    assert {"inspect", "inspect-picture", "inspect-findings", "inspect-restore", "inspect-note"} <= ids
    assert {fn.api_visibility for fn in page.page.fns.values()} == {"private"}
