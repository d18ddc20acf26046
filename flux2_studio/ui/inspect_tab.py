"""The Inspect tab: shows how a picture was made, and restores its settings with one click.

`provenance/inspect.py` does the inspection. Files are untrusted: all of their texts are escaped here and never rendered
as HTML or Markdown.
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
from flux2_studio.images.picture_cache import PictureCache
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

MAX_REPORT_CHARS = 200_000  # per raw report; browsers show this much without delay
INSPECTING_HTML = '<p class="looking" role="status" data-i18n>Looking at the picture…</p>'
INSPECT_INTRO_HTML = (
    '<p class="lead" data-i18n>Any picture, by whatever program.</p>'
    "<p data-i18n>You see the settings that made it, whether it carries an invisible watermark, and who signed it; and "
    "you can make it again. It is looked at on the machine where this studio runs, and sent nowhere else.</p>"
)
# The report may be long, and the filled form is above it.
SCROLL_TO_TABS_JS = "() => document.getElementById('tabs').scrollIntoView({behavior: 'smooth'})"
SEND_TIME_JS = "(items, _, asked) => [items, performance.now(), asked]"
FORM_BY_REFERENCE_COUNT = ("generate", "edit", "multi")  # by number of references: none, one, more


class ReferenceFinder(Protocol):
    """Finds stored reference pictures by hash."""

    def find(self, sha256: str) -> Path | None: ...


@dataclass(frozen=True, kw_only=True)
class InspectTab:
    """The components of the tab.

    `inspection`: the last `Inspection`, which Restore uses; None if there is none. `sent_at`: the browser's time of a
    request, sent with it; `latest`: the time of the latest request.
    """

    picture: gr.Gallery
    findings: gr.HTML  # conclusions
    restore: gr.Button
    note: gr.HTML  # settings that cannot be restored, or not exactly
    report: gr.HTML  # details
    raw_accordion: gr.Accordion
    json: gr.Code
    credentials: gr.Code
    inspection: gr.State
    sent_at: gr.Number
    latest: gr.State


@dataclass
class LatestInspection:
    """Time of a tab's latest change of its picture, by the browser's clock.

    Two inspections at the same time may start in either order.
    """

    sent_at: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Restoration:
    """What Restore does with a picture's settings. `request` is None if they cannot be run here.

    form: the name of the target form. references: those of the request that are available here, in order. notes: what
    is missing, and what may make the picture differ, in sentences for the user.
    """

    form: str
    request: Request | None = None
    checkpoint: Checkpoint | None = None
    references: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


def build_inspect_tab() -> InspectTab:
    with gr.Tab(i18n("Inspect"), id="inspect", elem_id="inspect", elem_classes="sheet"):
        # Inside the tab: Gradio counts components between two tabs as a tab.
        inspection, latest = gr.State(None), gr.State(LatestInspection())
        sent_at = gr.Number(0, visible=False)
        picture = _picture_input()
        findings = gr.HTML(INSPECT_INTRO_HTML, elem_id="inspect-findings")
        with gr.Column(elem_id="inspect-acts"):
            restore = gr.Button(
                i18n("Restore these settings"), variant="primary", size="lg", visible=False, elem_id="inspect-restore"
            )
            note = gr.HTML(elem_id="inspect-note", elem_classes="note")
        report = gr.HTML(elem_id="inspect-report")
        with gr.Accordion(
            i18n("All of it, for programs"), open=False, visible=False, elem_id="inspect-raw"
        ) as raw_accordion:
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
        raw_accordion=raw_accordion,
        json=as_json,
        credentials=credentials,
        inspection=inspection,
        sent_at=sent_at,
        latest=latest,
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

    signer, messages: see `inspect_picture`. checkpoint_dropdown, tabs, forms: of the page. reference_store: references
    of runs; None if other people use this studio, who must not get them.
    """

    def inspect(items: Any, sent_at: float, latest: LatestInspection) -> Iterator[Any]:
        if sent_at < latest.sent_at:
            yield gr.skip()
            return
        latest.sent_at = sent_at
        paths = gallery_paths(items)
        if not paths:
            yield _empty_update(tab)
            return
        yield {
            **_empty_update(tab),
            tab.picture: gr.Gallery([(str(paths[-1]), None)], selected_index=None),  # only the newest
            tab.findings: INSPECTING_HTML,
        }
        try:
            inspection = inspect_picture(paths[-1], signer, messages)
        except StudioError as error:
            update = {tab.findings: render.problem(str(error))}
        else:
            update = _inspection_update(tab, inspection, _plan(inspection, studio, reference_store))
        yield update if latest.sent_at == sent_at else gr.skip()  # meanwhile the picture may have changed

    def clear(items: Any, sent_at: float, latest: LatestInspection) -> Any:
        if items or sent_at < latest.sent_at:
            return gr.skip()
        latest.sent_at = sent_at
        return _empty_update(tab)

    def restore(inspection: Inspection | None) -> Update:
        if inspection is None or (plan := _plan(inspection, studio, reference_store)) is None:
            raise gr.Error(
                translate("There are no settings to restore: choose a picture that has some."), print_exception=False
            )
        if plan.request is None:  # something was removed since the inspection
            raise gr.Error(translate_message(plan.notes[0]), print_exception=False)
        try:
            return {
                tab.note: render.notes(plan.notes),
                **restoration_update(plan, forms, checkpoint_dropdown, tabs, studio.pictures),
            }
        except StudioError as error:  # the file named as its mask may not be a mask
            raise gr.Error(translate_message(str(error)), print_exception=False) from error

    result_outputs = [
        component for component in vars(tab).values() if component not in (tab.picture, tab.sent_at, tab.latest)
    ]
    event_options: dict[str, Any] = {
        "inputs": [tab.picture, tab.sent_at, tab.latest],
        "js": SEND_TIME_JS,
        "trigger_mode": "multiple",
    }
    listen(
        [tab.picture.upload, tab.picture.delete],
        inspect,
        outputs=[tab.picture, *result_outputs],
        concurrency_limit=2,
        **event_options,
    )
    # The gallery's own clear button triggers only a change event.
    listen(tab.picture.change, clear, outputs=result_outputs, **event_options)
    # A gallery with a selected picture accepts no upload.
    listen(tab.picture.select, lambda: gr.Gallery(selected_index=None), None, tab.picture, queue=False)
    listen(tab.restore.click, None, js=SCROLL_TO_TABS_JS)
    listen(
        tab.restore.click, restore, tab.inspection, [tab.note, *restoration_outputs(forms, checkpoint_dropdown, tabs)]
    )


# --- restoring --------------------------------------------------------------------------------------------------


def plan_restoration(record: Record, studio: Studio, reference_finder: ReferenceFinder | None) -> Restoration:
    """Plan how to reproduce the picture of `record` here, bit for bit.

    `record` is only what a file claims. reference_finder: None if references are not handed out here.
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
    # The placeholders only have the right number, which the checkpoint may limit; the sizes come from the settings.
    assert record.request.width and record.request.height
    reference_size = record.request.outpaint.shrunk((record.request.width, record.request.height))
    placeholders = tuple(Path(sha256) for sha256 in record.references)
    try:
        request = replace(request_to_reproduce(record), references=placeholders).resolve(
            checkpoint, [reference_size] * len(placeholders)
        )
    except RequestError as error:
        return Restoration(form=form, notes=(f"These settings cannot be restored here: {error}",))
    found, missing = _available_references(record, reference_finder)
    mask = reference_finder.find(record.mask) if reference_finder and record.mask else None
    if record.mask and mask is None:
        missing.append("Its mask is not kept here: paint or load it again.")
    loras, dropped = _available_loras(record, studio, checkpoint)
    batch_note = (
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
            *_checkpoint_notes(record, studio, checkpoint),
            *([batch_note] if record.together > 1 else []),
            *_machine_notes(record, studio, checkpoint),
        ),
    )


def _plan(inspection: Inspection, studio: Studio, reference_store: ReferenceStore | None) -> Restoration | None:
    record = inspection.settings.record
    return plan_restoration(record, studio, reference_store) if record else None


def _available_references(record: Record, store: ReferenceFinder | None) -> tuple[tuple[Path, ...], list[str]]:
    if store is None:
        count = len(record.references)
        count_text = "1 reference" if count == 1 else f"{count} references"
        return (), [
            f"It was made from {count_text}. Pictures are not handed out here: add them again."
        ] if count else []
    found = [store.find(sha256) for sha256 in record.references]
    missing = [
        f"Image {number} is not kept here: add it again{', in its place' if len(found) > 1 else ''}. Its SHA-256 is "
        f"{record.references[number - 1]}."
        for number, path in enumerate(found, 1)
        if path is None
    ]
    return tuple(path for path in found if path is not None), missing


def _available_loras(
    record: Record, studio: Studio, checkpoint: Checkpoint
) -> tuple[tuple[LoraChoice, ...], list[str]]:
    """The LoRAs that are available and compatible, and a sentence about each that is missing or changed."""
    if not record.request.loras:
        return (), []
    widths = {entry.name: entry.width for entry in studio.loras.scan()[0]}
    available: list[LoraChoice] = []
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
        available.append(choice)
        if not same:
            notes.append(f"The LoRA {choice.name} is another file here than it was: the picture will differ.")
    return tuple(available), notes


def _checkpoint_notes(record: Record, studio: Studio, checkpoint: Checkpoint) -> list[str]:
    if not studio.is_on_disk(checkpoint):
        return [f"{checkpoint.label} is not on this machine yet: the run downloads it first."]
    if not record.checkpoint:
        return []
    try:
        current_hash = studio.checkpoint_hash(checkpoint)
    except StudioError as error:
        return [str(error)]
    if current_hash is None:
        return [f"Whether the file of {checkpoint.label} is the same here is not known: it has not been read yet."]
    if current_hash != record.checkpoint:
        return [f"The file of {checkpoint.label} is another one here than it was: the picture will differ."]
    return []


def _machine_notes(record: Record, studio: Studio, checkpoint: Checkpoint) -> list[str]:
    current = {**studio.versions, **studio.compute_settings(checkpoint)}
    recorded = {**record.versions, **record.computed}
    if record.computed:  # older records lack it, and blocks were eager then
        recorded.setdefault("blocks", EAGER_BLOCKS)
    differences = [
        f"{name} {value} (here {current[name]})"
        for name, value in recorded.items()
        if current.get(name, value) != value
    ]
    if not differences:
        return []
    return [f"It was made with {', '.join(differences)}: the picture may differ in tiny ways."]


def restoration_update(
    plan: Restoration, forms: Sequence[Form], checkpoint_dropdown: gr.Dropdown, tabs: gr.Tabs, pictures: PictureCache
) -> Update:
    """The page with `plan` in its form. Sets every field, so that no earlier values remain."""
    request, checkpoint = plan.request, plan.checkpoint
    assert request is not None and checkpoint is not None and request.width and request.height
    form = next(form for form in forms if form.name == plan.form)
    components = form.fields
    size = request.width, request.height
    # Only an edit can have a size that the engine does not support: it comes from the edited picture.
    as_reference = bool(plan.form != "generate" and (request.mask or request.outpaint or request.padded_size != size))
    width, height = fields.sides(None if as_reference else size)
    update: Update = {
        tabs: gr.Tabs(selected=form.name),
        checkpoint_dropdown: checkpoint.name,
        form.form_checkpoint: checkpoint.name,  # otherwise the change event would overwrite these values
        components["prompt"]: request.prompt,
        components["negative_prompt"]: fields.negative_prompt(checkpoint, request.negative_prompt or ""),
        form.aspect: fields.AS_REFERENCE if as_reference else fields.FREE,
        components["width"]: width,
        components["height"]: height,
        form.size_note: "",
        components["steps"]: fields.steps(checkpoint, request.steps),
        components["guidance"]: fields.guidance(checkpoint, request.guidance),
        components["seed"]: request.seed,
        form.seed_lock: True,
        components["count"]: request.count,
        components["loras"]: [{"name": lora.name, "weight": lora.weight} for lora in request.loras],
        form.loras.accordion: gr.Accordion(fields.lora_title(len(request.loras))),
        form.upsampling.provider: "none",
        # Only what affects the pixels. The other provenance settings stay as the user chose them: a stranger's file
        # must not make them publish their prompts.
        **{components[name]: getattr(request, name) for name in ("format", "watermark")},
    }
    if form.reference_panel is None:
        return update
    update |= set_references(form, plan.references, checkpoint, pictures)
    subject = examine(plan.references, checkpoint, checkpoint.max_references, pictures).first_subject
    mask = None
    if request.mask and subject:
        mask = load_mask(request.mask, (subject.width, subject.height), pictures).edit_mask
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


# --- layout -----------------------------------------------------------------------------------------------------


def _picture_input() -> gr.Gallery:
    """The picture input. A gallery even for one picture, because it passes on the uploaded file unopened."""
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


def _empty_update(tab: InspectTab) -> Update:
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


def _inspection_update(tab: InspectTab, inspection: Inspection, plan: Restoration | None) -> Update:
    raw = inspection.as_dict()
    report = raw["credentials"].pop("report")
    findings = "".join(f"<li>{escape(translate_message(finding))}</li>" for finding in inspection.findings)
    return {
        tab.findings: f"<ul>{findings}</ul>",
        tab.restore: gr.Button(visible=plan is not None and plan.request is not None),
        tab.note: render.notes(plan.notes) if plan else "",
        tab.report: inspection_html(inspection),
        tab.raw_accordion: gr.Accordion(visible=True, open=False),
        tab.json: _truncate(json.dumps(raw, indent=2, ensure_ascii=False)),
        tab.credentials: gr.Code(_truncate(report), visible=bool(report)),
        tab.inspection: inspection,
    }


def inspection_html(inspection: Inspection) -> str:
    """The details of an inspection as HTML."""
    record = inspection.settings.record
    sections = [
        _section("Settings", setting_rows(record) if record else []),
        _watermark(inspection.watermark),
        _section("Content credentials", credential_rows(inspection.credentials)),
        _section("File", _file(inspection).items()),
    ]
    return "".join(sections)


def _file(inspection: Inspection) -> Mapping[str, str]:
    picture = (
        {
            "Picture": translate(
                "{format}, {width} x {height} pixels",
                format=inspection.format,
                width=inspection.width,
                height=inspection.height,
            )
        }
        if inspection.is_picture
        else {}
    )
    sha256 = {"SHA-256": inspection.sha256} if inspection.sha256 else {}
    return {
        "Name": inspection.name,
        **picture,
        "Size": translate("{count} bytes", count=f"{inspection.bytes:,}"),
        **sha256,
    }


def _watermark(detection: WatermarkDetection | None) -> str:
    if detection is None:
        return ""
    state = translate("found") if detection.found else translate("not found")
    rows = {
        "Result": state,
        "Message": detection.message.label,
        "Bits that agree": translate(
            "{right} of {all} ({share})",
            right=detection.matching_bits,
            all=len(detection.message.bits),
            share=f"{detection.match_ratio:.0%}",
        ),
        "By chance": translate("one picture in {odds}", odds=detection.odds),
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
