"""LoRAs on the page: offered for the chosen checkpoint, added with a weight, removed if incompatible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from flux2_studio.checkpoints import Checkpoint
from flux2_studio.errors import RequestError
from flux2_studio.models.loras import LoraEntry, LoraLibrary
from flux2_studio.request import LoraChoice
from flux2_studio.ui.forms import fields
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

MAX_PROBLEMS_LISTED = 3  # a folder shared with other models' LoRAs has hundreds of problems


def read_loras(rows: Any) -> tuple[LoraChoice, ...]:
    """Convert the rows of `fields.loras`, which the browser may have altered. Raises `RequestError`."""
    try:
        return tuple(LoraChoice(name=row["name"], weight=row["weight"]) for row in rows or ())
    except (TypeError, KeyError) as error:
        raise RequestError("The LoRAs came in a form that is not read: load the page again.") from error


def keep_compatible(
    rows: Sequence[Mapping[str, Any]], entries: Sequence[LoraEntry], checkpoint: Checkpoint
) -> tuple[list[Mapping[str, Any]], list[str]]:
    """The `rows` that `checkpoint` supports, and a sentence about every other one."""
    by_name = {entry.name: entry for entry in entries}
    compatible: list[Mapping[str, Any]] = []
    dropped = []
    for row in rows:
        entry = by_name.get(row["name"])
        if entry is None:
            dropped.append(f"{row['name']} was taken off: its file is gone.")
        elif entry.width != checkpoint.hidden_width:
            dropped.append(f"{entry.name} was taken off: it is for {entry.family}, not for {checkpoint.label}.")
        else:
            compatible.append(row)
    return compatible, dropped


def loras_note(entries: Sequence[LoraEntry], problems: Sequence[str], loras: LoraLibrary) -> str:
    """Notes on the LoRA folder as HTML: where to put files if there are none, and which files are unusable."""
    texts = list(problems[:MAX_PROBLEMS_LISTED])
    if not entries:
        texts.insert(0, f"No LoRAs yet. Put their .safetensors files into {loras.folder} and press Refresh.")
    if more := len(problems) - len(problems[:MAX_PROBLEMS_LISTED]):
        files = "1 more file is" if more == 1 else f"{more} more files are"
        texts.append(f"{files} no LoRA for FLUX.2 either: `flux2-studio models loras` names them all.")
    return render.notes(texts)


def wire_loras(studio: Studio, checkpoint_dropdown: gr.Dropdown, forms: Sequence[Form]) -> None:
    panels = [form.loras for form in forms]

    def offer(name: str) -> Update:
        entries, problems = studio.loras.scan()
        checkpoint = studio.settings.checkpoint(name)
        note = loras_note(entries, problems, studio.loras)
        update: Update = {}
        for panel in panels:
            update |= {panel.add_dropdown: fields.lora_dropdown(entries, checkpoint), panel.note: note}
        return update

    def drop(name: str, *chosen_rows: Any) -> Update:
        entries, _ = studio.loras.scan()
        checkpoint = studio.settings.checkpoint(name)
        update: Update = {}
        for form, rows in zip(forms, chosen_rows, strict=True):
            compatible, dropped = keep_compatible(rows or (), entries, checkpoint)
            update[form.loras.dropped] = render.notes(dropped)
            if dropped:
                update[form.fields["loras"]] = compatible
        return update

    offered = [component for panel in panels for component in (panel.add_dropdown, panel.note)]
    lists = [form.fields["loras"] for form in forms]
    dropped = [*(panel.dropped for panel in panels), *lists]
    # Without a trigger: at every choice of a checkpoint and when the page is opened.
    listen(None, offer, checkpoint_dropdown, offered)
    listen(checkpoint_dropdown.change, drop, [checkpoint_dropdown, *lists], dropped)
    for form, panel, rows in zip(forms, panels, lists, strict=True):
        listen(panel.refresh.click, offer, checkpoint_dropdown, offered)
        listen(panel.refresh.click, drop, [checkpoint_dropdown, *lists], dropped)
        listen(
            panel.add_dropdown.input,
            None,
            [panel.add_dropdown, rows],
            [panel.add_dropdown, rows],
            js=fields.ADD_LORA_JS,
        )
        # The title of the folded panel shows the number of LoRAs.
        listen(
            rows.input,
            lambda now: gr.Accordion(fields.lora_title(len(now or ()))),
            rows,
            form.loras.accordion,
            queue=False,
        )
