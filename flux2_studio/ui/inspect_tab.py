"""The Inspect tab: what a picture says of how it was made, and one click that puts its settings back.

What is looked at and what it amounts to is `provenance/inspect.py`'s. A file may come from anybody: all of its texts
are escaped here, and none is ever rendered as HTML or Markdown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError, StudioError
from flux2_studio.images.masks import load_mask
from flux2_studio.images.reference_store import KeptReferences
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.inspect import Inspection, credential_rows, inspect, setting_rows
from flux2_studio.provenance.metadata import run_again
from flux2_studio.provenance.watermark import Detection, Message
from flux2_studio.record import AS_WRITTEN, Record
from flux2_studio.request import LoraChoice, Request
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.mask_panel import restored
from flux2_studio.ui.forms.reference_panel import examine, offer, offered_to, paths
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import say, t, told
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

LONGEST = 200_000  # characters of a raw report; what a browser shows without taking ages
LOOKING = '<p class="looking" role="status" data-i18n>Looking at the picture…</p>'
EMPTY = (
    '<p class="lead" data-i18n>Any picture, by whatever program.</p>'
    "<p data-i18n>You see the settings that made it, whether it carries an invisible watermark, and who signed it; and "
    "you can make it again. It is looked at on the machine where this studio runs, and sent nowhere else.</p>"
)
# The report may be long, and the form that was filled lies above.
GO_TO_FORM = "() => document.getElementById('tabs').scrollIntoView({behavior: 'smooth'})"
NOW = "(items, _, asked) => [items, performance.now(), asked]"
FORMS = ("generate", "edit", "multi")  # for no reference, for one, for more


class References(Protocol):
    """Where the pictures are that others were made from."""

    def find(self, sha256: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class InspectTab:
    """`seen` is the last `Inspection`, None for none: what Restore puts back. `at` is sent by the browser with what it
    asks, and says when it did; `asked` keeps when that was last."""

    picture: gr.Gallery
    findings: gr.HTML  # what it amounts to
    restore: gr.Button
    note: gr.HTML  # what of the settings cannot be restored, or only nearly
    report: gr.HTML  # what there is in detail
    folded: gr.Accordion
    json: gr.Code
    credentials: gr.Code
    seen: gr.State
    at: gr.Number
    asked: gr.State


@dataclass
class Asked:
    """When a tab was last given something to look at, or its picture taken away, by the browser's clock: two looks at
    the same time may begin in either order."""

    last: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What Restore does with a picture's settings. `request` is None where they cannot be run here at all.

    form: the name of the form that takes them. references: those of the request that are kept here, in order.
    notes: what is missing, and what may make the picture differ, in sentences for the user.
    """

    form: str
    request: Request | None = None
    checkpoint: Checkpoint | None = None
    references: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def layout() -> InspectTab:
    with gr.Tab(t("Inspect"), id="inspect", elem_id="inspect", elem_classes="sheet"):
        seen, asked = gr.State(None), gr.State(Asked())  # in here: Gradio counts what lies between two tabs as one
        at = gr.Number(0, visible=False)
        picture = _picture()
        findings = gr.HTML(EMPTY, elem_id="inspect-findings")
        with gr.Column(elem_id="inspect-acts"):
            restore = gr.Button(
                t("Restore these settings"), variant="primary", size="lg", visible=False, elem_id="inspect-restore"
            )
            note = gr.HTML(elem_id="inspect-note", elem_classes="note")
        report = gr.HTML(elem_id="inspect-report")
        with gr.Accordion(t("All of it, for programs"), open=False, visible=False, elem_id="inspect-raw") as folded:
            as_json = gr.Code(
                language="json", label=t("Inspection"), interactive=False, max_lines=24, elem_id="inspect-json"
            )
            credentials = gr.Code(
                language="json",
                label=t("Content credentials, as the C2PA library reports them"),
                interactive=False,
                max_lines=24,
                elem_id="inspect-credentials",
            )
    return InspectTab(
        picture=picture,
        findings=findings,
        restore=restore,
        note=note,
        report=report,
        folded=folded,
        json=as_json,
        credentials=credentials,
        seen=seen,
        at=at,
        asked=asked,
    )


def wire(
    tab: InspectTab,
    studio: Studio,
    signer: Signer,
    messages: Sequence[Message],
    *,
    forms: Sequence[Form],
    chosen: gr.Dropdown,
    tabs: gr.Tabs,
    references: KeptReferences | None,
) -> None:
    """Connect the tab.

    signer, messages: see `inspect`. chosen, tabs, forms: of the page. references: where those of runs are kept; None
    where none are handed out, because others use this studio too.
    """

    def look(items: Any, at: float, asked: Asked) -> Iterator[Any]:
        if at < asked.last:
            yield gr.skip()
            return
        asked.last = at
        offered = paths(items)
        if not offered:
            yield _nothing(tab)
            return
        yield {
            **_nothing(tab),
            tab.picture: gr.Gallery([(str(offered[-1]), None)], selected_index=None),  # the newest, where it holds more
            tab.findings: LOOKING,
        }
        try:
            seen = inspect(offered[-1], signer, messages)
        except StudioError as error:
            found = {tab.findings: show.problem(str(error))}
        else:
            found = _shown(tab, seen, _plan(seen, studio, references))
        yield found if asked.last == at else gr.skip()  # meanwhile there may be another, or none

    def cleared(items: Any, at: float, asked: Asked) -> Any:
        if items or at < asked.last:
            return gr.skip()
        asked.last = at
        return _nothing(tab)

    def restore(seen: Inspection | None) -> Update:
        if seen is None or (plan := _plan(seen, studio, references)) is None:
            raise gr.Error(
                say("There are no settings to restore: choose a picture that has some."), print_exception=False
            )
        if plan.request is None:  # something went since the picture was looked at
            raise gr.Error(told(plan.notes[0]), print_exception=False)
        try:
            return {tab.note: show.notes(plan.notes), **filled(plan, forms, chosen, tabs)}
        except StudioError as error:  # what a file names as its mask need not be one
            raise gr.Error(told(str(error)), print_exception=False) from error

    said = [component for component in vars(tab).values() if component not in (tab.picture, tab.at, tab.asked)]
    heard: dict[str, Any] = {"inputs": [tab.picture, tab.at, tab.asked], "js": NOW, "trigger_mode": "multiple"}
    listen([tab.picture.upload, tab.picture.delete], look, outputs=[tab.picture, *said], concurrency_limit=2, **heard)
    # The gallery's own button to clear it is heard as a change only.
    listen(tab.picture.change, cleared, outputs=said, **heard)
    # A gallery with a selected picture takes no upload.
    listen(tab.picture.select, lambda: gr.Gallery(selected_index=None), None, tab.picture, queue=False)
    listen(tab.restore.click, None, js=GO_TO_FORM)
    listen(tab.restore.click, restore, tab.seen, [tab.note, *fillable(forms, chosen, tabs)])


# --- restoring --------------------------------------------------------------------------------------------------


def restoration(record: Record, studio: Studio, references: References | None) -> Restoration:
    """What can be done here to make the picture of `record` again, bit by bit.

    `record` is what a file claims. references: see `wire`.
    """
    form = FORMS[min(len(record.references), 2)]
    try:
        checkpoint = studio.settings.checkpoint(record.request.checkpoint)
    except RequestError:
        return Restoration(
            form=form,
            notes=(
                f"These settings cannot be restored here: this studio has no checkpoint called "
                f"{record.request.checkpoint!r} ({record.label}). Put its file into the folder that "
                f"FLUX2_CHECKPOINTS_DIR names, and start the studio again.",
            ),
        )
    # Only how many references there are, which the checkpoint may limit: their sizes are those of the settings.
    assert record.request.width and record.request.height
    before = record.request.outpaint.shrunk((record.request.width, record.request.height))
    placeholders = tuple(Path(sha256) for sha256 in record.references)
    try:
        request = replace(run_again(record), references=placeholders).resolve(checkpoint, [before] * len(placeholders))
    except RequestError as error:
        return Restoration(form=form, notes=(f"These settings cannot be restored here: {error}",))
    found, missing = _references(record, references)
    mask = references.find(record.mask) if references and record.mask else None
    if record.mask and mask is None:
        missing.append("Its mask is not kept here: paint or load it again.")
    loras, dropped = _loras(record, studio, checkpoint)
    together = (
        f"The picture was number {record.place + 1} of {record.together} drawn together. All of them are drawn again: "
        f"alone, it would differ in a shade here and there."
    )
    return Restoration(
        form=form,
        request=replace(request, references=found, mask=mask, loras=loras),
        checkpoint=checkpoint,
        references=found,
        notes=(
            *(["It is an unfinished preview: these settings make the finished picture."] if record.unfinished else []),
            *missing,
            *dropped,
            *_about_checkpoint(record, studio, checkpoint),
            *([together] if record.together > 1 else []),
            *_about_machine(record, studio, checkpoint),
        ),
    )


def _plan(seen: Inspection, studio: Studio, references: KeptReferences | None) -> Restoration | None:
    record = seen.settings.record
    return restoration(record, studio, references) if record else None


def _references(record: Record, store: References | None) -> tuple[tuple[Path, ...], list[str]]:
    if store is None:
        count = len(record.references)
        them = "1 reference" if count == 1 else f"{count} references"
        return (), [f"It was made from {them}. Pictures are not handed out here: add them again."] if count else []
    found = [store.find(sha256) for sha256 in record.references]
    missing = [
        f"Image {number} is not kept here: add it again{', in its place' if len(found) > 1 else ''}. Its SHA-256 is "
        f"{record.references[number - 1]}."
        for number, path in enumerate(found, 1)
        if path is None
    ]
    return tuple(path for path in found if path is not None), missing


def _loras(record: Record, studio: Studio, checkpoint: Checkpoint) -> tuple[tuple[LoraChoice, ...], list[str]]:
    """The LoRAs that there are and that fit, and a sentence about each that is gone or another one by now."""
    if not record.request.loras:
        return (), []
    widths = {entry.name: entry.width for entry in studio.loras.look()[0]}
    kept: list[LoraChoice] = []
    notes = []
    for choice, sha256 in zip(record.request.loras, record.loras, strict=True):
        if widths.get(choice.name, checkpoint.hidden_width) != checkpoint.hidden_width:
            notes.append(f"The LoRA {choice.name} is left out: what has that name here is for another checkpoint.")
            continue
        try:
            same = studio.loras.hash_of(choice) == sha256
        except StudioError as error:
            notes.append(f"The LoRA {choice.name} is left out. {error}")
            continue
        kept.append(choice)
        if not same:
            notes.append(f"The LoRA {choice.name} is another file here than it was: the picture will differ.")
    return tuple(kept), notes


def _about_checkpoint(record: Record, studio: Studio, checkpoint: Checkpoint) -> list[str]:
    if not studio.on_disk(checkpoint):
        return [f"{checkpoint.label} is not on this machine yet: the run downloads it first."]
    if not record.checkpoint:
        return []
    try:
        here = studio.checkpoint_hash(checkpoint)
    except StudioError as error:
        return [str(error)]
    if here is None:
        return [f"Whether the file of {checkpoint.label} is the same here is not known: it has not been read yet."]
    if here != record.checkpoint:
        return [f"The file of {checkpoint.label} is another one here than it was: the picture will differ."]
    return []


def _about_machine(record: Record, studio: Studio, checkpoint: Checkpoint) -> list[str]:
    here = {**studio.versions, **studio.computed(checkpoint)}
    then = {**record.versions, **record.computed}
    if record.computed:  # pictures were drawn so before they said it
        then.setdefault("blocks", AS_WRITTEN)
    other = [f"{name} {value} (here {here[name]})" for name, value in then.items() if here.get(name, value) != value]
    if not other:
        return []
    return [f"It was made with {', '.join(other)}: the picture may differ in tiny ways."]


def filled(plan: Restoration, forms: Sequence[Form], chosen: gr.Dropdown, tabs: gr.Tabs) -> Update:
    """The page with `plan` in its form: every field of it, so that nothing of what stood there before is left."""
    request, checkpoint = plan.request, plan.checkpoint
    assert request is not None and checkpoint is not None and request.width and request.height
    form = next(form for form in forms if form.name == plan.form)
    put = form.fields
    size = request.width, request.height
    # Only from its picture has an edit a size that is none of the engine's own.
    as_reference = bool(plan.form != "generate" and (request.mask or request.outpaint or request.drawn_size != size))
    width, height = fields.sides(None if as_reference else size)
    update: Update = {
        tabs: gr.Tabs(selected=form.name),
        chosen: checkpoint.name,
        form.laid_out_for: checkpoint.name,  # or the choice would overwrite what is put here
        put["prompt"]: request.prompt,
        put["negative_prompt"]: fields.negative_prompt(checkpoint, request.negative_prompt or ""),
        form.aspect: fields.AS_REFERENCE if as_reference else fields.FREE,
        put["width"]: width,
        put["height"]: height,
        form.size_note: "",
        put["steps"]: fields.steps(checkpoint, request.steps),
        put["guidance"]: fields.guidance(checkpoint, request.guidance),
        put["seed"]: request.seed,
        form.lock: True,
        put["count"]: request.count,
        put["loras"]: [{"name": lora.name, "weight": lora.weight} for lora in request.loras],
        form.loras.folded: gr.Accordion(fields.lora_title(len(request.loras))),
        form.upsampling.by: "none",
        # What the pixels depend on. What else the file is to say of itself stays as the user has it: this file may be
        # a stranger's, and have them publish their prompts.
        **{put[name]: getattr(request, name) for name in ("format", "watermark")},
    }
    if form.panel is None:
        return update
    update |= offer(form, plan.references, checkpoint)
    subject = examine(plan.references, checkpoint, checkpoint.max_references).first
    mask = None
    if request.mask and subject:
        mask = load_mask(request.mask, (subject.width, subject.height)).change
    update |= restored(form.fields, subject, mask, request.outpaint, match=request.match_colours)
    if request.mask or request.outpaint or request.match_colours:
        update[form.edits] = gr.Accordion(open=True)
    return update


def fillable(forms: Sequence[Form], chosen: gr.Dropdown, tabs: gr.Tabs) -> list[Any]:
    """The components that `filled` may set."""
    found: dict[Any, None] = dict.fromkeys([tabs, chosen])
    for form in forms:
        found |= dict.fromkeys(form.fields.values())
        found |= dict.fromkeys([form.laid_out_for, form.aspect, form.size_note, form.lock])
        found |= dict.fromkeys([form.loras.folded, form.upsampling.by])
        found |= dict.fromkeys([*offered_to(form), form.edits] if form.panel else [])
    return list(found)


# --- how it looks -----------------------------------------------------------------------------------------------


def _picture() -> gr.Gallery:
    """A gallery even for one: it hands over the uploaded file itself, unopened."""
    return gr.Gallery(
        label=t("Picture to inspect: drop, paste or choose one"),
        type="filepath",
        file_types=["image"],
        interactive=True,
        allow_preview=False,
        columns=1,
        height="auto",
        fit_columns=False,
        object_fit="contain",
        buttons=[],
        elem_id="inspect-picture",
        elem_classes=["references", "one"],
    )


def _nothing(tab: InspectTab) -> Update:
    return {
        tab.findings: EMPTY,
        tab.restore: gr.Button(visible=False),
        tab.note: "",
        tab.report: "",
        tab.folded: gr.Accordion(visible=False),
        tab.json: "",
        tab.credentials: "",
        tab.seen: None,
    }


def _shown(tab: InspectTab, seen: Inspection, plan: Restoration | None) -> Update:
    raw = seen.as_dict()
    report = raw["credentials"].pop("report")
    return {
        tab.findings: f"<ul>{''.join(f'<li>{escape(told(finding))}</li>' for finding in seen.findings)}</ul>",
        tab.restore: gr.Button(visible=plan is not None and plan.request is not None),
        tab.note: show.notes(plan.notes) if plan else "",
        tab.report: describe(seen),
        tab.folded: gr.Accordion(visible=True, open=False),
        tab.json: _cut(json.dumps(raw, indent=2, ensure_ascii=False)),
        tab.credentials: gr.Code(_cut(report), visible=bool(report)),
        tab.seen: seen,
    }


def describe(seen: Inspection) -> str:
    """What was found in a picture, in detail, as HTML."""
    record = seen.settings.record
    sections = [
        _section("Settings", setting_rows(record) if record else []),
        _watermark(seen.watermark),
        _section("Content credentials", credential_rows(seen.credentials)),
        _section("File", _file(seen).items()),
    ]
    return "".join(sections)


def _file(seen: Inspection) -> Mapping[str, str]:
    picture = (
        {
            "Picture": say(
                "{format}, {width} x {height} pixels", format=seen.format, width=seen.width, height=seen.height
            )
        }
        if seen.is_picture
        else {}
    )
    sha256 = {"SHA-256": seen.sha256} if seen.sha256 else {}
    return {"Name": seen.name, **picture, "Size": say("{count} bytes", count=f"{seen.bytes:,}"), **sha256}


def _watermark(mark: Detection | None) -> str:
    if mark is None:
        return ""
    state = say("found") if mark.found else say("not found")
    rows = {
        "Result": state,
        "Message": mark.message.label,
        "Bits that agree": say(
            "{right} of {all} ({share})", right=mark.right, all=len(mark.message.bits), share=f"{mark.match:.0%}"
        ),
        "By chance": say("one picture in {odds}", odds=mark.odds),
    }
    return _section("Invisible watermark", rows.items())


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(told(name))}</th><td>{escape(told(text))}</td></tr>'
        for name, text in rows
        if text
    )
    return f"<h3>{say(title)}</h3><table>{body}</table>" if body else ""


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}\n… {len(text) - LONGEST:,} characters more"
