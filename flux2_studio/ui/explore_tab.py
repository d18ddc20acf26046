"""The Explore tab: many pictures from a form's settings, each with something changed, on one sheet."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import gradio as gr

from flux2_studio.errors import RequestError, StudioError
from flux2_studio.explore.axes import AXIS_FIELDS, LORA_PREFIX, read_axis
from flux2_studio.explore.batch import read_batch
from flux2_studio.explore.plan import ExplorationPlan, plan_grid, plan_list, plan_seeds, single_picture_request
from flux2_studio.explore.running import Exploration, ExplorationManager
from flux2_studio.explore.variants import Wildcards
from flux2_studio.images.contact_sheet import SheetLayout
from flux2_studio.request import Request
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.forms.upsample_panel import UPSAMPLING_INPUTS
from flux2_studio.ui.gradio_compat.language import i18n, translate, translate_message
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import render

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

EXPLORATION_POLL_SECONDS = 0.4  # seconds
AXIS_TITLES = ("Columns", "Rows", "Tables")
NO_AXIS = "Nothing"
SEEDS, GRID, FILE = "Seeds", "Grid", "From a file"
EMPTY_SHEET_HTML = (
    '<div class="empty"><p class="lead" data-i18n>Your pictures will appear here, side by side.</p>'
    "<p data-i18n>Write a prompt in Generate, choose here what is to change from picture to picture, and press "
    "Explore.</p></div>"
)
EXPLORE_INTRO_HTML = (
    "<p data-i18n>Draws the settings of a form many times, with something changed each time. Prompts may hold choices, "
    "<code>a {red|green} fox</code>, and lists, <code>__animal__</code> for each line of the file "
    "<code>animal.txt</code> in the studio's folder <code>wildcards</code>.</p>"
)


@dataclass(frozen=True, kw_only=True)
class ExploreTab:
    """`fields` and `values`: the axes of a grid. `exploration_id`: the exploration that is shown."""

    source: gr.Radio
    kind: gr.Radio
    count: gr.Slider
    fields: tuple[gr.Dropdown, ...]
    values: tuple[gr.Textbox, ...]
    file: gr.File
    seeds: gr.Column
    grid: gr.Column
    batch: gr.Column
    start: gr.Button
    stop: gr.Button
    resume: gr.Button
    problem: gr.HTML
    progress: gr.HTML
    sheet: gr.HTML
    exploration_id: gr.State


def build_explore_tab(forms: Sequence[Form]) -> ExploreTab:
    names = {"generate": "Generate", "edit": "Edit", "multi": "Multi-reference"}
    with gr.Tab(i18n("Explore"), id="explore", elem_id="explore", elem_classes="sheet"), gr.Row(elem_id="explore-desk"):
        exploration_id = gr.State("")  # inside the tab: Gradio counts components between two tabs as a tab
        with gr.Column(scale=4, min_width=300, elem_id="explore-form"):
            gr.HTML(EXPLORE_INTRO_HTML, elem_classes="note")
            source = gr.Radio(
                [(i18n(names[it.name]), it.name) for it in forms], value=forms[0].name, label=i18n("Settings of")
            )
            kinds = [(i18n(kind), kind) for kind in (SEEDS, GRID, FILE)]
            kind = gr.Radio(kinds, value=SEEDS, label=i18n("What changes"), elem_id="explore-kind")
            with gr.Column(elem_id="explore-seeds") as by_seeds:
                count = gr.Slider(2, 64, value=9, step=1, precision=0, label=i18n("Pictures"), buttons=[])
            with gr.Column(visible=False, elem_id="explore-grid") as by_grid:
                axes = [_axis_row(name, number) for number, name in enumerate(AXIS_TITLES)]
            with gr.Column(visible=False, elem_id="explore-file") as by_file:
                gr.HTML(
                    "<p data-i18n>A prompt a line (.txt), or a table (.csv, .tsv, .jsonl) whose columns are prompt, "
                    "negative_prompt, checkpoint, width, height, steps, guidance, seed or format. What a row "
                    "leaves out is taken from the form.</p>",
                    elem_classes="note",
                )
                file = gr.File(
                    label=i18n("File"),
                    file_types=[".txt", ".csv", ".tsv", ".jsonl", ".ndjson"],
                    type="filepath",
                    height=120,
                )
            problem = gr.HTML(elem_id="explore-problem", elem_classes="refused")
            start = gr.Button(
                i18n("Explore"), variant="primary", size="lg", elem_classes="run", elem_id="explore-start"
            )
            with gr.Row(elem_classes="acts"):
                stop = gr.Button(i18n("Stop"), variant="stop", visible=False, elem_id="explore-stop")
                resume = gr.Button(i18n("Resume"), visible=False, elem_id="explore-more")
        with gr.Column(scale=8, min_width=300, elem_id="explore-stage"):
            progress = gr.HTML(elem_id="explore-progress")
            sheet = gr.HTML(EMPTY_SHEET_HTML, elem_id="explore-sheet")
    return ExploreTab(
        source=source,
        kind=kind,
        count=count,
        fields=tuple(field for field, _ in axes),
        values=tuple(values for _, values in axes),
        file=file,
        seeds=by_seeds,
        grid=by_grid,
        batch=by_file,
        start=start,
        stop=stop,
        resume=resume,
        problem=problem,
        progress=progress,
        sheet=sheet,
        exploration_id=exploration_id,
    )


def _axis_row(name: str, number: int) -> tuple[gr.Dropdown, gr.Textbox]:
    default = ("seed", "1..4") if number == 0 else ("", "")
    with gr.Row(elem_classes="pair"):
        field = gr.Dropdown(
            _choices(()), value=default[0], label=i18n(name), min_width=130, scale=2, elem_id=f"explore-{name.lower()}"
        )
        values = gr.Textbox(
            default[1],
            label=i18n("Values"),
            lines=1,
            max_lines=8,
            min_width=130,
            scale=3,
            placeholder=i18n(AXIS_FIELDS[default[0]][1]) if default[0] else "",
            elem_id=f"explore-{name.lower()}-values",
        )
    return field, values


def _choices(loras: Sequence[str]) -> list[tuple[str, str]]:
    known = [(i18n(title), field) for field, (title, _) in AXIS_FIELDS.items()]
    return [
        (i18n(NO_AXIS), ""),
        *known,
        *((translate("Weight of {name}", name=name), LORA_PREFIX + name) for name in loras),
    ]


def wire_explore_tab(
    tab: ExploreTab,
    studio: Studio,
    explorations: ExplorationManager,
    wildcards: Wildcards,
    forms: Sequence[Form],
    read_form: Callable[..., Request],
) -> None:
    """Connect the tab. read_form: `handlers.read_form`."""
    inputs: list[Any] = [tab.source, tab.kind, tab.count, *tab.fields, *tab.values, tab.file]
    form_slices: dict[str, slice] = {}
    for form in forms:
        form_slices[form.name] = slice(len(inputs), len(inputs) + 3 + len(form.fields))
        inputs += [form.seed_lock, form.form_checkpoint, form.aspect, *form.fields.values()]

    def read_base_request(values: Sequence[Any]) -> Request:
        form = next(form for form in forms if form.name == values[0])
        locked, form_checkpoint, aspect, *typed = values[form_slices[form.name]]
        form_values: dict[str, Any] = dict(zip(form.fields, typed, strict=True))
        return read_form(
            {**dict.fromkeys(UPSAMPLING_INPUTS), **form_values, "upsample_by": "none"},
            locked=locked,
            checkpoint=studio.settings.checkpoint(form_values["checkpoint"]),
            form_checkpoint=form_checkpoint,
            aspect=aspect,
        )

    def check(request: Request) -> None:
        request.resolve(studio.settings.checkpoint(request.checkpoint))

    def make_plan(values: Sequence[Any]) -> ExplorationPlan:
        base = single_picture_request(read_base_request(values))
        kind, count, file = values[1], values[2], values[9]
        if kind == SEEDS:
            return plan_seeds(base, int(count or 0), math.ceil(math.sqrt(int(count or 1))), check)
        if kind == FILE:
            if not file:
                raise RequestError("Choose a file first: a prompt a line, or a table.")
            requests = read_batch(Path(file), base)
            for number, request in enumerate(requests, 1):
                try:
                    check(request)
                except RequestError as error:
                    raise RequestError(f"Picture {number}: {error}") from error
            across = min(5, math.ceil(math.sqrt(len(requests))))
            return plan_list(requests, across, [request.prompt for request in requests], "Prompt")
        axes = [
            read_axis(field, text or "", studio.settings.checkpoints, wildcards) if field else None
            for field, text in zip(values[3:6], values[6:9], strict=True)
        ]
        return plan_grid(base, axes, wildcards, check)

    async def follow(exploration: Exploration) -> AsyncIterator[Update]:
        shown_version = -1
        while True:
            version, state = exploration.progress.version, exploration.progress.state
            if version != shown_version:
                shown_version = version
                yield _exploration_update(tab, exploration, await asyncio.to_thread(sheets_of, exploration))
            if state != "running":
                return
            await asyncio.sleep(EXPLORATION_POLL_SECONDS)

    def sheets_of(exploration: Exploration) -> list[Path]:
        """The finished contact sheets; none while pictures are still being made."""
        if exploration.progress.state == "running" or not exploration.progress.done:
            return []
        return [_sheet_file(exploration, table) for table in range(1 + max(it.table for it in exploration.plan.cells))]

    async def start(request: gr.Request, *values: Any) -> AsyncIterator[Update]:
        yield {tab.problem: ""}
        try:
            plan = await asyncio.to_thread(make_plan, values)
            exploration = await asyncio.to_thread(explorations.start, plan, owner_of(request))
        except StudioError as error:
            yield {tab.problem: render.problem(str(error))}
            return
        async for update in follow(exploration):
            yield update

    async def resume(job: str, request: gr.Request) -> AsyncIterator[Update]:
        try:
            exploration = await asyncio.to_thread(explorations.resume, job, owner_of(request))
        except StudioError as error:
            yield {tab.problem: render.problem(str(error))}
            return
        async for update in follow(exploration):
            yield update

    async def opened(request: gr.Request) -> AsyncIterator[Update]:
        """When the page is opened: show the owner's latest exploration."""
        yield {field: gr.Dropdown(_choices([it.name for it in studio.loras.scan()[0]])) for field in tab.fields}
        exploration = await asyncio.to_thread(explorations.latest, owner_of(request))
        if exploration is not None:
            async for update in follow(exploration):
                yield update

    def stop(job: str, request: gr.Request) -> Any:
        exploration = explorations.get(job, owner_of(request))
        if exploration is None:
            return gr.Button(visible=False)
        explorations.stop(exploration)
        return gr.Button(i18n("Stopping…"), interactive=False)

    shown = [tab.problem, tab.progress, tab.sheet, tab.stop, tab.resume, tab.start, tab.exploration_id]
    listen(tab.start.click, start, inputs, shown, concurrency_limit=None)
    listen(tab.resume.click, resume, tab.exploration_id, shown, concurrency_limit=None)
    listen(tab.stop.click, stop, tab.exploration_id, tab.stop, queue=False)
    listen(None, opened, None, [*shown, *tab.fields], concurrency_limit=None)
    listen(
        tab.kind.input,
        lambda kind: [gr.Column(visible=kind == it) for it in (SEEDS, GRID, FILE)],
        tab.kind,
        [tab.seeds, tab.grid, tab.batch],
        queue=False,
    )
    for field, values in zip(tab.fields, tab.values, strict=True):
        listen(
            field.input,
            lambda name: gr.Textbox(
                placeholder=i18n(AXIS_FIELDS[name][1]) if name in AXIS_FIELDS else i18n("0..1 by 0.25") if name else ""
            ),
            field,
            values,
            queue=False,
        )


# --- layout -----------------------------------------------------------------------------------------------------


def _sheet_file(exploration: Exploration, table: int) -> Path:
    """The file of the contact sheet, made if it is missing; its name has the number of finished pictures."""
    done = len(exploration.progress.done)
    target = exploration.folder / f"sheet-{table + 1}-{done}.png"
    if not target.is_file():
        exploration.sheet(table).save(target, "PNG")
    return target


def _exploration_update(tab: ExploreTab, exploration: Exploration, sheets: Sequence[Path]) -> Update:
    progress = exploration.progress
    running = progress.state == "running"
    count, done = len(exploration.plan.cells), len(progress.done)
    return {
        tab.exploration_id: exploration.id,
        tab.progress: _exploration_progress_html(exploration, done, count, sheets),
        tab.sheet: "".join(
            _table_html(exploration, table) for table in range(1 + max(it.table for it in exploration.plan.cells))
        ),
        tab.stop: gr.Button(i18n("Stop"), visible=running, interactive=True),
        tab.resume: gr.Button(
            translate("Resume with the {missing} that are missing", missing=count - done),
            visible=not running and done < count,
        ),
        tab.start: gr.Button(interactive=not running),
    }


def _exploration_progress_html(exploration: Exploration, done: int, count: int, sheets: Sequence[Path]) -> str:
    progress = exploration.progress
    prompts = exploration.plan.prompt_count
    text = translate("{done} of {count} pictures", done=done, count=count)
    if prompts > 1:
        text += ", " + translate("{count} prompts", count=prompts)
    if progress.state == "stopped":
        text = translate("Stopped: {text}", text=text)
    parts = [f'<p role="status">{escape(text)}</p><progress max="1" value="{done / count:.3f}"></progress>']
    parts += [render.problem(reason) for reason in dict.fromkeys(progress.failed.values())]
    links = [
        f'<a class="chip" href="{gradio_file_url(path)}" download>{translate("Contact sheet")}'
        f"{f' {number}' if len(sheets) > 1 else ''}</a>"
        for number, path in enumerate(sheets, 1)
    ]
    return "".join(parts) + (f'<p class="facts">{"".join(links)}</p>' if links else "")


def gradio_file_url(path: Path) -> str:
    """The URL of a file for the page."""
    return f"gradio_api/file={quote(str(path))}"


def _table_html(exploration: Exploration, table: int) -> str:
    plan, layout = exploration.plan, exploration.layout(table)
    cell_numbers: Mapping[tuple[int, int], int] = {
        (cell.column, cell.row): number for number, cell in enumerate(plan.cells) if cell.table == table
    }
    head = ""
    if layout.column_labels:
        corner = "<td></td>" if layout.row_labels else ""
        cells = "".join(f'<th scope="col">{escape(label)}</th>' for label in layout.column_labels)
        head = f"<thead><tr>{corner}{cells}</tr></thead>"
    rows = []
    for row in range(layout.rows):
        row_head = f'<th scope="row">{escape(layout.row_labels[row])}</th>' if layout.row_labels else ""
        positions = [(column, row) for column in range(layout.columns)]
        cells = "".join(_cell_html(exploration, cell_numbers.get(position), layout) for position in positions)
        rows.append(f"<tr>{row_head}{cells}</tr>")
    title = f"<caption>{escape(layout.title)}</caption>" if layout.title else ""
    return f'<div class="sheet-table"><table>{title}{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _cell_html(exploration: Exploration, number: int | None, layout: SheetLayout) -> str:
    if number is None:
        return "<td></td>"
    progress, cell = exploration.progress, exploration.plan.cells[number]
    position = cell.row * layout.columns + cell.column
    label = escape(layout.captions[position] if layout.captions else cell.request.prompt)
    if (path := progress.done.get(number)) is not None:
        thumbnail_url = gradio_file_url(exploration.thumbnail(number))
        tile = (
            f'<a href="{gradio_file_url(path)}" target="_blank" rel="noopener">'
            f'<img src="{thumbnail_url}" alt="{label}" loading="lazy"></a>'
        )
    elif number in progress.failed:
        reason = escape(translate_message(progress.failed[number]))
        tile = f'<span class="tile failed" title="{reason}">{translate("failed")}</span>'
    else:
        tile = '<span class="tile"></span>'
    caption = f"<small>{label}</small>" if layout.captions else ""
    return f"<td>{tile}{caption}</td>"
