"""The page's layout: a form for each tab, and one stage beside them that shows what any of them makes.

A function lays out one part and returns its components; nothing here listens to an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.ui import fields
from flux2_studio.ui.examples import Examples

EMPTY = (
    '<div class="empty"><p class="lead">Your picture will appear here.</p>'
    "<p>Write a prompt and press the button under it, or take one of the examples. "
    "You see the picture form step by step.</p></div>"
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One tab. The keys of `fields` are fields of `Request`; the other components help to fill them in."""

    name: str  # also the tab's id, and the form's key in examples.json
    fields: dict[str, Any]
    lock: gr.Checkbox
    roll: gr.Button
    aspect: gr.Radio
    size_note: gr.HTML
    fit: gr.HTML  # how the request will fit into memory
    laid_out_for: gr.Textbox  # hidden: the checkpoint whose ranges and defaults the fields show
    examples: gr.Dataset
    loras: LoraPanel
    run: gr.Button
    panel: ReferencePanel | None = None


@dataclass(frozen=True, kw_only=True)
class ReferencePanel:
    """What stands around a form's references: what was refused and why, and what to know of those that stay.

    `filled` is whether we put any there.
    """

    refused: gr.HTML
    note: gr.HTML
    filled: gr.State
    tools: ReferenceTools | None = None


@dataclass(frozen=True, kw_only=True)
class LoraPanel:
    """What stands around a form's LoRAs: those that can be added, and what to know of them."""

    folded: gr.Accordion
    offer: gr.Dropdown
    dropped: gr.HTML
    note: gr.HTML
    refresh: gr.Button


@dataclass(frozen=True, kw_only=True)
class ReferenceTools:
    """What puts several references in order. `chosen` is the index of the selected one, None for none."""

    chosen: gr.State
    row: gr.Row
    add: gr.UploadButton  # the gallery takes no upload while a picture in it is selected
    earlier: gr.Button
    later: gr.Button
    remove: gr.Button


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a run is followed. `job` is its id, `results` the saved paths, `picked` the index of the shown one."""

    job: gr.State
    results: gr.State
    picked: gr.State
    message: gr.HTML
    preview: gr.HTML
    gallery: gr.Gallery
    progress: gr.HTML
    stop: gr.Button
    notices: gr.HTML
    actions: gr.Row
    download: gr.DownloadButton
    edit: gr.Button
    details: gr.Accordion
    table: gr.HTML
    json: gr.Code


def generate(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples) -> Form:
    with gr.Tab("Generate", id="generate", elem_id="generate", elem_classes="sheet"):
        return _form(
            "generate",
            chosen,
            checkpoint,
            examples,
            prompt=fields.prompt("Prompt", "What should the picture show?"),
            run="Generate",
        )


def edit(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples) -> Form:
    with gr.Tab("Edit", id="edit", elem_id="edit", elem_classes="sheet"):
        references = fields.references("Picture to edit: drop, paste or choose one", columns=1)
        return _form(
            "edit",
            chosen,
            checkpoint,
            examples,
            references=references,
            panel=_panel(),
            prompt=fields.prompt("Instruction", "What should change? Say also what must stay."),
            run="Edit",
        )


def multi(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples) -> Form:
    with gr.Tab("Multi-reference", id="multi", elem_id="multi", elem_classes="sheet"):
        references = fields.references(f"Up to {checkpoint.max_references} pictures: drop, paste or choose", columns=5)
        with gr.Row(visible=False, elem_classes="tools") as row:
            tools = ReferenceTools(
                chosen=gr.State(None),
                row=row,
                add=gr.UploadButton(
                    "Add pictures",
                    size="sm",
                    min_width=110,
                    file_count="multiple",
                    file_types=["image"],
                    elem_classes="add",
                ),
                earlier=gr.Button("◀ Earlier", size="sm", min_width=80),
                later=gr.Button("Later ▶", size="sm", min_width=80),
                remove=gr.Button("Remove", size="sm", min_width=80),
            )
            gr.HTML("<p>Select a picture to move or remove it.</p>", elem_classes="note")
        return _form(
            "multi",
            chosen,
            checkpoint,
            examples,
            references=references,
            panel=_panel(tools),
            prompt=fields.prompt("Instruction", 'Call the pictures "image 1", "image 2" and so on.'),
            run="Combine",
        )


def _panel(tools: ReferenceTools | None = None) -> ReferencePanel:
    return ReferencePanel(
        refused=gr.HTML(elem_classes="refused"),
        note=gr.HTML(elem_classes="note"),
        filled=gr.State(False),
        tools=tools,
    )


def _form(
    name: str,
    chosen: gr.Dropdown,
    checkpoint: Checkpoint,
    examples: Examples,
    *,
    prompt: gr.Textbox,
    run: str,
    references: gr.Gallery | None = None,
    panel: ReferencePanel | None = None,
) -> Form:
    samples = fields.examples(examples.of(name, checkpoint))
    run_button = gr.Button(run, variant="primary", size="lg", elem_classes="run")
    fit = gr.HTML(elem_classes=["note", "fit"])
    aspect = fields.aspect(with_references=references is not None)
    with gr.Row(elem_classes="pair"):
        width, height = fields.sides(None if references else fields.size_of("1:1", checkpoint))
    size_note = gr.HTML(elem_classes="note")
    with gr.Row(elem_classes="seeds"):
        seed = fields.seed()
        roll = gr.Button("New seed", min_width=90, elem_classes="roll")
        lock = fields.lock()
    count = fields.count()
    with gr.Row(elem_classes="pair"):
        steps = fields.steps(checkpoint)
        guidance = fields.guidance(checkpoint)
    negative_prompt = fields.negative_prompt(checkpoint)
    loras, lora_panel = _loras(checkpoint)
    return Form(
        name=name,
        fields={
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "checkpoint": chosen,
            **({"references": references} if references else {}),
            "width": width,
            "height": height,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "count": count,
            "loras": loras,
        },
        lock=lock,
        roll=roll,
        aspect=aspect,
        size_note=size_note,
        fit=fit,
        laid_out_for=gr.Textbox(checkpoint.name, visible=False),
        examples=samples,
        loras=lora_panel,
        run=run_button,
        panel=panel,
    )


def _loras(checkpoint: Checkpoint) -> tuple[gr.HTML, LoraPanel]:
    with gr.Accordion(fields.lora_title(0), open=False, elem_classes="lora-panel") as folded:
        chosen = fields.loras()
        dropped = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="lora-add"):
            offer = fields.lora_offer((), checkpoint)  # filled when the page is opened: a large folder takes its time
            refresh = gr.Button("Refresh", size="sm", min_width=80, elem_classes="refresh")
        note = gr.HTML(elem_classes="note")
    return chosen, LoraPanel(folded=folded, offer=offer, dropped=dropped, note=note, refresh=refresh)


def stage() -> Stage:
    job, results, picked = gr.State(""), gr.State([]), gr.State(0)
    with gr.Column(elem_id="mat"):
        preview = gr.HTML(EMPTY, elem_id="preview")
        gallery = gr.Gallery(
            label="Result",
            show_label=False,
            visible=False,
            interactive=False,
            columns=2,
            height="100%",
            object_fit="contain",
            buttons=["fullscreen"],
            elem_id="gallery",
        )
    message = gr.HTML(elem_id="message")
    with gr.Row(elem_id="running"):
        progress = gr.HTML(elem_id="progress")
        stop = gr.Button("Stop", variant="stop", visible=False, min_width=96, scale=0, elem_id="stop")
    notices = gr.HTML(elem_id="notices")
    with gr.Row(visible=False, elem_id="actions") as actions:
        download = gr.DownloadButton("Download", elem_id="download", min_width=140)
        edit = gr.Button("Use in Edit", elem_id="use-in-edit", min_width=140)
    with gr.Accordion("Settings used", visible=False, open=True, elem_id="details") as details:
        table = gr.HTML(elem_id="settings")
        json = gr.Code(language="json", label="As JSON", interactive=False, elem_id="json", lines=3, max_lines=12)
    return Stage(
        job=job,
        results=results,
        picked=picked,
        message=message,
        preview=preview,
        gallery=gallery,
        progress=progress,
        stop=stop,
        notices=notices,
        actions=actions,
        download=download,
        edit=edit,
        details=details,
        table=table,
        json=json,
    )
