"""The page's components, one small function each. Called inside an event handler, the same function makes the update.

A component for a field of `Request` takes its range and default from the `Checkpoint`; nothing here depends on a
checkpoint's name. Sizes are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gradio as gr

from flux2_studio.checkpoints import CHECKPOINTS, GB, MB, Checkpoint, Part
from flux2_studio.models.loras import LoraEntry
from flux2_studio.request import MAX_COUNT, SAMPLING_LIMITS, size_for_aspect
from flux2_studio.ui.forms.examples import Example
from flux2_studio.ui.forms.reference_names import caption
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message

ASPECTS: dict[str, tuple[int, int]] = {
    "1:1": (1, 1),
    "4:3": (4, 3),
    "3:4": (3, 4),
    "3:2": (3, 2),
    "2:3": (2, 3),
    "16:9": (16, 9),
    "9:16": (9, 16),
    "21:9": (21, 9),
}
AS_REFERENCE = "As image 1"
FREE = "Free"
FIXED = "Fixed by distillation."

# Draws the rows of `loras`, and redraws them when their value is set elsewhere. Names are set as text, not HTML.
LORA_ROWS_JS = """
const rows = element.querySelector('.rows');
const value = () => props.value ?? [];
const make = (tag, attributes) => Object.assign(document.createElement(tag), attributes);
const row = (lora, index) => {
  const set = (weight) => {
    range.value = number.value = weight;
    props.value = value().map((other, place) => (place === index ? {...other, weight} : other));
  };
  const side = {min: -2, max: 2, step: 0.05, value: lora.weight};
  const {name} = lora;
  const title = make('span', {className: 'name', textContent: name, title: name});
  const range = make('input', {type: 'range', ...side, ariaLabel: studioSay('Weight of {name}', {name})});
  const number = make('input', {type: 'number', ...side, ariaLabel: studioSay('Weight of {name} as a number', {name})});
  const remove = make('button', {type: 'button', textContent: '\\u00d7'});
  remove.ariaLabel = studioSay('Take {name} off', {name});
  range.addEventListener('input', () => set(Number(range.value)));
  number.addEventListener('change', () => set(Math.min(2, Math.max(-2, Number(number.value) || 0))));
  remove.addEventListener('click', () => {
    props.value = value().filter((_, place) => place !== index);
    draw();
    trigger('input');
  });
  const drawn = make('div', {className: 'lora'});
  drawn.append(title, remove, range, number);
  return drawn;
};
const draw = () => rows.replaceChildren(...value().map(row));
draw();
watch('value', () => { draw(); trigger('input'); });
"""
# Adds the chosen LoRA, unless it is in the rows; in the browser, so that a run started at once has it.
ADD_LORA_JS = """(name, loras) => {
  const chosen = loras ?? [];
  return [null, !name || chosen.some((lora) => lora.name === name) ? chosen : [...chosen, {name, weight: 1}]];
}"""


def checkpoint(choices: Sequence[Checkpoint], chosen: str) -> gr.Dropdown:
    toys = {shipped.label for shipped in CHECKPOINTS if shipped.is_toy}  # only these labels need translation
    return gr.Dropdown(
        choices=[(i18n(choice.label) if choice.label in toys else choice.label, choice.name) for choice in choices],
        value=chosen,
        label=i18n("Checkpoint"),
        filterable=False,
        elem_id="checkpoint",
    )


def checkpoint_summary_html(checkpoint: Checkpoint, on_disk: bool) -> str:
    """The purpose of `checkpoint`, its licence and the size of its download, as HTML."""
    licence = link(checkpoint.licence_url, checkpoint.licence)
    if on_disk:
        status_chip = f'<span class="chip here">{translate("on disk")}</span>'
    else:
        size = sum(part.size for part in {*checkpoint.parts, checkpoint.tiny_autoencoder} if part.repo)
        status_chip = (
            f'<span class="chip">{translate("first run downloads up to {size}", size=_size_text(size))}</span>'
        )
    lines = [
        f"<p>{escape(translate_message(checkpoint.good_for))}</p>",
        f'<p class="facts"><span class="chip">{licence}</span>{status_chip}</p>',
    ]
    if checkpoint.gated and not on_disk:
        lines.append(gated_notice_html([_hub_page(part) for part in checkpoint.parts if part.gated]))
    return "".join(lines)


def _hub_page(part: Part) -> str:
    return link(f"https://huggingface.co/{part.repo}", str(part.repo))


def gated_notice_html(pages: Sequence[str]) -> str:
    """Instructions for a gated checkpoint as HTML. pages: links to accept its licence."""
    page_list = translate(" and ").join(pages)
    instructions = translate(
        "Gated: accept the licence on {pages}, then start the studio with your access token in HF_TOKEN.",
        pages=page_list,
    )
    return f'<p class="gate">{instructions}</p>'


def link(url: str, text: str) -> str:
    return f'<a href="{escape(url)}" target="_blank" rel="noopener">{escape(text)}</a>'


def _size_text(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / MB:.0f} MB"


def prompt(label: str, placeholder: str) -> gr.Textbox:
    return gr.Textbox(label=label, placeholder=placeholder, lines=3, max_lines=10, elem_classes="prompt")


def negative_prompt(checkpoint: Checkpoint, value: str | None = None) -> gr.Textbox:
    """value: None keeps the current text."""
    # Emptied if unsupported: the request would be refused for a hidden text.
    text = value if checkpoint.supports_negative_prompt else ""
    update: dict[str, Any] = {} if text is None else {"value": text}
    return gr.Textbox(
        label=i18n("Negative prompt"),
        placeholder=i18n("What the picture should not show"),
        lines=2,
        max_lines=6,
        visible=checkpoint.supports_negative_prompt,
        elem_classes="negative",
        **update,
    )


def references(label: str, columns: int, value: Sequence[Path] = ()) -> gr.Gallery:
    """The reference pictures. A gallery even for one, because it passes on the uploaded file unopened."""
    return gr.Gallery(
        value=captioned_items(value),
        label=label,
        type="filepath",
        file_types=["image"],
        interactive=True,
        allow_preview=False,
        columns=columns,
        height="auto",
        fit_columns=False,
        object_fit="contain",
        buttons=[],
        elem_classes=["references", "one" if columns == 1 else "many"],
    )


def references_label(max_count: int) -> str:
    """The label of a gallery for `max_count` references."""
    return translate("Up to {most} pictures: drop, paste or choose", most=max_count)


def captioned_items(paths: Sequence[Path], names: Mapping[Path, str] = MappingProxyType({})) -> list[tuple[str, str]]:
    """Gallery items with captions that a prompt may use."""
    return [(str(path), caption(number, names.get(path, ""))) for number, path in enumerate(paths, 1)]


def reference_name_field(value: str = "", *, of_one: bool = False) -> gr.Textbox:
    """The name of the selected picture. of_one: whether a picture is selected."""
    return gr.Textbox(
        value,
        label=i18n("Name"),
        info=i18n("Write it as @name in the instruction."),
        placeholder=i18n("fox, then Enter") if of_one else i18n("Select a picture first"),
        max_lines=1,
        interactive=of_one,
        elem_classes="name",
    )


def examples(entries: Sequence[Example]) -> gr.Dataset:
    return gr.Dataset(
        components=["textbox"],
        samples=_example_samples(entries),
        type="index",
        label=i18n("Try"),
        visible=bool(entries),
        elem_classes="examples",
    )


def other_examples(entries: Sequence[Example]) -> gr.Dataset:
    """The update of `examples`: the components of a Dataset cannot be set again."""
    return gr.Dataset(samples=_example_samples(entries), visible=bool(entries))


def _example_samples(entries: Sequence[Example]) -> list[list[str]]:
    return [[entry.prompt] for entry in entries]


def lora_dropdown(entries: Sequence[LoraEntry], checkpoint: Checkpoint) -> gr.Dropdown:
    """LoRAs that can be added to `loras`: first those for `checkpoint`, then the others with their model family."""
    compatible = [(entry.name, entry.name) for entry in entries if entry.width == checkpoint.hidden_width]
    others = [
        (translate("{name} (for {family})", name=entry.name, family=entry.family), entry.name)
        for entry in entries
        if entry.width != checkpoint.hidden_width
    ]
    return gr.Dropdown(
        choices=[*compatible, *others],
        value=None,
        label=i18n("Add a LoRA"),
        visible=bool(entries),
        min_width=140,
        elem_classes="lora-offer",
    )


def loras() -> gr.HTML:
    """The chosen LoRAs, `[{"name": ..., "weight": ...}, ...]`, each a row with a slider.

    One component, because name and weight must be sent together: a run started while a slider moves gets the shown
    values. The event "input" signals that a LoRA was added or removed.
    """
    return gr.HTML([], html_template='<div class="rows"></div>', js_on_load=LORA_ROWS_JS, elem_classes="loras")


def lora_title(chosen: int) -> str:
    """The title of the folded panel, with the number of LoRAs so that they are not forgotten."""
    return translate("LoRAs ({chosen})", chosen=chosen) if chosen else i18n("LoRAs")


def aspect(*, with_references: bool) -> gr.Radio:
    values = [*([AS_REFERENCE] if with_references else []), *ASPECTS, FREE]
    choices = [(value if value in ASPECTS else i18n(value), value) for value in values]
    return gr.Radio(choices=choices, value=values[0], label=i18n("Shape"), elem_classes="aspect")


def sides(size: tuple[int, int] | None) -> tuple[gr.Number, gr.Number]:
    """Width and height; None derives both from the first reference and hides them."""
    width, height = size or (None, None)
    return (
        gr.Number(width, label=i18n("Width"), precision=0, step=16, visible=size is not None, min_width=90),
        gr.Number(height, label=i18n("Height"), precision=0, step=16, visible=size is not None, min_width=90),
    )


def size_of(aspect: str, checkpoint: Checkpoint) -> tuple[int, int]:
    """The size for a shape; the checkpoint's default square if `aspect` is not a known ratio."""
    return size_for_aspect(*ASPECTS.get(aspect, (1, 1)), checkpoint.default_pixels)


def ratio(width: int, height: int) -> str:
    """`width`:`height` as a known ratio if within 2%, else like "1.42:1" or "1:1.42"."""
    for name, (across, down) in ASPECTS.items():
        if math.isclose(width / height, across / down, rel_tol=0.02):
            return name
    return f"{width / height:.2f}:1" if width > height else f"1:{height / width:.2f}"


def live(checkpoint: Checkpoint, *, on: bool | None = None) -> gr.Checkbox:
    """on: None keeps the current state; always off for checkpoints that do not support it."""
    update: dict[str, Any] = (
        {} if on is None and checkpoint.supports_live else {"value": bool(on) and checkpoint.supports_live}
    )
    return gr.Checkbox(
        label=i18n("Live"),
        info=i18n("The picture follows as you type and is not saved. Press the button to keep it."),
        visible=checkpoint.supports_live,
        elem_classes="live",
        **update,
    )


def hidden_counter() -> gr.Number:
    """A counter whose changes trigger events. Hidden but on the page: removed components trigger no change."""
    return gr.Number(0, precision=0, visible="hidden", elem_classes="pulse")


def count() -> gr.Slider:
    return gr.Slider(
        1, MAX_COUNT, value=1, step=1, precision=0, label=i18n("Pictures"), buttons=[], elem_classes="count"
    )


def seed() -> gr.Number:
    return gr.Number(
        None, label=i18n("Seed"), precision=0, placeholder=i18n("random"), min_width=120, elem_classes="seed"
    )


def lock() -> gr.Checkbox:
    return gr.Checkbox(False, label=i18n("Lock"), info=i18n("keep this seed"), min_width=90, elem_classes="lock")


def steps(checkpoint: Checkpoint, value: int | None = None) -> gr.Slider:
    """value: None takes the checkpoint's default."""
    return gr.Slider(
        1,
        checkpoint.max_steps,
        value=checkpoint.steps if value is None else value,
        step=1,
        precision=0,
        label=i18n("Steps"),
        info=i18n(FIXED) if checkpoint.steps_fixed else i18n("More is finer and slower."),
        interactive=not checkpoint.steps_fixed,
        buttons=[],
        elem_classes="steps",
    )


def guidance(checkpoint: Checkpoint, value: float | None = None) -> gr.Slider:
    """value: None takes the checkpoint's default."""
    return gr.Slider(
        1.0,
        checkpoint.max_guidance,
        value=checkpoint.guidance if value is None else value,
        step=0.1,
        label=i18n("Guidance"),
        info=i18n(FIXED) if checkpoint.guidance_fixed else i18n("How closely the prompt is followed."),
        interactive=not checkpoint.guidance_fixed,
        buttons=[],
        elem_classes="guidance",
    )


def upsample_by(chosen: str) -> gr.Radio:
    return gr.Radio(
        [(i18n("Off"), "none"), (i18n("On this machine"), "local"), (i18n("OpenRouter or your server"), "openrouter")],
        value=chosen,
        label=i18n("By a language model"),
        info=i18n("It turns a rough idea into a full prompt, in the same run or with Enhance now."),
        elem_classes="upsample-by",
    )


def local_model(offers: Sequence[tuple[str, str]], *, visible: bool) -> gr.Dropdown:
    """offers: (label, name) of the language models that can write on this machine."""
    return gr.Dropdown(
        choices=list(offers),
        value=offers[0][1] if offers else None,
        label=i18n("Language model"),
        filterable=False,
        visible=visible and bool(offers),
        elem_classes="local-model",
    )


def remote_model(models: Sequence[tuple[str, str]], chosen: str, *, visible: bool) -> gr.Dropdown:
    """models: (label, name) of the listed ones; any other name may be typed."""
    known = {name for _, name in models}
    return gr.Dropdown(
        choices=[*models, *([] if chosen in known else [(chosen, chosen)])],
        value=chosen,
        label=i18n("Language model"),
        info=i18n("Choose one, or type the name that the server knows it by."),
        allow_custom_value=True,
        visible=visible,
        elem_classes="remote-model",
    )


def api_key(*, visible: bool) -> gr.Textbox:
    """Not a field of `Request`: it is sent beside it and never stored."""
    return gr.Textbox(
        label=i18n("API key"),
        type="password",
        placeholder=i18n("for this session only"),
        visible=visible,
        max_lines=1,
        html_attributes=gr.InputHTMLAttributes(autocomplete="off", spellcheck=False),
        elem_classes="api-key",
    )


def sampling(name: str, label: str) -> gr.Number:
    """One of `SAMPLING_LIMITS`; empty takes the value recommended for the model."""
    low, high = SAMPLING_LIMITS[name]
    is_integer = name == "max_tokens"
    return gr.Number(
        None,
        label=label,
        minimum=low,
        maximum=high,
        step=1 if is_integer else 0.05,
        precision=0 if is_integer else None,
        placeholder=i18n("advised"),
        min_width=90,
        elem_classes="sampling",
    )


def image_format() -> gr.Radio:
    return gr.Radio(
        [("PNG", "png"), ("JPEG", "jpeg"), ("WebP", "webp")], value="png", label=i18n("Save as"), elem_classes="format"
    )


def provenance_checkbox(label: str, info: str, elem_class: str, *, on: bool = True) -> gr.Checkbox:
    return gr.Checkbox(on, label=label, info=info, elem_classes=["mark", elem_class])
