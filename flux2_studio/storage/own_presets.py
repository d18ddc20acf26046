"""Presets that users save for themselves, in the studio's database. Only the owner sees them."""

from __future__ import annotations

import dataclasses
import secrets
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager

from flux2_studio.errors import PresetError
from flux2_studio.storage.database import Database
from flux2_studio.storage.presets import Preset, parse_preset

MAX_PRESETS_PER_OWNER = 100
MAX_OWN_PRESETS_BYTES = 200_000_000  # of all owners together: a shared studio has unlimited visitors

_TABLE = """
CREATE TABLE IF NOT EXISTS own_presets (
    id TEXT PRIMARY KEY, owner TEXT NOT NULL, form TEXT NOT NULL, folded TEXT NOT NULL, card BLOB NOT NULL,
    UNIQUE (owner, form, folded)
)
"""


class PresetNameTaken(PresetError):
    """The owner has another preset of that name for the same form; `name` is its spelling."""

    def __init__(self, name: str) -> None:
        super().__init__(f"You have a preset called {name} already: replace it, or choose another name.")
        self.name = name


class OwnPresets:
    """Presets by owner (see `ui.gradio_compat.visitors.owner_of`) and id. Safe to use from any thread and several
    processes.

    Every method raises `PresetError` for an unknown owner or an id that is not theirs, and `SaveError` if the database
    cannot be used.
    """

    def __init__(self, database: Database, *, max_total_bytes: int = MAX_OWN_PRESETS_BYTES) -> None:
        """max_total_bytes: limit for the presets of all owners together."""
        self._database = database
        self._max_total_bytes = max_total_bytes

    def for_form(self, owner: str, form: str) -> dict[str, Preset]:
        """Return the presets of `owner` for `form` by id, sorted by name."""
        with self._opened(owner) as connection:
            rows = connection.execute(
                "SELECT id, card FROM own_presets WHERE owner = ? AND form = ? ORDER BY folded", (owner, form)
            ).fetchall()
        return {row["id"]: parse_preset(row["card"]) for row in rows}

    def find(self, owner: str, id: str) -> Preset:
        with self._opened(owner) as connection:
            return _find(connection, owner, id)

    def save(self, owner: str, preset: Preset, *, replace: bool = False) -> str:
        """Save `preset` and return its id. Raises `PresetNameTaken` if the name exists and `replace` is false."""
        card = preset.as_json().encode()
        folded = preset.name.casefold()
        with self._opened(owner) as connection:
            existing = _find_by_name(connection, owner, preset)
            if existing is not None:
                if not replace:
                    raise PresetNameTaken(parse_preset(existing["card"]).name)
                connection.execute("UPDATE own_presets SET card = ? WHERE id = ?", (card, existing["id"]))
                return str(existing["id"])
            self._check_room(connection, owner, len(card))
            id = secrets.token_hex(8)
            connection.execute(
                "INSERT INTO own_presets (id, owner, form, folded, card) VALUES (?, ?, ?, ?, ?)",
                (id, owner, preset.form, folded, card),
            )
        return id

    def rename(self, owner: str, id: str, name: str) -> Preset:
        """Rename preset `id` and return it. Raises `PresetNameTaken` if another one has that name."""
        with self._opened(owner) as connection:
            preset = dataclasses.replace(_find(connection, owner, id), name=name.strip())
            existing = _find_by_name(connection, owner, preset)
            if existing is not None and existing["id"] != id:
                raise PresetNameTaken(parse_preset(existing["card"]).name)
            connection.execute(
                "UPDATE own_presets SET folded = ?, card = ? WHERE id = ?",
                (preset.name.casefold(), preset.as_json().encode(), id),
            )
        return preset

    def delete(self, owner: str, id: str) -> Preset:
        """Delete preset `id`, and return it so that the caller can undo."""
        with self._opened(owner) as connection:
            preset = _find(connection, owner, id)
            connection.execute("DELETE FROM own_presets WHERE id = ?", (id,))
        return preset

    def _check_room(self, connection: sqlite3.Connection, owner: str, size: int) -> None:
        (count,) = connection.execute("SELECT COUNT(*) FROM own_presets WHERE owner = ?", (owner,)).fetchone()
        if count >= MAX_PRESETS_PER_OWNER:
            raise PresetError(f"You have {count} presets, the most that are kept: delete one first.")
        (total,) = connection.execute("SELECT TOTAL(LENGTH(card)) FROM own_presets").fetchone()
        if total + size > self._max_total_bytes:
            raise PresetError("This studio has no room for more presets: export yours as a file instead.")

    @contextmanager
    def _opened(self, owner: str) -> Iterator[sqlite3.Connection]:
        if not owner:
            raise PresetError("Presets of your own need a cookie: allow it for this page, and load the page again.")
        with self._database.transaction() as connection:
            connection.execute(_TABLE)
            yield connection


def _find(connection: sqlite3.Connection, owner: str, id: str) -> Preset:
    row = connection.execute("SELECT card FROM own_presets WHERE owner = ? AND id = ?", (owner, id)).fetchone()
    if row is None:
        raise PresetError("That preset is not there any more: choose another one.")
    return parse_preset(row["card"])


def _find_by_name(connection: sqlite3.Connection, owner: str, preset: Preset) -> sqlite3.Row | None:
    row: sqlite3.Row | None = connection.execute(
        "SELECT id, card FROM own_presets WHERE owner = ? AND form = ? AND folded = ?",
        (owner, preset.form, preset.name.casefold()),
    ).fetchone()
    return row
