"""The Explore tab: a form's settings many times over, with something changed each time, on one sheet."""

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
from flux2_studio.explore.axes import FIELDS, LORA, read_axis
from flux2_studio.explore.batch import read_batch
from flux2_studio.explore.plan import Plan, fixed, grid, listing, seeds
from flux2_studio.explore.running import Exploration, Explorations
from flux2_studio.explore.variants import Wildcards
from flux2_studio.images.contact_sheet import Layout
from flux2_studio.request import Request
from flux2_studio.ui.forms.tabs import Form
from flux2_studio.ui.forms.upsample_panel import INPUTS
from flux2_studio.ui.gradio_compat.language import say, t, told
from flux2_studio.ui.gradio_compat.visitors import owner_of
from flux2_studio.ui.gradio_compat.wiring import Update, listen
from flux2_studio.ui.stage import show

if TYPE_CHECKING:
    from flux2_studio.studio import Studio

POLL = 0.4  # seconds between two looks at an exploration
SIDES = ("Columns", "Rows", "Tables")
NOTHING = "Nothing"
SEEDS, GRID, FILE = "Seeds", "Grid", "From a file"
EMPTY = (
    '<div class="empty"><p class="lead" data-i18n>Your pictures will appear here, side by side.</p>'
    "<p data-i18n>Write a prompt in Generate, choose here what is to change from picture to picture, and press "
    "Explore.</p></div>"
)
ABOUT = (
    "<p data-i18n>Draws the settings of a form many times, with something changed each time. Prompts may hold choices, "
    "<code>a {red|green} fox</code>, and lists, <code>__animal__</code> for each line of the file "
    "<code>animal.txt</code> in the studio's folder <code>wildcards</code>.</p>"
)


@dataclass(frozen=True, kw_only=True)
class ExploreTab:
    """`fields` and `values` are the three sides of a grid; `job` is the exploration that is shown, by its id."""

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
    more: gr.Button
    problem: gr.HTML
    progress: gr.HTML
    sheet: gr.HTML
    job: gr.State


def layout(forms: Sequence[Form]) -> ExploreTab:
    names = {"generate": "Generate", "edit": "Edit", "multi": "Multi-reference"}
    with gr.Tab(t("Explore"), id="explore", elem_id="explore", elem_classes="sheet"), gr.Row(elem_id="explore-desk"):
        job = gr.State("")  # in here: Gradio counts what lies between two tabs as one
        with gr.Column(scale=4, min_width=300, elem_id="explore-form"):
            gr.HTML(ABOUT, elem_classes="note")
            source = gr.Radio(
                [(t(names[it.name]), it.name) for it in forms], value=forms[0].name, label=t("Settings of")
            )
            kinds = [(t(kind), kind) for kind in (SEEDS, GRID, FILE)]
            kind = gr.Radio(kinds, value=SEEDS, label=t("What changes"), elem_id="explore-kind")
            with gr.Column(elem_id="explore-seeds") as by_seeds:
                count = gr.Slider(2, 64, value=9, step=1, precision=0, label=t("Pictures"), buttons=[])
            with gr.Column(visible=False, elem_id="explore-grid") as by_grid:
                sides = [_side(name, number) for number, name in enumerate(SIDES)]
            with gr.Column(visible=False, elem_id="explore-file") as by_file:
                gr.HTML(
                    "<p data-i18n>A prompt a line (.txt), or a table (.csv, .tsv, .jsonl) whose columns are prompt, "
                    "negative_prompt, checkpoint, width, height, steps, guidance, seed or format. What a row "
                    "leaves out is taken from the form.</p>",
                    elem_classes="note",
                )
                file = gr.File(
                    label=t("File"),
                    file_types=[".txt", ".csv", ".tsv", ".jsonl", ".ndjson"],
                    type="filepath",
                    height=120,
                )
            problem = gr.HTML(elem_id="explore-problem", elem_classes="refused")
            start = gr.Button(t("Explore"), variant="primary", size="lg", elem_classes="run", elem_id="explore-start")
            with gr.Row(elem_classes="acts"):
                stop = gr.Button(t("Stop"), variant="stop", visible=False, elem_id="explore-stop")
                more = gr.Button(t("Go on"), visible=False, elem_id="explore-more")
        with gr.Column(scale=8, min_width=300, elem_id="explore-stage"):
            progress = gr.HTML(elem_id="explore-progress")
            sheet = gr.HTML(EMPTY, elem_id="explore-sheet")
    return ExploreTab(
        source=source,
        kind=kind,
        count=count,
        fields=tuple(field for field, _ in sides),
        values=tuple(values for _, values in sides),
        file=file,
        seeds=by_seeds,
        grid=by_grid,
        batch=by_file,
        start=start,
        stop=stop,
        more=more,
        problem=problem,
        progress=progress,
        sheet=sheet,
        job=job,
    )


def _side(name: str, number: int) -> tuple[gr.Dropdown, gr.Textbox]:
    first = ("seed", "1..4") if number == 0 else ("", "")
    with gr.Row(elem_classes="pair"):
        field = gr.Dropdown(
            _choices(()), value=first[0], label=t(name), min_width=130, scale=2, elem_id=f"explore-{name.lower()}"
        )
        values = gr.Textbox(
            first[1],
            label=t("Values"),
            lines=1,
            max_lines=8,
            min_width=130,
            scale=3,
            placeholder=t(FIELDS[first[0]][1]) if first[0] else "",
            elem_id=f"explore-{name.lower()}-values",
        )
    return field, values


def _choices(loras: Sequence[str]) -> list[tuple[str, str]]:
    known = [(t(title), field) for field, (title, _) in FIELDS.items()]
    return [(t(NOTHING), ""), *known, *((say("Weight of {name}", name=name), LORA + name) for name in loras)]


def wire(
    tab: ExploreTab,
    studio: Studio,
    explorations: Explorations,
    wildcards: Wildcards,
    forms: Sequence[Form],
    read: Callable[..., Request],
) -> None:
    """Connect the tab. read: `handlers.read_form`."""
    inputs: list[Any] = [tab.source, tab.kind, tab.count, *tab.fields, *tab.values, tab.file]
    places: dict[str, slice] = {}
    for form in forms:
        places[form.name] = slice(len(inputs), len(inputs) + 3 + len(form.fields))
        inputs += [form.lock, form.laid_out_for, form.aspect, *form.fields.values()]

    def base_of(values: Sequence[Any]) -> Request:
        form = next(form for form in forms if form.name == values[0])
        locked, laid_out_for, aspect, *typed = values[places[form.name]]
        shown: dict[str, Any] = dict(zip(form.fields, typed, strict=True))
        return read(
            {**dict.fromkeys(INPUTS), **shown, "upsample_by": "none"},
            locked=locked,
            checkpoint=studio.settings.checkpoint(shown["checkpoint"]),
            laid_out_for=laid_out_for,
            aspect=aspect,
        )

    def check(request: Request) -> None:
        request.resolve(studio.settings.checkpoint(request.checkpoint))

    def plan_of(values: Sequence[Any]) -> Plan:
        base = fixed(base_of(values))
        kind, count, file = values[1], values[2], values[9]
        if kind == SEEDS:
            return seeds(base, int(count or 0), math.ceil(math.sqrt(int(count or 1))), check)
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
            return listing(requests, across, [request.prompt for request in requests], "Prompt")
        axes = [
            read_axis(field, text or "", studio.settings.checkpoints, wildcards) if field else None
            for field, text in zip(values[3:6], values[6:9], strict=True)
        ]
        return grid(base, axes, wildcards, check)

    async def followed(exploration: Exploration) -> AsyncIterator[Update]:
        seen = -1
        while True:
            version, state = exploration.progress.version, exploration.progress.state
            if version != seen:
                seen = version
                yield _shown(tab, exploration, await asyncio.to_thread(sheets_of, exploration))
            if state != "running":
                return
            await asyncio.sleep(POLL)

    def sheets_of(exploration: Exploration) -> list[Path]:
        """The finished contact sheets, which are drawn once nothing is under way."""
        if exploration.progress.state == "running" or not exploration.progress.done:
            return []
        return [_sheet(exploration, table) for table in range(1 + max(it.table for it in exploration.plan.cells))]

    async def start(request: gr.Request, *values: Any) -> AsyncIterator[Update]:
        yield {tab.problem: ""}
        try:
            plan = await asyncio.to_thread(plan_of, values)
            exploration = await asyncio.to_thread(explorations.start, plan, owner_of(request))
        except StudioError as error:
            yield {tab.problem: show.problem(str(error))}
            return
        async for update in followed(exploration):
            yield update

    async def resume(job: str, request: gr.Request) -> AsyncIterator[Update]:
        try:
            exploration = await asyncio.to_thread(explorations.resume, job, owner_of(request))
        except StudioError as error:
            yield {tab.problem: show.problem(str(error))}
            return
        async for update in followed(exploration):
            yield update

    async def opened(request: gr.Request) -> AsyncIterator[Update]:
        """When the page is opened: what was shown when it was left."""
        yield {field: gr.Dropdown(_choices([it.name for it in studio.loras.look()[0]])) for field in tab.fields}
        exploration = await asyncio.to_thread(explorations.newest, owner_of(request))
        if exploration is not None:
            async for update in followed(exploration):
                yield update

    def stop(job: str, request: gr.Request) -> Any:
        exploration = explorations.get(job, owner_of(request))
        if exploration is None:
            return gr.Button(visible=False)
        explorations.stop(exploration)
        return gr.Button(t("Stopping…"), interactive=False)

    shown = [tab.problem, tab.progress, tab.sheet, tab.stop, tab.more, tab.start, tab.job]
    listen(tab.start.click, start, inputs, shown, concurrency_limit=None)
    listen(tab.more.click, resume, tab.job, shown, concurrency_limit=None)
    listen(tab.stop.click, stop, tab.job, tab.stop, queue=False)
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
                placeholder=t(FIELDS[name][1]) if name in FIELDS else t("0..1 by 0.25") if name else ""
            ),
            field,
            values,
            queue=False,
        )


# --- how it looks -----------------------------------------------------------------------------------------------


def _sheet(exploration: Exploration, table: int) -> Path:
    """The file of the contact sheet, by what is on it."""
    done = len(exploration.progress.done)
    target = exploration.folder / f"sheet-{table + 1}-{done}.png"
    if not target.is_file():
        exploration.sheet(table).save(target, "PNG")
    return target


def _shown(tab: ExploreTab, exploration: Exploration, sheets: Sequence[Path]) -> Update:
    progress = exploration.progress
    running = progress.state == "running"
    count, done = len(exploration.plan.cells), len(progress.done)
    return {
        tab.job: exploration.id,
        tab.progress: _told(exploration, done, count, sheets),
        tab.sheet: "".join(
            _table(exploration, table) for table in range(1 + max(it.table for it in exploration.plan.cells))
        ),
        tab.stop: gr.Button(t("Stop"), visible=running, interactive=True),
        tab.more: gr.Button(
            say("Go on with the {missing} that are missing", missing=count - done), visible=not running and done < count
        ),
        tab.start: gr.Button(interactive=not running),
    }


def _told(exploration: Exploration, done: int, count: int, sheets: Sequence[Path]) -> str:
    progress = exploration.progress
    prompts = exploration.plan.prompts
    text = say("{done} of {count} pictures", done=done, count=count)
    if prompts > 1:
        text += ", " + say("{count} prompts", count=prompts)
    if progress.state == "stopped":
        text = say("Stopped: {text}", text=text)
    told = [f'<p role="status">{escape(text)}</p><progress max="1" value="{done / count:.3f}"></progress>']
    told += [show.problem(why) for why in dict.fromkeys(progress.failed.values())]
    links = [
        f'<a class="chip" href="{address(path)}" download>{say("Contact sheet")}'
        f"{f' {number}' if len(sheets) > 1 else ''}</a>"
        for number, path in enumerate(sheets, 1)
    ]
    return "".join(told) + (f'<p class="facts">{"".join(links)}</p>' if links else "")


def address(path: Path) -> str:
    """Where the page finds a file of the library."""
    return f"gradio_api/file={quote(str(path))}"


def _table(exploration: Exploration, table: int) -> str:
    plan, layout = exploration.plan, exploration.layout(table)
    at: Mapping[tuple[int, int], int] = {
        (cell.column, cell.row): number for number, cell in enumerate(plan.cells) if cell.table == table
    }
    head = ""
    if layout.above:
        corner = "<td></td>" if layout.beside else ""
        cells = "".join(f'<th scope="col">{escape(label)}</th>' for label in layout.above)
        head = f"<thead><tr>{corner}{cells}</tr></thead>"
    rows = []
    for row in range(layout.rows):
        beside = f'<th scope="row">{escape(layout.beside[row])}</th>' if layout.beside else ""
        places = [(column, row) for column in range(layout.columns)]
        cells = "".join(_cell(exploration, at.get(place), layout) for place in places)
        rows.append(f"<tr>{beside}{cells}</tr>")
    title = f"<caption>{escape(layout.title)}</caption>" if layout.title else ""
    return f'<div class="sheet-table"><table>{title}{head}<tbody>{"".join(rows)}</tbody></table></div>'


def _cell(exploration: Exploration, number: int | None, layout: Layout) -> str:
    if number is None:
        return "<td></td>"
    progress, cell = exploration.progress, exploration.plan.cells[number]
    place = cell.row * layout.columns + cell.column
    label = escape(layout.under[place] if layout.under else cell.request.prompt)
    if (path := progress.done.get(number)) is not None:
        small = address(exploration.thumbnail(number))
        inner = (
            f'<a href="{address(path)}" target="_blank" rel="noopener">'
            f'<img src="{small}" alt="{label}" loading="lazy"></a>'
        )
    elif number in progress.failed:
        inner = f'<span class="tile failed" title="{escape(told(progress.failed[number]))}">{say("failed")}</span>'
    else:
        inner = '<span class="tile"></span>'
    caption = f"<small>{label}</small>" if layout.under else ""
    return f"<td>{inner}{caption}</td>"
