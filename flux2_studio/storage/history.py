"""History: every picture that an owner has made, newest first, searchable by prompt.

The studio's database (`database.py`) has one row per saved picture, with everything known about how it was made. Every
query names the owner, and another owner's id is treated like one that does not exist.

Deleting hides a picture at once and moves its file to the trash. After a day, or when the trash is emptied, the picture
is removed for good; until then it can be restored completely. The row is marked before the file is moved, and files are
looked up in both places, so a picture survives if the process dies in between.

A picture's references are found by hash, because its record identifies them so.
"""

from __future__ import annotations

import errno
import json
import re
import secrets
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from sqlite3 import Connection, Row

from flux2_studio.errors import RequestError, SaveError
from flux2_studio.events import Saved
from flux2_studio.files.hashing import hash_file
from flux2_studio.provenance.metadata import record_from_json, record_to_dict
from flux2_studio.record import Record
from flux2_studio.storage.database import Database

TRASH_SECONDS = 24 * 3600  # that the trash keeps a picture
DEFAULT_PAGE_SIZE = 60  # pictures
MAX_PICTURES_PER_CALL = 200  # pictures of a page, a deletion, a restoration, ...
MAX_WORDS = 32  # of a search; the rest is ignored
_ID = re.compile(r"[0-9a-f]{32}")

TABLES = (
    # Times are microseconds since 1970. `folded` is the searched text.
    """CREATE TABLE IF NOT EXISTS history_pictures (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, job TEXT NOT NULL, path TEXT NOT NULL, created INTEGER NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, seed INTEGER NOT NULL, checkpoint TEXT NOT NULL,
        label TEXT NOT NULL, prompt TEXT NOT NULL, folded TEXT NOT NULL, sha256 TEXT NOT NULL,
        favourite INTEGER NOT NULL DEFAULT 0, deleted INTEGER)""",
    # A separate table, because a search scans all rows of the one above.
    "CREATE TABLE IF NOT EXISTS history_records (picture TEXT PRIMARY KEY, record TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX IF NOT EXISTS history_newest ON history_pictures (owner, deleted, created DESC, id DESC)",
    "CREATE INDEX IF NOT EXISTS history_checkpoints ON history_pictures (owner, deleted, checkpoint, label)",
    "CREATE INDEX IF NOT EXISTS history_by_hash ON history_pictures (owner, sha256)",
    "CREATE INDEX IF NOT EXISTS history_deleted ON history_pictures (deleted) WHERE deleted IS NOT NULL",
    """CREATE TABLE IF NOT EXISTS history_sources (
        picture TEXT NOT NULL, place INTEGER NOT NULL, sha256 TEXT NOT NULL,
        PRIMARY KEY (picture, place)) WITHOUT ROWID""",
    "CREATE INDEX IF NOT EXISTS history_sources_by_hash ON history_sources (sha256)",
)
ENTRY_COLUMNS = "id, created, width, height, seed, checkpoint, label, prompt, favourite, path"


@dataclass(frozen=True, kw_only=True)
class HistoryEntry:
    """One picture as a list shows it. `created` is in microseconds since 1970, UTC; `missing`: its file is gone."""

    id: str
    created: int
    width: int
    height: int
    seed: int
    checkpoint: str
    label: str
    prompt: str
    favourite: bool
    suffix: str
    missing: bool

    @property
    def cursor(self) -> str:
        """The cursor of the page after this picture."""
        return f"{self.created}.{self.id}"


@dataclass(frozen=True, kw_only=True)
class ReferenceOrigin:
    """A reference of a picture: its hash, and the same owner's picture with that hash, if there is one."""

    sha256: str
    entry: HistoryEntry | None


@dataclass(frozen=True, kw_only=True)
class PictureDetails:
    """Everything known about one picture. record: None if this version cannot read it."""

    entry: HistoryEntry
    record: Record | None
    made_from: tuple[ReferenceOrigin, ...]
    made_into: tuple[HistoryEntry, ...]  # newest first


@dataclass(frozen=True, kw_only=True)
class HistorySearch:
    """A search: all of `words` anywhere in the prompt, and the other filters. Times as in `HistoryEntry.created`;
    `since` is inclusive, `until` exclusive."""

    words: str = ""
    checkpoint: str = ""
    since: int | None = None
    until: int | None = None
    favourites: bool = False


@dataclass(frozen=True, kw_only=True)
class HistoryPage:
    """A page of results, and the cursor of the next one: None at the end."""

    entries: tuple[HistoryEntry, ...]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class HistoryOverview:
    """The first view of the history or of a search: the first page, the numbers of pictures found and in total, the ids
    in the trash (last deleted first, as many as can be restored in one call), and the (name, label) of every checkpoint
    that has pictures."""

    page: HistoryPage
    found: int
    total: int
    trashed_ids: tuple[str, ...]
    checkpoints: tuple[tuple[str, str], ...]


def fold_for_search(text: str) -> str:
    """Normalize `text` for searching: NFKC and case-folded."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


class History:
    """The pictures under `outputs`, by owner. Deleted files wait in `trash`; `on_delete` is called with the id of each
    deleted picture.

    now: seconds since 1970. Safe to use from any thread and several processes. Every method raises `SaveError` if the
    database cannot be used.
    """

    def __init__(
        self,
        database: Database,
        outputs: Path,
        trash: Path,
        *,
        on_delete: Callable[[str], None] = lambda _: None,
        now: Callable[[], float] = time.time,
    ) -> None:
        self._database = database
        self._outputs = outputs
        self._trash = trash
        self._forget = on_delete
        self._now = now
        self._tables_created = threading.Event()

    def add(self, owner: str, job: str, saved: Saved) -> str:
        """Add the picture of `saved`, made by `owner`'s job, and return its id. Raises `SaveError` on failure; the file
        exists regardless."""
        record, request = saved.record, saved.record.request
        try:
            path = saved.image.resolve().relative_to(self._outputs.resolve()).as_posix()
            sha256 = hash_file(saved.image)
        except (OSError, ValueError) as error:
            raise SaveError(
                f"The picture {saved.image.name} is not in the folder of pictures any more ({error}): look there "
                f"before you make it again."
            ) from error
        searchable = "\n".join(filter(None, (request.prompt, record.original_prompt)))
        id_ = secrets.token_hex(16)
        with self._write_transaction() as connection:
            connection.execute(
                "INSERT INTO history_pictures (id, owner, job, path, created, width, height, seed, checkpoint, label, "
                "prompt, folded, sha256) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    id_,
                    owner,
                    job,
                    path,
                    self._moment(),
                    request.width,
                    request.height,
                    saved.seed,
                    request.checkpoint,
                    record.label,
                    request.prompt,
                    fold_for_search(searchable),
                    sha256,
                ),
            )
            connection.execute("INSERT INTO history_records VALUES (?, ?)", (id_, json.dumps(record_to_dict(record))))
            connection.executemany(
                "INSERT INTO history_sources (picture, place, sha256) VALUES (?, ?, ?)",
                [(id_, place, reference) for place, reference in enumerate(record.references)],
            )
        return id_

    def page(
        self, owner: str, search: HistorySearch | None = None, before: str | None = None, limit: int = DEFAULT_PAGE_SIZE
    ) -> HistoryPage:
        """Return the newest `limit` pictures that `search` finds after the cursor `before`. Raises `RequestError` for
        an invalid cursor."""
        where, values = _where_clause(owner, search or HistorySearch())
        if before is not None:
            created, dot, id_ = before.partition(".")
            if not (dot and re.fullmatch(r"\d{1,18}", created) and _ID.fullmatch(id_)):
                raise RequestError("That is no place in the history: open it anew.")
            where += " AND (created, id) < (?, ?)"
            values += [int(created), id_]
        limit = max(1, min(MAX_PICTURES_PER_CALL, limit))
        with self._read_transaction() as connection:
            rows = connection.execute(
                f"SELECT {ENTRY_COLUMNS} FROM history_pictures WHERE {where} ORDER BY created DESC, id DESC LIMIT ?",
                (*values, limit + 1),
            ).fetchall()
        entries = tuple(map(self._entry, rows[:limit]))
        return HistoryPage(entries=entries, next_cursor=entries[-1].cursor if len(rows) > limit else None)

    def overview(
        self, owner: str, search: HistorySearch | None = None, limit: int = DEFAULT_PAGE_SIZE
    ) -> HistoryOverview:
        """Return the first view, from one consistent snapshot."""
        where, values = _where_clause(owner, search or HistorySearch())
        limit = max(1, min(MAX_PICTURES_PER_CALL, limit))
        with self._read_transaction() as connection:
            # One scan for both the page and the count.
            matches = connection.execute(
                f"SELECT id FROM history_pictures WHERE {where} ORDER BY created DESC, id DESC", values
            ).fetchall()
            rows = _select_rows(connection, owner, [row["id"] for row in matches[:limit]], ENTRY_COLUMNS)
            (total,) = connection.execute(
                "SELECT count(*) FROM history_pictures WHERE owner = ? AND deleted IS NULL", (owner,)
            ).fetchone()
            trashed = connection.execute(
                "SELECT id FROM history_pictures WHERE owner = ? AND deleted IS NOT NULL ORDER BY deleted DESC LIMIT ?",
                (owner, MAX_PICTURES_PER_CALL),
            ).fetchall()
            checkpoints = connection.execute(
                "SELECT checkpoint, max(label) FROM history_pictures WHERE owner = ? AND deleted IS NULL "
                "GROUP BY checkpoint ORDER BY max(label)",
                (owner,),
            ).fetchall()
        entries = tuple(map(self._entry, rows))
        return HistoryOverview(
            page=HistoryPage(entries=entries, next_cursor=entries[-1].cursor if len(matches) > limit else None),
            found=len(matches),
            total=total,
            trashed_ids=tuple(row["id"] for row in trashed),
            checkpoints=tuple((name, label) for name, label in checkpoints),
        )

    def find_with_file(self, owner: str, id_: str) -> tuple[HistoryEntry, Path | None] | None:
        """Return `owner`'s picture `id_` and its file (None if that is gone); None if there is no such picture."""
        with self._read_transaction() as connection:
            rows = _select_rows(connection, owner, [id_], ENTRY_COLUMNS)
        return (self._entry(rows[0]), self._file(rows[0])) if rows else None

    def find(self, owner: str, ids: Iterable[str]) -> list[HistoryEntry]:
        """Return those of `ids` that are `owner`'s pictures, in that order."""
        with self._read_transaction() as connection:
            return [self._entry(row) for row in _select_rows(connection, owner, ids, ENTRY_COLUMNS)]

    def details(self, owner: str, id_: str) -> PictureDetails | None:
        """Return everything known about `owner`'s picture `id_`; None if there is no such picture."""
        with self._read_transaction() as connection:
            rows = _select_rows(connection, owner, [id_], f"{ENTRY_COLUMNS}, sha256")
            if not rows:
                return None
            (record_json,) = connection.execute(
                "SELECT record FROM history_records WHERE picture = ?", (id_,)
            ).fetchone()
            sources = [
                ReferenceOrigin(sha256=sha256, entry=self._by_hash(connection, owner, sha256))
                for (sha256,) in connection.execute(
                    "SELECT sha256 FROM history_sources WHERE picture = ? ORDER BY place", (id_,)
                ).fetchall()
            ]
            derived = connection.execute(
                f"SELECT {ENTRY_COLUMNS} FROM history_pictures WHERE owner = ? AND deleted IS NULL AND id IN "
                "(SELECT picture FROM history_sources WHERE sha256 = ?) ORDER BY created DESC, id DESC LIMIT ?",
                (owner, rows[0]["sha256"], MAX_PICTURES_PER_CALL),
            ).fetchall()
        try:
            record = record_from_json(record_json)
        except RequestError:  # written by a later version of the studio: show the rest
            record = None
        return PictureDetails(
            entry=self._entry(rows[0]),
            record=record,
            made_from=tuple(sources),
            made_into=tuple(map(self._entry, derived)),
        )

    def find_file(self, owner: str, id_: str) -> Path | None:
        """Return the file of `owner`'s picture `id_`; None if there is no such picture or its file is gone."""
        with self._read_transaction() as connection:
            rows = _select_rows(connection, owner, [id_], "id, path")
        return self._file(rows[0]) if rows else None

    def find_file_by_hash(self, owner: str, sha256: str) -> Path | None:
        """Return the file of a picture of `owner` with this SHA-256, if its file still has that hash; else None."""
        with self._read_transaction() as connection:
            rows = connection.execute(
                "SELECT id, path FROM history_pictures WHERE owner = ? AND sha256 = ? AND deleted IS NULL "
                "ORDER BY created",
                (owner, sha256),
            ).fetchall()
        for path in filter(None, map(self._file, rows)):
            with suppress(OSError):
                if hash_file(path) == sha256:
                    return path
        return None

    def set_favourite(self, owner: str, ids: Iterable[str], on: bool) -> int:
        """Set or clear the favourite mark of `owner`'s pictures `ids`. Returns how many exist."""
        with self._write_transaction() as connection:
            known = [row["id"] for row in _select_rows(connection, owner, ids, "id")]
            connection.executemany(
                "UPDATE history_pictures SET favourite = ? WHERE id = ?", [(int(on), id_) for id_ in known]
            )
        return len(known)

    def delete(self, owner: str, ids: Iterable[str]) -> list[str]:
        """Hide `owner`'s pictures `ids` at once, and move their files to the trash. Returns the ids that existed."""
        with self._write_transaction() as connection:
            rows = _select_rows(connection, owner, ids, "id, path")
            connection.executemany(
                "UPDATE history_pictures SET deleted = ? WHERE id = ?", [(self._moment(), row["id"]) for row in rows]
            )
        for row in rows:
            self._move(self._outputs / row["path"], self._trashed(row))
            self._forget(row["id"])
        return [row["id"] for row in rows]

    def restore(self, owner: str, ids: Iterable[str]) -> list[str]:
        """Undo `delete`. Returns the ids of the restored pictures."""
        with self._write_transaction() as connection:
            rows = _select_rows(connection, owner, ids, "id, path", deleted=True)
            for row in rows:
                self._move(self._trashed(row), self._outputs / row["path"])
            connection.executemany(
                "UPDATE history_pictures SET deleted = NULL WHERE id = ?", [(row["id"],) for row in rows]
            )
        return [row["id"] for row in rows]

    def empty_trash(self, owner: str) -> int:
        """Remove the deleted pictures of `owner` for good. Returns how many. Raises `SaveError` if some files cannot be
        removed, after removing all others."""
        removed, stuck = self._remove("owner = ?", owner)
        if stuck:
            raise SaveError(
                f"{stuck} of the deleted pictures cannot be removed from {self._trash.name}: allow writing there, or "
                f"remove them yourself."
            )
        return removed

    def purge(self) -> int:
        """Remove pictures for good that were deleted more than `TRASH_SECONDS` ago. Returns how many. Files that cannot
        be removed are tried again the next time."""
        latest = self._moment() - TRASH_SECONDS * 10**6
        with self._read_transaction() as connection:  # does not wait for writers; usually there is nothing to do
            due = connection.execute("SELECT 1 FROM history_pictures WHERE deleted < ? LIMIT 1", (latest,)).fetchone()
        return self._remove("deleted < ?", latest)[0] if due else 0

    def _remove(self, where: str, value: str | int) -> tuple[int, int]:
        """Return how many deleted pictures were removed, and how many could not be."""
        with self._write_transaction() as connection:
            rows = connection.execute(
                f"SELECT id, path FROM history_pictures WHERE deleted IS NOT NULL AND {where}", (value,)
            ).fetchall()
            removed = []
            for row in rows:
                with suppress(OSError):
                    for place in (self._trashed(row), self._outputs / row["path"]):
                        place.unlink(missing_ok=True)
                    removed.append((row["id"],))
            for table, column in (("sources", "picture"), ("records", "picture"), ("pictures", "id")):
                connection.executemany(f"DELETE FROM history_{table} WHERE {column} = ?", removed)
        return len(removed), len(rows) - len(removed)

    def _move(self, here: Path, there: Path) -> None:
        """Move a file that may be gone; across drives it stays. Raises `SaveError` if it cannot be moved."""
        try:
            there.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # pictures without a file can be deleted and restored too
                here.replace(there)
        except OSError as error:
            if error.errno == errno.EXDEV:  # files are looked up, and removed, in both places
                return
            raise SaveError(
                f"{here.name} cannot be moved to {there.parent} ({error.strerror or error}): allow writing there."
            ) from error

    def _trashed(self, row: Row) -> Path:
        return self._trash / f"{row['id']}{Path(row['path']).suffix}"

    def _file(self, row: Row) -> Path | None:
        return next((path for path in (self._outputs / row["path"], self._trashed(row)) if path.is_file()), None)

    def _entry(self, row: Row) -> HistoryEntry:
        values = {name: row[name] for name in ENTRY_COLUMNS.split(", ") if name not in ("path", "favourite")}
        return HistoryEntry(
            **values,
            favourite=bool(row["favourite"]),
            suffix=Path(row["path"]).suffix,
            missing=self._file(row) is None,
        )

    def _by_hash(self, connection: Connection, owner: str, sha256: str) -> HistoryEntry | None:
        row = connection.execute(
            f"SELECT {ENTRY_COLUMNS} FROM history_pictures WHERE owner = ? AND sha256 = ? AND deleted IS NULL "
            "ORDER BY created LIMIT 1",
            (owner, sha256),
        ).fetchone()
        return self._entry(row) if row else None

    def _moment(self) -> int:
        return int(self._now() * 10**6)

    @contextmanager
    def _write_transaction(self) -> Iterator[Connection]:
        with self._database.transaction() as connection:
            for table in TABLES if not self._tables_created.is_set() else ():
                connection.execute(table)
            yield connection
        self._tables_created.set()

    @contextmanager
    def _read_transaction(self) -> Iterator[Connection]:
        if not self._tables_created.is_set():
            with self._write_transaction():
                pass  # creates the tables
        with self._database.read_transaction() as connection:
            yield connection


def _where_clause(owner: str, search: HistorySearch) -> tuple[str, list[str | int]]:
    """Return the WHERE clause of a search, and its values."""
    where, values = ["owner = ?", "deleted IS NULL"], [owner]
    parameters: list[str | int] = list(values)
    for word in fold_for_search(search.words).split()[:MAX_WORDS]:
        where.append("instr(folded, ?) > 0")  # unlike LIKE, it has no wildcard characters
        parameters.append(word)
    for condition, value in (
        ("checkpoint = ?", search.checkpoint or None),
        ("created >= ?", search.since),
        ("created < ?", search.until),
    ):
        if value is not None:
            where.append(condition)
            parameters.append(value)
    if search.favourites:
        where.append("favourite = 1")
    return " AND ".join(where), parameters


def _select_rows(
    connection: Connection, owner: str, ids: Iterable[str], columns: str, *, deleted: bool = False
) -> list[Row]:
    """Return `owner`'s pictures with these untrusted `ids`, in that order and without duplicates."""
    valid_ids: Sequence[str] = [id_ for id_ in dict.fromkeys(ids) if _ID.fullmatch(id_)]
    state = "IS NOT NULL" if deleted else "IS NULL"
    query = f"SELECT {columns} FROM history_pictures WHERE id = ? AND owner = ? AND deleted {state}"
    rows = [connection.execute(query, (id_, owner)).fetchone() for id_ in valid_ids]
    return [row for row in rows if row is not None]
