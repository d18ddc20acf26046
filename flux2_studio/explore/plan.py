"""The plan of an exploration: its cells in drawing order, with their positions."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flux2_studio.errors import RequestError
from flux2_studio.explore.axes import UNVARIED_AXIS, Axis, prompt_axis
from flux2_studio.explore.variants import MAX_CELLS, Wildcards, expand_prompt
from flux2_studio.request import MAX_COUNT, MAX_SEED, Request, Upsampling

MAX_LABEL = 200  # characters


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One picture: its request, with a seed, and its column, row and table (0-based)."""

    request: Request
    column: int
    row: int
    table: int = 0


@dataclass(frozen=True, kw_only=True)
class ExplorationPlan:
    """`cells` in drawing order. `columns`, `rows` and `tables` are the labels; () for a side along which nothing
    varies. `titles` are the names of the three sides."""

    cells: tuple[Cell, ...]
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    tables: tuple[str, ...]
    titles: tuple[str, str, str]

    @property
    def prompt_count(self) -> int:
        """The number of prompts to encode."""
        return len({(cell.request.checkpoint, cell.request.prompt) for cell in self.cells})


def plan_grid(
    base: Request,
    axes: Sequence[Axis | None],
    wildcards: Wildcards,
    check: Callable[[Request], object],
) -> ExplorationPlan:
    """Return the cells of `base` over up to three axes: columns, rows, tables; None for a side along which nothing
    varies.

    A prompt that expands to several varies along the first free side. All cells share one seed, unless seeds vary.
    check: raises `RequestError` for a request that cannot be run.
    """
    sides = [*axes, None, None, None][:3]
    prompts = expand_prompt(base.prompt, wildcards)
    if len(prompts) > 1 or prompts[0] != base.prompt:
        if len(prompts) > 1:
            if None not in sides:
                raise RequestError("The prompt stands for several, and all three sides vary already: free one.")
            sides[sides.index(None)] = prompt_axis(prompts)
        else:
            base = replace(base, prompt=prompts[0])
    columns, rows, tables = (side or UNVARIED_AXIS for side in sides)
    count = len(columns.values) * len(rows.values) * len(tables.values)
    if count > MAX_CELLS:
        raise RequestError(f"That makes {count} pictures; {MAX_CELLS} is the most: leave some values out.")
    base = single_picture_request(base)
    cells = []
    for table, third in enumerate(tables.values):
        for row, second in enumerate(rows.values):
            for column, first in enumerate(columns.values):
                request = first.apply(second.apply(third.apply(base)))
                check(request)
                cells.append(Cell(request=request, column=column, row=row, table=table))
    return ExplorationPlan(
        cells=_in_drawing_order(cells),
        columns=_labels(columns),
        rows=_labels(rows),
        tables=_labels(tables),
        titles=(columns.title, rows.title, tables.title),
    )


def plan_seeds(base: Request, count: int, across: int, check: Callable[[Request], object]) -> ExplorationPlan:
    """Return `count` pictures of `base` with consecutive seeds, `across` of them per row. check: see `plan_grid`."""
    if not 1 <= count <= MAX_CELLS:
        raise RequestError(f"Choose between 1 and {MAX_CELLS} seeds, not {count}.")
    base = single_picture_request(base)
    first = base.seed
    assert first is not None
    if first + count - 1 > MAX_SEED:
        raise RequestError(f"Choose a first seed of {MAX_SEED - count + 1} at most.")
    requests = [replace(base, seed=first + i) for i in range(count)]
    check(requests[0])
    return plan_list(requests, across, [f"{request.seed}" for request in requests], "Seed")


def plan_list(requests: Sequence[Request], across: int, labels: Sequence[str], title: str) -> ExplorationPlan:
    """Arrange `requests` in rows of `across`, with a label each."""
    cells = [
        Cell(request=single_picture_request(it), column=i % across, row=i // across) for i, it in enumerate(requests)
    ]
    return ExplorationPlan(
        cells=_in_drawing_order(cells),
        columns=tuple(label[:MAX_LABEL] for label in labels),
        rows=(),
        tables=(),
        titles=(title, "", ""),
    )


def single_picture_request(base: Request) -> Request:
    """Return `base` for one cell: a single picture, with a seed and without prompt enhancement, so that cells differ
    only in what varies."""
    seed = secrets.randbelow(MAX_SEED - MAX_COUNT) if base.seed is None else base.seed
    return replace(base, seed=seed, count=1, upsampling=Upsampling())


def _labels(axis: Axis) -> tuple[str, ...]:
    return () if axis is UNVARIED_AXIS else tuple(value.label[:MAX_LABEL] for value in axis.values)


def _in_drawing_order(cells: Sequence[Cell]) -> tuple[Cell, ...]:
    """Sort by checkpoint, prompt and LoRAs, each in order of first appearance, to group cells that share them."""
    checkpoints: dict[object, int] = {}
    loras: dict[object, int] = {}
    prompts: dict[object, int] = {}

    def key(cell: Cell) -> tuple[int, int, int]:
        request = cell.request
        return (
            checkpoints.setdefault(request.checkpoint, len(checkpoints)),
            prompts.setdefault((request.prompt, request.negative_prompt), len(prompts)),
            loras.setdefault(request.loras, len(loras)),
        )

    return tuple(sorted(cells, key=key))
