"""Batches from a file: one prompt per line, or a table (CSV, JSONL) whose columns are fields of `Request`."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux2_studio.errors import RequestError
from flux2_studio.explore.variants import MAX_CELLS
from flux2_studio.request import Request

MAX_BATCH_FILE_BYTES = 2_000_000
# Fields that a row may set: no paths of this machine, and one picture per row.
TEXT_COLUMNS = ("prompt", "negative_prompt", "checkpoint", "format")
INTEGER_COLUMNS = ("width", "height", "steps", "seed")
COLUMNS = (*TEXT_COLUMNS, *INTEGER_COLUMNS, "guidance")


def read_batch(file: Path, base: Request) -> tuple[Request, ...]:
    """Return a request for each row of `file` (.txt, .csv, .tsv, .jsonl): `base` with the fields that the row sets.

    Raises `RequestError` with the number of the invalid row.
    """
    try:
        if file.stat().st_size > MAX_BATCH_FILE_BYTES:
            raise RequestError("The file is larger than 2 MB: split it.")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError("The file cannot be read as UTF-8 text: save it so, and choose it again.") from error
    readers = {
        ".txt": _read_lines,
        ".csv": _read_table,
        ".tsv": _read_table,
        ".jsonl": _read_objects,
        ".ndjson": _read_objects,
    }
    reader = readers.get(file.suffix.lower())
    if reader is None:
        raise RequestError("Choose a file that ends in .txt (a prompt a line), .csv, .tsv or .jsonl.")
    rows = reader(text)
    if not rows:
        raise RequestError("There is nothing in the file: write a prompt a line, or a table with a column `prompt`.")
    if len(rows) > MAX_CELLS:
        raise RequestError(f"The file has {len(rows)} rows; {MAX_CELLS} at most are made at once: split it.")
    return tuple(_row_request(base, row, number) for number, row in rows)


def _row_request(base: Request, row: Mapping[str, Any], number: int) -> Request:
    unknown = [name for name in row if name not in COLUMNS]
    if unknown:
        raise RequestError(
            f"Row {number}: there is no field {str(unknown[0])[:100]!r} that a row can set. Those are: "
            f"{', '.join(COLUMNS)}."
        )
    # A row with another checkpoint uses that checkpoint's defaults.
    changes_checkpoint = row.get("checkpoint") not in (None, base.checkpoint)
    changes: dict[str, Any] = {"steps": None, "guidance": None} if changes_checkpoint else {}
    changes |= row
    try:
        return Request.from_dict({**base.as_dict(), **changes, "count": 1})
    except RequestError as error:
        raise RequestError(f"Row {number}: {error}") from error


def _read_lines(text: str) -> list[tuple[int, dict[str, Any]]]:
    return [(number, {"prompt": line.strip()}) for number, line in enumerate(text.splitlines(), 1) if line.strip()]


def _read_table(text: str) -> list[tuple[int, dict[str, Any]]]:
    first_line = text.partition("\n")[0]
    separator = max("\t;,", key=first_line.count)
    rows: list[tuple[int, dict[str, Any]]] = []
    reader = csv.reader(io.StringIO(text), delimiter=separator)
    columns: Sequence[str] | None = None
    try:
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            if columns is None:
                columns = [cell.strip() for cell in cells]
                if "prompt" not in columns:
                    raise RequestError("The first row must name the columns, and one of them must be `prompt`.")
                if len(set(columns)) < len(columns):
                    raise RequestError("Two columns of the table have the same name: rename one.")
                continue
            if len(cells) > len(columns):
                raise RequestError(
                    f"Row {reader.line_num}: it has more cells than there are columns; quote its commas."
                )
            row = {name: cell.strip() for name, cell in zip(columns, cells, strict=False) if cell.strip()}
            rows.append((reader.line_num, _convert_cells(row, reader.line_num)))
    except csv.Error as error:
        raise RequestError(f"Row {reader.line_num}: it is no row of a table ({error}).") from error
    return rows


def _convert_cells(row: Mapping[str, str], number: int) -> dict[str, Any]:
    """Convert the cells of numeric columns to numbers."""
    typed: dict[str, Any] = dict(row)
    for name, text in row.items():
        try:
            if name in INTEGER_COLUMNS:
                typed[name] = int(text)
            elif name == "guidance":
                typed[name] = float(text)
        except ValueError as error:
            raise RequestError(f"Row {number}: {name} is {text[:50]!r}, which is no number.") from error
    return typed


def _read_objects(text: str) -> list[tuple[int, dict[str, Any]]]:
    rows = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"Row {number}: it is no JSON.") from error
        if not isinstance(row, dict):
            raise RequestError(f'Row {number}: write an object, as {{"prompt": "a fox", "seed": 1}}.')
        rows.append((number, row))
    return rows
