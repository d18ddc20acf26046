"""The page's layout: one form per tab, and a shared stage beside them for the results.

Each function lays out one part and returns its components; no events are connected here.
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

UPSAMPLING_TITLE = "Enhance prompt"

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
    estimate: gr.HTML  # memory and time of the request
    form_checkpoint: gr.Textbox  # hidden: the checkpoint whose ranges and defaults the fields show
    examples: gr.Dataset
    loras: LoraPanel
    upsampling: UpsamplingPanel
    identity: gr.HTML  # the signing identity, and what its signature proves
    run: gr.Button
    reference_panel: ReferencePanel | None = None
    edit_accordion: gr.Accordion | None = None  # contains mask and outpainting
    live: LivePanel | None = None


@dataclass(frozen=True, kw_only=True)
class LivePanel:
    """Live mode. `change_counter` is incremented in the browser for each change to follow, `wake_counter` for each
    change that no handler was left to show.
    """

    on: gr.Checkbox
    change_counter: gr.Number
    wake_counter: gr.Number


@dataclass(frozen=True, kw_only=True)
class UpsamplingPanel:
    """Prompt enhancement of a form. `inputs`: the inputs of `Upsampling`, and the API key.

    `job_id`: the enhancement under way; `undo_stack`: the replaced prompts, latest last.
    """

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
    """The components around a form's references: refused files with reasons, and notes on the accepted ones.

    `history_button` sends the pictures picked from History. The page's script sends its own state in place of
    `client_state`: the selected picture, the indices of a drag, or how often the gallery was cleared. `clear_count` is
    the number of clears that the server has handled.
    """

    problems: gr.HTML
    note: gr.HTML
    history_button: gr.Button
    client_state: gr.Textbox
    clear_count: gr.State
    tools: ReferenceTools | None = None


@dataclass(frozen=True, kw_only=True)
class LoraPanel:
    """The components around a form's LoRAs: those that can be added, and notes on them."""

    accordion: gr.Accordion
    add_dropdown: gr.Dropdown
    dropped: gr.HTML
    note: gr.HTML
    refresh: gr.Button


@dataclass(frozen=True, kw_only=True)
class ReferenceTools:
    """The components that sort and name several references.

    `named`: the file that `name` refers to, as the browser saw it while the user typed. After a drag, the page's script
    presses `drag_button`.
    """

    row: gr.Row
    name: gr.Textbox
    named: gr.Textbox
    add: gr.UploadButton  # the gallery accepts no upload while a picture is selected
    earlier: gr.Button
    later: gr.Button
    remove: gr.Button
    drag_button: gr.Button


@dataclass(frozen=True, kw_only=True)
class StagePanel:
    """The stage, where a run is followed.

    `job_id`: the run; `shown_job_id`: the run that the browser shows, which Stop cancels. `result_paths`: the saved
    files; `selected_index`: the selected one. `generate_unenhanced`, `edit_unenhanced`, `multi_unenhanced`: run the
    form without prompt enhancement after that failed. `keep_preview`: saves the last preview of the run
    `unfinished_job_id`.
    """

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
        """All components of the stage."""
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
            reference_panel=_reference_panel(pick),
            prompt=fields.prompt(i18n("Instruction"), i18n("What should change? Say also what must stay.")),
            run=i18n("Edit"),
            live=True,
        )


def multi(checkpoint_dropdown: gr.Dropdown, checkpoint: Checkpoint, examples: Examples, settings: Settings) -> Form:
    with gr.Tab(i18n("Multi-reference"), id="multi", elem_id="multi", elem_classes="sheet"):
        presets = preset_panel.build_preset_panel()
        references = fields.references(fields.references_label(checkpoint.max_references), columns=5)
        pick = picker.build_picker_button("multi")
        drag_button = gr.Button("Move", visible="hidden", elem_id="multi-move")
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
                drag_button=drag_button,
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
            reference_panel=_reference_panel(pick, tools),
            prompt=fields.prompt(
                i18n("Instruction"),
                i18n('Call the pictures "image 1", "image 2" and so on, or @fox once you named one fox.'),
            ),
            run=i18n("Combine"),
        )


def _reference_panel(pick: gr.Button, tools: ReferenceTools | None = None) -> ReferencePanel:
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
    mask_fields, edit_accordion = mask_panel.build_mask_panel() if references is not None else ({}, None)
    run_button = gr.Button(run, variant="primary", size="lg", elem_classes="run")
    live_panel = (
        LivePanel(
            on=fields.live(checkpoint, on=False),
            change_counter=fields.hidden_counter(),
            wake_counter=fields.hidden_counter(),
        )
        if live
        else None
    )
    estimate = gr.HTML(elem_classes=["note", "fit"])
    aspect = fields.aspect(with_references=references is not None)
    with gr.Row(elem_classes="pair"):
        width, height = fields.sides(None if references else fields.size_of("1:1", checkpoint))
    size_note = gr.HTML(elem_classes="note")
    with gr.Row(elem_classes="seeds"):
        seed = fields.seed()
        new_seed = gr.Button(i18n("New seed"), min_width=90, elem_classes="roll")
        seed_lock = fields.lock()
    count = fields.count()
    with gr.Row(elem_classes="pair"):
        steps = fields.steps(checkpoint)
        guidance = fields.guidance(checkpoint)
    negative_prompt = fields.negative_prompt(checkpoint)
    loras, lora_panel = _loras(checkpoint)
    marks, identity = _provenance_fields()
    return Form(
        name=name,
        fields={
            "prompt": prompt,
            "negative_prompt": negative_prompt,
            "checkpoint": checkpoint_dropdown,
            **({"references": references} if references else {}),
            **mask_fields,
            "width": width,
            "height": height,
            "steps": steps,
            "guidance": guidance,
            "seed": seed,
            "count": count,
            "loras": loras,
            **marks,
        },
        seed_lock=seed_lock,
        new_seed=new_seed,
        aspect=aspect,
        size_note=size_note,
        presets=presets,
        estimate=estimate,
        form_checkpoint=gr.Textbox(checkpoint.name, visible=False),
        examples=samples,
        loras=lora_panel,
        upsampling=upsampling,
        identity=identity,
        run=run_button,
        reference_panel=reference_panel,
        edit_accordion=edit_accordion,
        live=live_panel,
    )


def _loras(checkpoint: Checkpoint) -> tuple[gr.HTML, LoraPanel]:
    with gr.Accordion(fields.lora_title(0), open=False, elem_classes="lora-panel") as accordion:
        chosen = fields.loras()
        dropped = gr.HTML(elem_classes="note")
        with gr.Row(elem_classes="lora-add"):
            # Filled when the page is opened, because scanning a large folder takes time.
            add_dropdown = fields.lora_dropdown((), checkpoint)
            refresh = gr.Button(i18n("Refresh"), size="sm", min_width=80, elem_classes="refresh")
        note = gr.HTML(elem_classes="note")
    return chosen, LoraPanel(
        accordion=accordion, add_dropdown=add_dropdown, dropped=dropped, note=note, refresh=refresh
    )


def _upsampling(settings: Settings, *, with_references: bool) -> UpsamplingPanel:
    by = "none" if with_references else settings.upsample
    with gr.Accordion(i18n(UPSAMPLING_TITLE), open=by != "none", elem_classes=["upsampling", "extra"]) as accordion:
        provider = fields.upsample_by(by)
        local = fields.local_model((), visible=False)  # filled once the checkpoint is known
        models = [(model.label, model.name) for model in REMOTE_MODELS]
        remote = fields.remote_model(
            models, settings.openrouter_model or REMOTE_MODELS[0].name, visible=by == "openrouter"
        )
        key = fields.api_key(visible=by == "openrouter")
        about = gr.HTML(elem_classes="note")
        # "hidden" keeps it on the page: an empty Number that is removed and added again becomes 0, invalid for top p.
        with gr.Row(visible=by != "none" or "hidden", elem_classes="pair") as row:
            sampling = {
                "temperature": fields.sampling("temperature", i18n("Temperature")),
                "top_p": fields.sampling("top_p", i18n("Top p")),
                "max_tokens": fields.sampling("max_tokens", i18n("Tokens")),
            }
        with gr.Row(elem_classes="acts"):
            enhance = gr.Button(i18n("Enhance now"), size="sm", visible=by != "none", elem_classes="enhance")
            stop = gr.Button(i18n("Stop"), size="sm", variant="stop", visible=False, elem_classes="enhance-stop")
        status = gr.HTML(elem_classes="enhance-status")
        enhanced_prompt = gr.Textbox(
            label=i18n("Enhanced prompt"),
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
    inputs = {"upsample_by": provider, "upsample_local": local, "upsample_remote": remote, "api_key": key, **sampling}
    return UpsamplingPanel(
        accordion=accordion,
        provider=provider,
        local=local,
        remote=remote,
        key=key,
        sampling_row=row,
        inputs=inputs,
        about=about,
        enhance=enhance,
        stop=stop,
        status=status,
        enhanced_prompt=enhanced_prompt,
        use=use,
        undo=undo,
        job_id=gr.State(""),
        undo_stack=gr.State([]),
    )


def _provenance_fields() -> tuple[dict[str, Any], gr.HTML]:
    """The request fields for saving and provenance, and the note on the signing identity."""
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
    """Build the stage. queue: shown below the result if given."""
    job_id, result_paths = gr.State(""), gr.State([])
    shown_job_id, selected_index = gr.Textbox("", visible=False), gr.Number(0, precision=0, visible=False)
    message = gr.HTML(elem_id="message")
    unenhanced = {
        form: gr.Button(i18n(label), visible=False, elem_classes="without")
        for form, label in (
            ("generate", "Generate without enhancing"),
            ("edit", "Edit without enhancing"),
            ("multi", "Combine without enhancing"),
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
        keep_preview = gr.Button(
            i18n("Keep this preview"), visible=False, min_width=220, scale=0, elem_id="keep-preview"
        )
    notices = gr.HTML(elem_id="notices")
    with gr.Row(visible=False, elem_id="actions") as actions:
        download = gr.DownloadButton(i18n("Download"), elem_id="download", min_width=140)
        use_in_edit = gr.Button(i18n("Use in Edit"), elem_id="use-in-edit", min_width=140)
    comparison = compare.build_comparison()
    if queue is not None:
        queue.render()
    with gr.Accordion(i18n("Settings used"), visible=False, open=True, elem_id="details") as details:
        table = gr.HTML(elem_id="settings")
        json = gr.Code(language="json", label=i18n("As JSON"), interactive=False, elem_id="json", lines=3, max_lines=12)
    return StagePanel(
        job_id=job_id,
        shown_job_id=shown_job_id,
        unfinished_job_id=gr.State(""),
        result_paths=result_paths,
        selected_index=selected_index,
        message=message,
        generate_unenhanced=unenhanced["generate"],
        edit_unenhanced=unenhanced["edit"],
        multi_unenhanced=unenhanced["multi"],
        preview=preview,
        gallery=gallery,
        progress=progress,
        stop=stop,
        keep_preview=keep_preview,
        notices=notices,
        actions=actions,
        download=download,
        use_in_edit=use_in_edit,
        comparison=comparison,
        details=details,
        table=table,
        json=json,
    )
