"""The page's layout: a form for each tab, and one stage beside them that shows what any of them makes.

A function lays out one part and returns its components; nothing here listens to an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.prompting.instructions import Mode, instructions
from flux2_studio.prompting.openai_server import REMOTE_MODELS
from flux2_studio.settings import Settings
from flux2_studio.ui.forms import fields, mask_panel, preset_panel
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.forms.preset_panel import PresetPanel
from flux2_studio.ui.gradio_compat.language import t
from flux2_studio.ui.history import picker
from flux2_studio.ui.stage import compare

UPSAMPLING = "Enrich the prompt"

EMPTY = (
    '<div class="empty"><p class="lead" data-i18n>Your picture will appear here.</p>'
    "<p data-i18n>Write a prompt and press the button under it, or take one of the examples. "
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
    presets: PresetPanel
    fit: gr.HTML  # how the request will fit into memory
    laid_out_for: gr.Textbox  # hidden: the checkpoint whose ranges and defaults the fields show
    examples: gr.Dataset
    loras: LoraPanel
    upsampling: UpsamplingPanel
    identity: gr.HTML  # who signs, and what that proves
    run: gr.Button
    panel: ReferencePanel | None = None
    edits: gr.Accordion | None = None  # mask and outpainting are folded into it
    live: LivePanel | None = None


@dataclass(frozen=True, kw_only=True)
class LivePanel:
    """Whether the picture follows what is typed: `pulse` counts the changes to follow, in the browser, and `wake` how
    often nobody was there to show what became of one."""

    on: gr.Checkbox
    pulse: gr.Number
    wake: gr.Number


@dataclass(frozen=True, kw_only=True)
class UpsamplingPanel:
    """Who enriches the form's prompt, and what came of it. `inputs` are what `Upsampling` is made of, and the key;
    `job` is the id of the enrichment under way, `before` the prompts that were replaced, the last one last."""

    folded: gr.Accordion
    by: gr.Radio
    local: gr.Dropdown
    remote: gr.Dropdown
    key: gr.Textbox
    row: gr.Row
    inputs: dict[str, Any]
    about: gr.HTML
    enrich: gr.Button
    stop: gr.Button
    status: gr.HTML
    written: gr.Textbox
    use: gr.Button
    undo: gr.Button
    job: gr.State
    before: gr.State


@dataclass(frozen=True, kw_only=True)
class ReferencePanel:
    """What stands around a form's references: what was refused and why, and what to know of those that stay.

    `pick` sends what was chosen of History. In the place of `told` the page's script sends what it knows itself: which
    picture is selected, from which index to which one was dragged, or how often all were cleared; `cleared` is how
    often they were, as far as that was heard.
    """

    refused: gr.HTML
    note: gr.HTML
    pick: gr.Button
    told: gr.Textbox
    cleared: gr.State
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
    """What puts several references in order, and names them. `named` is the file that `name` is the name of, as the
    browser saw it when it was typed. Where one was dragged, the page's script presses `drop`."""

    row: gr.Row
    name: gr.Textbox
    named: gr.Textbox
    add: gr.UploadButton  # the gallery takes no upload while a picture in it is selected
    earlier: gr.Button
    later: gr.Button
    remove: gr.Button
    drop: gr.Button


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where a run is followed. `job` is its id, and `shown` that of the run which the browser shows: the one that Stop
    means. `results` are the saved paths, `picked` the index of the shown one. One `without_` each form runs it without
    enriching its prompt, where that failed. `keep` saves the preview of the run `unfinished`, which ended with that."""

    job: gr.State
    shown: gr.Textbox
    unfinished: gr.State
    results: gr.State
    picked: gr.Number
    message: gr.HTML
    without_generate: gr.Button
    without_edit: gr.Button
    without_multi: gr.Button
    preview: gr.HTML
    gallery: gr.Gallery
    progress: gr.HTML
    stop: gr.Button
    keep: gr.Button
    notices: gr.HTML
    actions: gr.Row
    download: gr.DownloadButton
    edit: gr.Button
    comparison: compare.Comparison
    details: gr.Accordion
    table: gr.HTML
    json: gr.Code

    @property
    def parts(self) -> list[Any]:
        """All components of it."""
        own = [part for part in vars(self).values() if part is not self.comparison]
        return [*own, *vars(self.comparison).values()]


def generate(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(t("Generate"), id="generate", elem_id="generate", elem_classes="sheet"):
        presets = preset_panel.layout()
        return _form(
            "generate",
            chosen,
            checkpoint,
            examples,
            settings,
            presets=presets,
            prompt=fields.prompt(t("Prompt"), t("What should the picture show?")),
            run=t("Generate"),
            live=True,
        )


def edit(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(t("Edit"), id="edit", elem_id="edit", elem_classes="sheet"):
        presets = preset_panel.layout()
        references = fields.references(t("Picture to edit: drop, paste or choose one"), columns=1)
        pick = picker.button("edit")
        return _form(
            "edit",
            chosen,
            checkpoint,
            examples,
            settings,
            presets=presets,
            references=references,
            panel=_panel(pick),
            prompt=fields.prompt(t("Instruction"), t("What should change? Say also what must stay.")),
            run=t("Edit"),
            live=True,
        )


def multi(chosen: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(t("Multi-reference"), id="multi", elem_id="multi", elem_classes="sheet"):
        presets = preset_panel.layout()
        references = fields.references(fields.up_to(checkpoint.max_references), columns=5)
        pick = picker.button("multi")
        drop = gr.Button("Move", visible="hidden", elem_id="multi-move")
        with gr.Row(visible=False, elem_classes="tools") as row:
            tools = ReferenceTools(
                row=row,
                name=fields.name(),
                named=gr.Textbox("", visible=False),
                add=gr.UploadButton(
                    t("Add pictures"),
                    size="sm",
                    min_width=110,
                    file_count="multiple",
                    file_types=["image"],
                    elem_classes="add",
                ),
                earlier=gr.Button(t("◀ Earlier"), size="sm", min_width=80),
                later=gr.Button(t("Later ▶"), size="sm", min_width=80),
                remove=gr.Button(t("Remove"), size="sm", min_width=80),
                drop=drop,
            )
            gr.HTML(
                "<p data-i18n>Drag a picture to another place; or select it to name, move or remove it.</p>",
                elem_classes="note",
            )
        return _form(
            "multi",
            chosen,
            checkpoint,
            examples,
            settings,
            presets=presets,
            references=references,
            panel=_panel(pick, tools),
            prompt=fields.prompt(
                t("Instruction"), t('Call the pictures "image 1", "image 2" and so on, or @fox once you named one fox.')
            ),
            run=t("Combine"),
        )


def _panel(pick: gr.Button, tools: ReferenceTools | None = None) -> ReferencePanel:
    return ReferencePanel(
        pick=pick,
        refused=gr.HTML(elem_classes="refused"),
        note=gr.HTML(elem_classes="note"),
        told=gr.Textbox(visible=False),
        cleared=gr.State(0),
        tools=tools,
    )


def _form(
    name: str,
    chosen: gr.Dropdown,
    checkpoint: Checkpoint,
    examples: Examples,
    settings: Settings,
    *,
    presets: PresetPanel,
    prompt: gr.Textbox,
    run: str,
    references: gr.Gallery | None = None,
    panel: ReferencePanel | None = None,
    live: bool = False,
) -> Form:
    samples = fields.examples(examples.of(name, checkpoint))
    upsampling = _upsampling(settings, with_references=references is not None)
    part, edits = mask_panel.layout() if references is not None else ({}, None)
    run_button = gr.Button(run, variant="primary", size="lg", elem_classes="run")
    following = (
        LivePanel(on=fields.live(checkpoint, on=False), pulse=fields.pulse(), wake=fields.pulse()) if live else None
    )
    fit = gr.HTML(elem_classes=["note", "fit"])
    aspect = fields.aspect(with_references=references is not None)
    with gr.Row(elem_classes="pair"):
        width, height = fields.sides(None if references else fields.size_of("1:1", checkpoint))
    size_note = gr.HTML(elem_classes="note")
    with gr.Row(elem_classes="seeds"):
        seed = fields.seed()
        roll = gr.Button(t("New seed"), min_width=90, elem_classes="roll")
        lock = fields.lock()
    count = fields.count()
    with gr.Row(elem_classes="pair"):
        steps = fields.steps(checkpoint)
        guidance = fields.guidance(checkpoint)
    negative_prompt = fields.negative_prompt(checkpoint)
    loras, lora_panel = _loras(checkpoint)
    marks, identity = _marks()
    return Form(
        name=name,
        fields={
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "checkpoint": chosen,
            **({"references": references} if references else {}),
            **part,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "count": count,
            "loras": loras,
            **marks,
        },
        lock=lock,
        roll=roll,
        aspect=aspect,
        size_note=size_note,
        presets=presets,
        fit=fit,
        laid_out_for=gr.Textbox(checkpoint.name, visible=False),
        examples=samples,
        loras=lora_panel,
        upsampling=upsampling,
        identity=identity,
        run=run_button,
        panel=panel,
        edits=edits,
        live=following,
    )


def _loras(checkpoint: Checkpoint) -> tuple[gr.HTML, LoraPanel]:
    with gr.Accordion(fields.lora_title(0), open=False, elem_classes="lora-panel") as folded:
        chosen = fields.loras()
        dropped = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="lora-add"):
            offer = fields.lora_offer((), checkpoint)  # filled when the page is opened: a large folder takes its time
            refresh = gr.Button(t("Refresh"), size="sm", min_width=80, elem_classes="refresh")
        note = gr.HTML(elem_classes="note")
    return chosen, LoraPanel(folded=folded, offer=offer, dropped=dropped, note=note, refresh=refresh)


def _upsampling(settings: Settings, *, with_references: bool) -> UpsamplingPanel:
    by = "none" if with_references else settings.upsample
    with gr.Accordion(t(UPSAMPLING), open=by != "none", elem_classes=["upsampling", "extra"]) as folded:
        choice = fields.upsample_by(by)
        local = fields.local_model((), visible=False)  # filled once the checkpoint is known
        models = [(model.label, model.name) for model in REMOTE_MODELS]
        remote = fields.remote_model(
            models, settings.openrouter_model or REMOTE_MODELS[0].name, visible=by == "openrouter"
        )
        key = fields.api_key(visible=by == "openrouter")
        about = gr.HTML(elem_classes="note")
        # "hidden" keeps it on the page: an empty Number that is removed and put back becomes 0, which top p cannot be.
        with gr.Row(visible=by != "none" or "hidden", elem_classes="pair") as row:
            sampling = {
                "temperature": fields.sampling("temperature", t("Temperature")),
                "top_p": fields.sampling("top_p", t("Top p")),
                "max_tokens": fields.sampling("max_tokens", t("Tokens")),
            }
        with gr.Row(elem_classes="acts"):
            enrich = gr.Button(t("Enrich now"), size="sm", visible=by != "none", elem_classes="enrich")
            stop = gr.Button(t("Stop"), size="sm", variant="stop", visible=False, elem_classes="enrich-stop")
        status = gr.HTML(elem_classes="enrich-status")
        written = gr.Textbox(
            label=t("Enriched prompt"),
            info=t("As it is written."),
            lines=4,
            max_lines=16,
            visible=False,
            elem_classes="written",
        )
        with gr.Row(elem_classes="acts"):
            use = gr.Button(t("Use as prompt"), size="sm", visible=False, elem_classes="use")
            undo = gr.Button(t("Undo"), size="sm", visible=False, elem_classes="undo")
        mode: Mode = "edit" if with_references else "generate"
        with gr.Accordion(t("What the language model is told"), open=False, elem_classes="told"):
            gr.HTML(f"<pre>{escape(instructions(mode, 0, seen=True))}</pre>")
    inputs = {"upsample_by": choice, "upsample_local": local, "upsample_remote": remote, "api_key": key, **sampling}
    return UpsamplingPanel(
        folded=folded,
        by=choice,
        local=local,
        remote=remote,
        key=key,
        row=row,
        inputs=inputs,
        about=about,
        enrich=enrich,
        stop=stop,
        status=status,
        written=written,
        use=use,
        undo=undo,
        job=gr.State(""),
        before=gr.State([]),
    )


def _marks() -> tuple[dict[str, Any], gr.HTML]:
    """The fields of a request that say how its pictures are saved, and what they say of themselves."""
    with gr.Accordion(t("Saving and provenance"), open=False, elem_classes=["marks", "extra"]):
        image_format = fields.image_format()
        found = {
            "format": image_format,
            "watermark": fields.mark(
                t("Invisible watermark"),
                t("Says in the colours themselves that a model made the picture."),
                "watermark",
            ),
            "metadata": fields.mark(
                t("Settings in the file"),
                t("Prompt, seed and so on, from which Inspect makes the picture again; and that it is AI-made."),
                "metadata",
            ),
            "sign": fields.mark(t("Content credentials"), t("Signed (C2PA): later changes show."), "sign"),
            "sign_prompt": fields.mark(
                t("Prompt in the credentials"), t("Publishes the prompt, signed."), "sign-prompt", on=False
            ),
        }
        identity = gr.HTML(elem_classes=["note", "identity"])
    return found, identity


def stage(queue: gr.HTML | None = None) -> Stage:
    """queue: shown below the result, where there is one."""
    job, results = gr.State(""), gr.State([])
    shown, picked = gr.Textbox("", visible=False), gr.Number(0, precision=0, visible=False)
    message = gr.HTML(elem_id="message")
    without = {
        form: gr.Button(t(label), visible=False, elem_classes="without")
        for form, label in (
            ("generate", "Generate without enriching"),
            ("edit", "Edit without enriching"),
            ("multi", "Combine without enriching"),
        )
    }
    with gr.Column(elem_id="mat"):
        preview = gr.HTML(EMPTY, elem_id="preview")
        gallery = gr.Gallery(
            label=t("Result"),
            show_label=False,
            visible=False,
            interactive=False,
            columns=2,
            height="100%",
            object_fit="contain",
            buttons=["fullscreen"],
            elem_id="gallery",
        )
    with gr.Row(elem_id="running"):
        progress = gr.HTML(elem_id="progress")
        stop = gr.Button(t("Stop"), variant="stop", visible=False, min_width=96, scale=0, elem_id="stop")
        keep = gr.Button(t("Keep this preview"), visible=False, min_width=220, scale=0, elem_id="keep-preview")
    notices = gr.HTML(elem_id="notices")
    with gr.Row(visible=False, elem_id="actions") as actions:
        download = gr.DownloadButton(t("Download"), elem_id="download", min_width=140)
        edit = gr.Button(t("Use in Edit"), elem_id="use-in-edit", min_width=140)
    comparison = compare.layout()
    if queue is not None:
        queue.render()
    with gr.Accordion(t("Settings used"), visible=False, open=True, elem_id="details") as details:
        table = gr.HTML(elem_id="settings")
        json = gr.Code(language="json", label=t("As JSON"), interactive=False, elem_id="json", lines=3, max_lines=12)
    return Stage(
        job=job,
        shown=shown,
        unfinished=gr.State(""),
        results=results,
        picked=picked,
        message=message,
        without_generate=without["generate"],
        without_edit=without["edit"],
        without_multi=without["multi"],
        preview=preview,
        gallery=gallery,
        progress=progress,
        stop=stop,
        keep=keep,
        notices=notices,
        actions=actions,
        download=download,
        edit=edit,
        comparison=comparison,
        details=details,
        table=table,
        json=json,
    )
