"""The page's layout: a form for each tab, and one stage beside them that shows what any of them makes.

A function lays out one part and returns its components; nothing here listens to an event.
"""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.prompting.instructions import PromptMode, build_instructions
from flux2_studio.prompting.openai_server import REMOTE_MODELS
from flux2_studio.settings import Settings
from flux2_studio.ui.forms import fields, mask_panel, preset_panel
from flux2_studio.ui.forms.examples import Examples
from flux2_studio.ui.forms.preset_panel import PresetPanel
from flux2_studio.ui.gradio_compat.language import i18n
from flux2_studio.ui.history import picker
from flux2_studio.ui.stage import compare

UPSAMPLING_TITLE = "Enrich the prompt"

EMPTY_STAGE_HTML = (
    '<div class="empty"><p class="lead" data-i18n>Your picture will appear here.</p>'
    "<p data-i18n>Write a prompt and press the button under it, or take one of the examples. "
    "You see the picture form step by step.</p></div>"
)


@dataclass(frozen=True, kw_only=True)
class Form:
    """One tab. The keys of `fields` are fields of `Request`; the other components help to fill them in."""

    name: str  # also the tab's id, and the form's key in examples.json
    fields: dict[str, Any]
    seed_lock: gr.Checkbox
    new_seed: gr.Button
    aspect: gr.Radio
    size_note: gr.HTML
    presets: PresetPanel
    estimate: gr.HTML  # how the request will fit into memory
    form_checkpoint: gr.Textbox  # hidden: the checkpoint whose ranges and defaults the fields show
    examples: gr.Dataset
    loras: LoraPanel
    upsampling: UpsamplingPanel
    identity: gr.HTML  # who signs, and what that proves
    run: gr.Button
    reference_panel: ReferencePanel | None = None
    edit_accordion: gr.Accordion | None = None  # mask and outpainting are folded into it
    live: LivePanel | None = None


@dataclass(frozen=True, kw_only=True)
class LivePanel:
    """Whether the picture follows what is typed: `hidden_counter` counts the changes to follow, in the browser, and
    `wake_counter` how often nobody was there to show what became of one."""

    on: gr.Checkbox
    change_counter: gr.Number
    wake_counter: gr.Number


@dataclass(frozen=True, kw_only=True)
class UpsamplingPanel:
    """Who enriches the form's prompt, and what came of it. `inputs` are what `Upsampling` is made of, and the key;
    `job_id` is the id of the enrichment under way, `undo_stack` the prompts that were replaced, the last one last."""

    accordion: gr.Accordion
    provider: gr.Radio
    local: gr.Dropdown
    remote: gr.Dropdown
    key: gr.Textbox
    sampling_row: gr.Row
    inputs: dict[str, Any]
    about: gr.HTML
    enhance: gr.Button
    stop: gr.Button
    status: gr.HTML
    enhanced_prompt: gr.Textbox
    use: gr.Button
    undo: gr.Button
    job_id: gr.State
    undo_stack: gr.State


@dataclass(frozen=True, kw_only=True)
class ReferencePanel:
    """What stands around a form's references: what was refused and why, and what to know of those that stay.

    `history_button` sends what was chosen of History. In the place of `client_state` the page's script sends what it
    knows itself: which picture is selected, from which index to which one was dragged, or how often all were cleared;
    `clear_count` is how often they were, as far as that was heard.
    """

    problems: gr.HTML
    note: gr.HTML
    history_button: gr.Button
    client_state: gr.Textbox
    clear_count: gr.State
    tools: ReferenceTools | None = None


@dataclass(frozen=True, kw_only=True)
class LoraPanel:
    """What stands around a form's LoRAs: those that can be added, and what to know of them."""

    accordion: gr.Accordion
    add_dropdown: gr.Dropdown
    dropped: gr.HTML
    note: gr.HTML
    refresh: gr.Button


@dataclass(frozen=True, kw_only=True)
class ReferenceTools:
    """What puts several references in order, and names them. `named` is the file that `reference_name_field` is the
    name of, as the browser saw it when it was typed. Where one was dragged, the page's script presses `drag_button`."""

    row: gr.Row
    name: gr.Textbox
    named: gr.Textbox
    add: gr.UploadButton  # the gallery takes no upload while a picture in it is selected
    earlier: gr.Button
    later: gr.Button
    remove: gr.Button
    drag_button: gr.Button


@dataclass(frozen=True, kw_only=True)
class StagePanel:
    """Where a run is followed. `job_id` is its id, and `shown_job_id` that of the run which the browser shows: the one
    that Stop means. `result_paths` are the saved paths, `selected_index` the index of the shown one. One `without_`
    each form runs it without enriching its prompt, where that failed. `keep_preview` saves the preview of the run
    `unfinished_job_id`, which ended with that."""

    job_id: gr.State
    shown_job_id: gr.Textbox
    unfinished_job_id: gr.State
    result_paths: gr.State
    selected_index: gr.Number
    message: gr.HTML
    generate_unenhanced: gr.Button
    edit_unenhanced: gr.Button
    multi_unenhanced: gr.Button
    preview: gr.HTML
    gallery: gr.Gallery
    progress: gr.HTML
    stop: gr.Button
    keep_preview: gr.Button
    notices: gr.HTML
    actions: gr.Row
    download: gr.DownloadButton
    use_in_edit: gr.Button
    comparison: compare.Comparison
    details: gr.Accordion
    table: gr.HTML
    json: gr.Code

    @property
    def components(self) -> list[Any]:
        """All components of it."""
        own = [part for part in vars(self).values() if part is not self.comparison]
        return [*own, *vars(self.comparison).values()]


def generate(checkpoint_dropdown: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(i18n("Generate"), id="generate", elem_id="generate", elem_classes="sheet"):
        presets = preset_panel.build_preset_panel()
        return _form(
            "generate",
            checkpoint_dropdown,
            checkpoint,
            examples,
            settings,
            presets=presets,
            prompt=fields.prompt(i18n("Prompt"), i18n("What should the picture show?")),
            run=i18n("Generate"),
            live=True,
        )


def edit(checkpoint_dropdown: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(i18n("Edit"), id="edit", elem_id="edit", elem_classes="sheet"):
        presets = preset_panel.build_preset_panel()
        references = fields.references(i18n("Picture to edit: drop, paste or choose one"), columns=1)
        pick = picker.build_picker_button("edit")
        return _form(
            "edit",
            checkpoint_dropdown,
            checkpoint,
            examples,
            settings,
            presets=presets,
            references=references,
            reference_panel=_panel(pick),
            prompt=fields.prompt(i18n("Instruction"), i18n("What should change? Say also what must stay.")),
            run=i18n("Edit"),
            live=True,
        )


def multi(checkpoint_dropdown: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(i18n("Multi-reference"), id="multi", elem_id="multi", elem_classes="sheet"):
        presets = preset_panel.build_preset_panel()
        references = fields.references(fields.references_label(checkpoint.max_references), columns=5)
        pick = picker.build_picker_button("multi")
        drop = gr.Button("Move", visible="hidden", elem_id="multi-move")
        with gr.Row(visible=False, elem_classes="tools") as row:
            tools = ReferenceTools(
                row=row,
                name=fields.reference_name_field(),
                named=gr.Textbox("", visible=False),
                add=gr.UploadButton(
                    i18n("Add pictures"),
                    size="sm",
                    min_width=110,
                    file_count="multiple",
                    file_types=["image"],
                    elem_classes="add",
                ),
                earlier=gr.Button(i18n("◀ Earlier"), size="sm", min_width=80),
                later=gr.Button(i18n("Later ▶"), size="sm", min_width=80),
                remove=gr.Button(i18n("Remove"), size="sm", min_width=80),
                drag_button=drop,
            )
            gr.HTML(
                "<p data-i18n>Drag a picture to another place; or select it to name, move or remove it.</p>",
                elem_classes="note",
            )
        return _form(
            "multi",
            checkpoint_dropdown,
            checkpoint,
            examples,
            settings,
            presets=presets,
            references=references,
            reference_panel=_panel(pick, tools),
            prompt=fields.prompt(
                i18n("Instruction"),
                i18n('Call the pictures "image 1", "image 2" and so on, or @fox once you named one fox.'),
            ),
            run=i18n("Combine"),
        )


def _panel(pick: gr.Button, tools: ReferenceTools | None = None) -> ReferencePanel:
    return ReferencePanel(
        history_button=pick,
        problems=gr.HTML(elem_classes="refused"),
        note=gr.HTML(elem_classes="note"),
        client_state=gr.Textbox(visible=False),
        clear_count=gr.State(0),
        tools=tools,
    )


def _form(
    name: str,
    checkpoint_dropdown: gr.Dropdown,
    checkpoint: Checkpoint,
    examples: Examples,
    settings: Settings,
    *,
    presets: PresetPanel,
    prompt: gr.Textbox,
    run: str,
    references: gr.Gallery | None = None,
    reference_panel: ReferencePanel | None = None,
    live: bool = False,
) -> Form:
    samples = fields.examples(examples.of(name, checkpoint))
    upsampling = _upsampling(settings, with_references=references is not None)
    part, edits = mask_panel.build_mask_panel() if references is not None else ({}, None)
    run_button = gr.Button(run, variant="primary", size="lg", elem_classes="run")
    following = (
        LivePanel(
            on=fields.live(checkpoint, on=False),
            change_counter=fields.hidden_counter(),
            wake_counter=fields.hidden_counter(),
        )
        if live
        else None
    )
    fit = gr.HTML(elem_classes=["note", "fit"])
    aspect = fields.aspect(with_references=references is not None)
    with gr.Row(elem_classes="pair"):
        width, height = fields.sides(None if references else fields.size_of("1:1", checkpoint))
    size_note = gr.HTML(elem_classes="note")
    with gr.Row(elem_classes="seeds"):
        seed = fields.seed()
        roll = gr.Button(i18n("New seed"), min_width=90, elem_classes="roll")
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
            "checkpoint": checkpoint_dropdown,
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
        seed_lock=lock,
        new_seed=roll,
        aspect=aspect,
        size_note=size_note,
        presets=presets,
        estimate=fit,
        form_checkpoint=gr.Textbox(checkpoint.name, visible=False),
        examples=samples,
        loras=lora_panel,
        upsampling=upsampling,
        identity=identity,
        run=run_button,
        reference_panel=reference_panel,
        edit_accordion=edits,
        live=following,
    )


def _loras(checkpoint: Checkpoint) -> tuple[gr.HTML, LoraPanel]:
    with gr.Accordion(fields.lora_title(0), open=False, elem_classes="lora-panel") as folded:
        chosen = fields.loras()
        dropped = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="lora-add"):
            offer = fields.lora_dropdown(
                (), checkpoint
            )  # filled when the page is opened: a large folder takes its time
            refresh = gr.Button(i18n("Refresh"), size="sm", min_width=80, elem_classes="refresh")
        note = gr.HTML(elem_classes="note")
    return chosen, LoraPanel(accordion=folded, add_dropdown=offer, dropped=dropped, note=note, refresh=refresh)


def _upsampling(settings: Settings, *, with_references: bool) -> UpsamplingPanel:
    by = "none" if with_references else settings.upsample
    with gr.Accordion(i18n(UPSAMPLING_TITLE), open=by != "none", elem_classes=["upsampling", "extra"]) as folded:
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
                "temperature": fields.sampling("temperature", i18n("Temperature")),
                "top_p": fields.sampling("top_p", i18n("Top p")),
                "max_tokens": fields.sampling("max_tokens", i18n("Tokens")),
            }
        with gr.Row(elem_classes="acts"):
            enrich = gr.Button(i18n("Enrich now"), size="sm", visible=by != "none", elem_classes="enrich")
            stop = gr.Button(i18n("Stop"), size="sm", variant="stop", visible=False, elem_classes="enrich-stop")
        status = gr.HTML(elem_classes="enrich-status")
        written = gr.Textbox(
            label=i18n("Enriched prompt"),
            info=i18n("As it is written."),
            lines=4,
            max_lines=16,
            visible=False,
            elem_classes="written",
        )
        with gr.Row(elem_classes="acts"):
            use = gr.Button(i18n("Use as prompt"), size="sm", visible=False, elem_classes="use")
            undo = gr.Button(i18n("Undo"), size="sm", visible=False, elem_classes="undo")
        mode: PromptMode = "edit" if with_references else "generate"
        with gr.Accordion(i18n("What the language model is told"), open=False, elem_classes="told"):
            gr.HTML(f"<pre>{escape(build_instructions(mode, 0, seen=True))}</pre>")
    inputs = {"upsample_by": choice, "upsample_local": local, "upsample_remote": remote, "api_key": key, **sampling}
    return UpsamplingPanel(
        accordion=folded,
        provider=choice,
        local=local,
        remote=remote,
        key=key,
        sampling_row=row,
        inputs=inputs,
        about=about,
        enhance=enrich,
        stop=stop,
        status=status,
        enhanced_prompt=written,
        use=use,
        undo=undo,
        job_id=gr.State(""),
        undo_stack=gr.State([]),
    )


def _marks() -> tuple[dict[str, Any], gr.HTML]:
    """The fields of a request that say how its pictures are saved, and what they say of themselves."""
    with gr.Accordion(i18n("Saving and provenance"), open=False, elem_classes=["marks", "extra"]):
        image_format = fields.image_format()
        found = {
            "format": image_format,
            "watermark": fields.provenance_checkbox(
                i18n("Invisible watermark"),
                i18n("Says in the colours themselves that a model made the picture."),
                "watermark",
            ),
            "metadata": fields.provenance_checkbox(
                i18n("Settings in the file"),
                i18n("Prompt, seed and so on, from which Inspect makes the picture again; and that it is AI-made."),
                "metadata",
            ),
            "sign": fields.provenance_checkbox(
                i18n("Content credentials"), i18n("Signed (C2PA): later changes show."), "sign"
            ),
            "sign_prompt": fields.provenance_checkbox(
                i18n("Prompt in the credentials"), i18n("Publishes the prompt, signed."), "sign-prompt", on=False
            ),
        }
        identity = gr.HTML(elem_classes=["note", "identity"])
    return found, identity


def build_stage(queue: gr.HTML | None = None) -> StagePanel:
    """queue: shown below the result, where there is one."""
    job, results = gr.State(""), gr.State([])
    shown, picked = gr.Textbox("", visible=False), gr.Number(0, precision=0, visible=False)
    message = gr.HTML(elem_id="message")
    without = {
        form: gr.Button(i18n(label), visible=False, elem_classes="without")
        for form, label in (
            ("generate", "Generate without enriching"),
            ("edit", "Edit without enriching"),
            ("multi", "Combine without enriching"),
        )
    }
    with gr.Column(elem_id="mat"):
        preview = gr.HTML(EMPTY_STAGE_HTML, elem_id="preview")
        gallery = gr.Gallery(
            label=i18n("Result"),
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
        stop = gr.Button(i18n("Stop"), variant="stop", visible=False, min_width=96, scale=0, elem_id="stop")
        keep = gr.Button(i18n("Keep this preview"), visible=False, min_width=220, scale=0, elem_id="keep-preview")
    notices = gr.HTML(elem_id="notices")
    with gr.Row(visible=False, elem_id="actions") as actions:
        download = gr.DownloadButton(i18n("Download"), elem_id="download", min_width=140)
        edit = gr.Button(i18n("Use in Edit"), elem_id="use-in-edit", min_width=140)
    comparison = compare.build_comparison()
    if queue is not None:
        queue.render()
    with gr.Accordion(i18n("Settings used"), visible=False, open=True, elem_id="details") as details:
        table = gr.HTML(elem_id="settings")
        json = gr.Code(language="json", label=i18n("As JSON"), interactive=False, elem_id="json", lines=3, max_lines=12)
    return StagePanel(
        job_id=job,
        shown_job_id=shown,
        unfinished_job_id=gr.State(""),
        result_paths=results,
        selected_index=picked,
        message=message,
        generate_unenhanced=without["generate"],
        edit_unenhanced=without["edit"],
        multi_unenhanced=without["multi"],
        preview=preview,
        gallery=gallery,
        progress=progress,
        stop=stop,
        keep_preview=keep,
        notices=notices,
        actions=actions,
        download=download,
        use_in_edit=edit,
        comparison=comparison,
        details=details,
        table=table,
        json=json,
    )
