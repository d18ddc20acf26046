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
from flux2_studio.images.reference_store import ReferenceStore
from flux2_studio.provenance.c2pa.credentials import Signer
from flux2_studio.provenance.inspect import Inspection, credential_rows, inspect_picture, setting_rows
from flux2_studio.provenance.metadata import request_to_reproduce
from flux2_studio.provenance.watermark import WatermarkDetection, WatermarkMessage
from flux2_studio.record import EAGER_BLOCKS, Record
from flux2_studio.request import LoraChoice, Request
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.mask_panel import restore_mask_panel
from flux2_studio.ui.forms.reference_panel import examine, gallery_paths, reference_outputs, set_references
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

MAX_REPORT_CHARS = 200_000  # characters of a raw report; what a browser shows without taking ages
INSPECTING_HTML = '<p class="looking" role="status" data-i18n>Looking at the picture…</p>'
INSPECT_INTRO_HTML = (
    '<p class="lead" data-i18n>Any picture, by whatever program.</p>'
    "<p data-i18n>You see the settings that made it, whether it carries an invisible watermark, and who signed it; and "
    "you can make it again. It is looked at on the machine where this studio runs, and sent nowhere else.</p>"
)
# The report may be long, and the form that was filled lies above.
SCROLL_TO_TABS_JS = "() => document.getElementById('tabs').scrollIntoView({behavior: 'smooth'})"
SEND_TIME_JS = "(items, _, asked) => [items, performance.now(), asked]"
FORM_BY_REFERENCE_COUNT = ("generate", "edit", "multi")  # for no reference, for one, for more


class ReferenceFinder(Protocol):
    """Where the pictures are that others were made from."""

    def find(self, sha256: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class InspectTab:
    """`inspection` is the last `Inspection`, None for none: what Restore puts back. `sent_at` is sent by the browser
    with what it asks, and says when it did; `latest` keeps when that was last."""

    picture: gr.Gallery
    findings: gr.HTML  # what it amounts to
    restore: gr.Button
    note: gr.HTML  # what of the settings cannot be restored, or only nearly
    report: gr.HTML  # what there is in detail
    raw_accordion: gr.Accordion
    json: gr.Code
    credentials: gr.Code
    inspection: gr.State
    sent_at: gr.Number
    latest: gr.State


@dataclass
class LatestInspection:
    """When a tab was last given something to look at, or its picture taken away, by the browser's clock: two looks at
    the same time may begin in either order."""

    sent_at: float = 0.0


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


def build_inspect_tab() -> InspectTab:
    with gr.Tab(i18n("Inspect"), id="inspect", elem_id="inspect", elem_classes="sheet"):
        seen, asked = (
            gr.State(None),
            gr.State(LatestInspection()),
        )  # in here: Gradio counts what lies between two tabs as one
        at = gr.Number(0, visible=False)
        picture = _picture()
        findings = gr.HTML(INSPECT_INTRO_HTML, elem_id="inspect-findings")
        with gr.Column(elem_id="inspect-acts"):
            restore = gr.Button(
                i18n("Restore these settings"), variant="primary", size="lg", visible=False, elem_id="inspect-restore"
            )
            note = gr.HTML(elem_id="inspect-note", elem_classes="note")
        report = gr.HTML(elem_id="inspect-report")
        with gr.Accordion(i18n("All of it, for programs"), open=False, visible=False, elem_id="inspect-raw") as folded:
            as_json = gr.Code(
                language="json", label=i18n("Inspection"), interactive=False, max_lines=24, elem_id="inspect-json"
            )
            credentials = gr.Code(
                language="json",
                label=i18n("Content credentials, as the C2PA library reports them"),
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
        raw_accordion=folded,
        json=as_json,
        credentials=credentials,
        inspection=seen,
        sent_at=at,
        latest=asked,
    )


def wire_inspect_tab(
    tab: InspectTab,
    studio: Studio,
    signer: Signer,
    messages: Sequence[WatermarkMessage],
    *,
    forms: Sequence[Form],
    checkpoint_dropdown: gr.Dropdown,
    tabs: gr.Tabs,
    reference_store: ReferenceStore | None,
) -> None:
    """Connect the tab.

    signer, messages: see `inspect_picture`. checkpoint_dropdown, tabs, forms: of the page. reference_store: where those
    of runs are kept; None where none are handed out, because others use this studio too.
    """

    def look(items: Any, sent_at: float, latest: LatestInspection) -> Iterator[Any]:
        if sent_at < latest.sent_at:
            yield gr.skip()
            return
        latest.sent_at = sent_at
        offered = gallery_paths(items)
        if not offered:
            yield _nothing(tab)
            return
        yield {
            **_nothing(tab),
            tab.picture: gr.Gallery([(str(offered[-1]), None)], selected_index=None),  # the newest, where it holds more
            tab.findings: INSPECTING_HTML,
        }
        try:
            seen = inspect_picture(offered[-1], signer, messages)
        except StudioError as error:
            found = {tab.findings: render.problem(str(error))}
        else:
            found = _shown(tab, seen, _plan(seen, studio, reference_store))
        yield found if latest.sent_at == sent_at else gr.skip()  # meanwhile there may be another, or none

    def cleared(items: Any, sent_at: float, latest: LatestInspection) -> Any:
        if items or sent_at < latest.sent_at:
            return gr.skip()
        latest.sent_at = sent_at
        return _nothing(tab)

    def restore(seen: Inspection | None) -> Update:
        if seen is None or (plan := _plan(seen, studio, reference_store)) is None:
            raise gr.Error(
                translate("There are no settings to restore: choose a picture that has some."), print_exception=False
            )
        if plan.request is None:  # something went since the picture was looked at
            raise gr.Error(translate_message(plan.notes[0]), print_exception=False)
        try:
            return {tab.note: render.notes(plan.notes), **restoration_update(plan, forms, checkpoint_dropdown, tabs)}
        except StudioError as error:  # what a file names as its mask need not be one
            raise gr.Error(translate_message(str(error)), print_exception=False) from error

    said = [component for component in vars(tab).values() if component not in (tab.picture, tab.sent_at, tab.latest)]
    heard: dict[str, Any] = {
        "inputs": [tab.picture, tab.sent_at, tab.latest],
        "js": SEND_TIME_JS,
        "trigger_mode": "multiple",
    }
    listen([tab.picture.upload, tab.picture.delete], look, outputs=[tab.picture, *said], concurrency_limit=2, **heard)
    # The gallery's own button to clear it is heard as a change only.
    listen(tab.picture.change, cleared, outputs=said, **heard)
    # A gallery with a selected picture takes no upload.
    listen(tab.picture.select, lambda: gr.Gallery(selected_index=None), None, tab.picture, queue=False)
    listen(tab.restore.click, None, js=SCROLL_TO_TABS_JS)
    listen(
        tab.restore.click, restore, tab.inspection, [tab.note, *restoration_outputs(forms, checkpoint_dropdown, tabs)]
    )


# --- restoring --------------------------------------------------------------------------------------------------


def plan_restoration(record: Record, studio: Studio, reference_finder: ReferenceFinder | None) -> Restoration:
    """What can be done here to make the picture of `record` again, bit by bit.

    `record` is what a file claims. reference_finder: see `wire_inspect_tab`.
    """
    form = FORM_BY_REFERENCE_COUNT[min(len(record.references), 2)]
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
        request = replace(request_to_reproduce(record), references=placeholders).resolve(
            checkpoint, [before] * len(placeholders)
        )
    except RequestError as error:
        return Restoration(form=form, notes=(f"These settings cannot be restored here: {error}",))
    found, missing = _references(record, reference_finder)
    mask = reference_finder.find(record.mask) if reference_finder and record.mask else None
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


def _plan(seen: Inspection, studio: Studio, reference_store: ReferenceStore | None) -> Restoration | None:
    record = seen.settings.record
    return plan_restoration(record, studio, reference_store) if record else None


def _references(record: Record, store: ReferenceFinder | None) -> tuple[tuple[Path, ...], list[str]]:
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
    widths = {entry.name: entry.width for entry in studio.loras.scan()[0]}
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
    if not studio.is_on_disk(checkpoint):
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
    here = {**studio.versions, **studio.compute_settings(checkpoint)}
    then = {**record.versions, **record.computed}
    if record.computed:  # pictures were drawn so before they said it
        then.setdefault("blocks", EAGER_BLOCKS)
    other = [f"{name} {value} (here {here[name]})" for name, value in then.items() if here.get(name, value) != value]
    if not other:
        return []
    return [f"It was made with {', '.join(other)}: the picture may differ in tiny ways."]


def restoration_update(
    plan: Restoration, forms: Sequence[Form], checkpoint_dropdown: gr.Dropdown, tabs: gr.Tabs
) -> Update:
    """The page with `plan` in its form: every field of it, so that nothing of what stood there before is left."""
    request, checkpoint = plan.request, plan.checkpoint
    assert request is not None and checkpoint is not None and request.width and request.height
    form = next(form for form in forms if form.name == plan.form)
    put = form.fields
    size = request.width, request.height
    # Only from its picture has an edit a size that is none of the engine's own.
    as_reference = bool(plan.form != "generate" and (request.mask or request.outpaint or request.padded_size != size))
    width, height = fields.sides(None if as_reference else size)
    update: Update = {
        tabs: gr.Tabs(selected=form.name),
        checkpoint_dropdown: checkpoint.name,
        form.form_checkpoint: checkpoint.name,  # or the choice would overwrite what is put here
        put["prompt"]: request.prompt,
        put["negative_prompt"]: fields.negative_prompt(checkpoint, request.negative_prompt or ""),
        form.aspect: fields.AS_REFERENCE if as_reference else fields.FREE,
        put["width"]: width,
        put["height"]: height,
        form.size_note: "",
        put["steps"]: fields.steps(checkpoint, request.steps),
        put["guidance"]: fields.guidance(checkpoint, request.guidance),
        put["seed"]: request.seed,
        form.seed_lock: True,
        put["count"]: request.count,
        put["loras"]: [{"name": lora.name, "weight": lora.weight} for lora in request.loras],
        form.loras.accordion: gr.Accordion(fields.lora_title(len(request.loras))),
        form.upsampling.provider: "none",
        # What the pixels depend on. What else the file is to say of itself stays as the user has it: this file may be
        # a stranger's, and have them publish their prompts.
        **{put[name]: getattr(request, name) for name in ("format", "watermark")},
    }
    if form.reference_panel is None:
        return update
    update |= set_references(form, plan.references, checkpoint)
    subject = examine(plan.references, checkpoint, checkpoint.max_references).first_subject
    mask = None
    if request.mask and subject:
        mask = load_mask(request.mask, (subject.width, subject.height)).edit_mask
    update |= restore_mask_panel(form.fields, subject, mask, request.outpaint, match_colours=request.match_colours)
    if request.mask or request.outpaint or request.match_colours:
        update[form.edit_accordion] = gr.Accordion(open=True)
    return update


def restoration_outputs(forms: Sequence[Form], checkpoint_dropdown: gr.Dropdown, tabs: gr.Tabs) -> list[Any]:
    """The components that `restoration_update` may set."""
    found: dict[Any, None] = dict.fromkeys([tabs, checkpoint_dropdown])
    for form in forms:
        found |= dict.fromkeys(form.fields.values())
        found |= dict.fromkeys([form.form_checkpoint, form.aspect, form.size_note, form.seed_lock])
        found |= dict.fromkeys([form.loras.accordion, form.upsampling.provider])
        found |= dict.fromkeys([*reference_outputs(form), form.edit_accordion] if form.reference_panel else [])
    return list(found)


# --- how it looks -----------------------------------------------------------------------------------------------


def _picture() -> gr.Gallery:
    """A gallery even for one: it hands over the uploaded file itself, unopened."""
    return gr.Gallery(
        label=i18n("Picture to inspect: drop, paste or choose one"),
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
        tab.findings: INSPECT_INTRO_HTML,
        tab.restore: gr.Button(visible=False),
        tab.note: "",
        tab.report: "",
        tab.raw_accordion: gr.Accordion(visible=False),
        tab.json: "",
        tab.credentials: "",
        tab.inspection: None,
    }


def _shown(tab: InspectTab, seen: Inspection, plan: Restoration | None) -> Update:
    raw = seen.as_dict()
    report = raw["credentials"].pop("report")
    findings = "".join(f"<li>{escape(translate_message(finding))}</li>" for finding in seen.findings)
    return {
        tab.findings: f"<ul>{findings}</ul>",
        tab.restore: gr.Button(visible=plan is not None and plan.request is not None),
        tab.note: render.notes(plan.notes) if plan else "",
        tab.report: inspection_html(seen),
        tab.raw_accordion: gr.Accordion(visible=True, open=False),
        tab.json: _truncate(json.dumps(raw, indent=2, ensure_ascii=False)),
        tab.credentials: gr.Code(_truncate(report), visible=bool(report)),
        tab.inspection: seen,
    }


def inspection_html(seen: Inspection) -> str:
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
            "Picture": translate(
                "{format}, {width} x {height} pixels", format=seen.format, width=seen.width, height=seen.height
            )
        }
        if seen.is_picture
        else {}
    )
    sha256 = {"SHA-256": seen.sha256} if seen.sha256 else {}
    return {"Name": seen.name, **picture, "Size": translate("{count} bytes", count=f"{seen.bytes:,}"), **sha256}


def _watermark(mark: WatermarkDetection | None) -> str:
    if mark is None:
        return ""
    state = translate("found") if mark.found else translate("not found")
    rows = {
        "Result": state,
        "Message": mark.message.label,
        "Bits that agree": translate(
            "{right} of {all} ({share})",
            right=mark.matching_bits,
            all=len(mark.message.bits),
            share=f"{mark.match_ratio:.0%}",
        ),
        "By chance": translate("one picture in {odds}", odds=mark.odds),
    }
    return _section("Invisible watermark", rows.items())


def _section(title: str, rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(translate_message(name))}</th><td>{escape(translate_message(text))}</td></tr>'
        for name, text in rows
        if text
    )
    return f"<h3>{translate(title)}</h3><table>{body}</table>" if body else ""


def _truncate(text: str) -> str:
    return (
        text
        if len(text) <= MAX_REPORT_CHARS
        else f"{text[:MAX_REPORT_CHARS]}\n… {len(text) - MAX_REPORT_CHARS:,} characters more"
    )
