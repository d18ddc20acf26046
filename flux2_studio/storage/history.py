"""History: everything that somebody has made, newest first, findable by its words, and nothing of it ever lost.

A row for each saved picture, with all that is known of its making, kept in the studio's notebook (`database.py`). Only
its owner ever gets anything: each question names the owner, and a foreign id is answered like one that does not exist.

Deleting hides a picture at once and moves its file to the trash; a day later, or when the trash is emptied, it is
really gone, and until then undo brings back all of it. The row is marked before the file is moved, and a file is looked
for in both places: whenever the process dies in between, the picture is still there.

What a picture was made from is found by hash: its record names its references so.
"""

from __future__ import annotations

import errno
import hashlib
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
from flux2_studio.provenance.metadata import record_from_json, record_to_dict
from flux2_studio.record import Record
from flux2_studio.storage.database import Database

TRASH_SECONDS = 24 * 3600  # seconds that the trash keeps a picture
DEFAULT_PAGE_SIZE = 60  # pictures of a page, unless asked otherwise
MAX_PICTURES_PER_CALL = 200  # pictures of a page, or of one change
MAX_WORDS = 32  # of a search; more narrow nothing down
_ID = re.compile(r"[0-9a-f]{32}")

TABLES = (
    # The times are microseconds since 1970. `folded` is what a search looks through.
    """CREATE TABLE IF NOT EXISTS history_pictures (
        id TEXT PRIMARY KEY, owner TEXT NOT NULL, job TEXT NOT NULL, path TEXT NOT NULL, created INTEGER NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, seed INTEGER NOT NULL, checkpoint TEXT NOT NULL,
        label TEXT NOT NULL, prompt TEXT NOT NULL, folded TEXT NOT NULL, sha256 TEXT NOT NULL,
        favourite INTEGER NOT NULL DEFAULT 0, deleted INTEGER)""",
    # Apart, for a search goes through all the rows above.
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
        """Where the next page begins: behind this picture."""
        return f"{self.created}.{self.id}"


@dataclass(frozen=True, kw_only=True)
class ReferenceOrigin:
    """A reference that a picture was made from: its hash, and the picture of the same owner that it is, if it is."""

    sha256: str
    entry: HistoryEntry | None


@dataclass(frozen=True, kw_only=True)
class PictureDetails:
    """All that is known of one picture. record: None where what was written is not understood by this version."""

    entry: HistoryEntry
    record: Record | None
    made_from: tuple[ReferenceOrigin, ...]
    made_into: tuple[HistoryEntry, ...]  # newest first


@dataclass(frozen=True, kw_only=True)
class HistorySearch:
    """What to look for: all of `words` anywhere in the prompt, and what else is given. Times as `HistoryEntry.created`,
    from `since` to before `until`."""

    words: str = ""
    checkpoint: str = ""
    since: int | None = None
    until: int | None = None
    favourites: bool = False


@dataclass(frozen=True, kw_only=True)
class HistoryPage:
    """Some of what was found, and the cursor for more: None at the end."""

    entries: tuple[HistoryEntry, ...]
    next_cursor: str | None


@dataclass(frozen=True, kw_only=True)
class HistoryOverview:
    """What the history shows when it is opened, or searched anew: the first page, how many pictures were found and how
    many there are, the ids of those in the trash (last deleted first, as many as can be brought back at once), and the
    (name, label) of every checkpoint that there are pictures of."""

    page: HistoryPage
    found: int
    total: int
    trashed_ids: tuple[str, ...]
    checkpoints: tuple[tuple[str, str], ...]


def fold_for_search(text: str) -> str:
    """`text` as it is searched: the same for upper and lower case, and for the several spellings of one character."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())


class History:
    """The pictures below `outputs`, by owner. Deleted files wait in `trash`; `on_delete` is told the id of each picture
    that is deleted.

    now: seconds since 1970. Safe to use from any thread and several processes. Every method raises `SaveError` where
    the notebook cannot be used.
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
        self._tables_created = threading.Event()  # the tables

    def add(self, owner: str, job: str, saved: Saved) -> str:
        """Remember the picture of `saved`, made by `owner`'s job. Returns its id. Raises `SaveError` where that cannot
        be done; the file is there all the same."""
        record, request = saved.record, saved.record.request
        try:
            path = saved.image.resolve().relative_to(self._outputs.resolve()).as_posix()
            sha256 = hashlib.sha256(saved.image.read_bytes()).hexdigest()
        except (OSError, ValueError) as error:
            raise SaveError(
                f"The picture {saved.image.name} is not in the folder of pictures any more ({error}): look there "
                f"before you make it again."
            ) from error
        searched = "\n".join(filter(None, (request.prompt, record.original_prompt)))
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
                    fold_for_search(searched),
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
        """The newest `limit` pictures that `search` finds, of those behind the cursor `before`. Raises `RequestError`
        for a cursor that was never given."""
        where, values = _condition(owner, search or HistorySearch())
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
        """What is shown first: all of it as it was at one moment."""
        where, values = _condition(owner, search or HistorySearch())
        limit = max(1, min(MAX_PICTURES_PER_CALL, limit))
        with self._read_transaction() as connection:
            # One pass gives the page and the count.
            found = connection.execute(
                f"SELECT id FROM history_pictures WHERE {where} ORDER BY created DESC, id DESC", values
            ).fetchall()
            rows = _rows(connection, owner, [row["id"] for row in found[:limit]], ENTRY_COLUMNS)
            (everything,) = connection.execute(
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
            page=HistoryPage(entries=entries, next_cursor=entries[-1].cursor if len(found) > limit else None),
            found=len(found),
            total=everything,
            trashed_ids=tuple(row["id"] for row in trashed),
            checkpoints=tuple((name, label) for name, label in checkpoints),
        )

    def find_with_file(self, owner: str, id_: str) -> tuple[HistoryEntry, Path | None] | None:
        """`owner`'s picture `id_` and its file, None where that is gone; None where there is no such picture."""
        with self._read_transaction() as connection:
            rows = _rows(connection, owner, [id_], ENTRY_COLUMNS)
        return (self._entry(rows[0]), self._file(rows[0])) if rows else None

    def find(self, owner: str, ids: Iterable[str]) -> list[HistoryEntry]:
        """Those of `ids` that are `owner`'s pictures, in that order."""
        with self._read_transaction() as connection:
            return [self._entry(row) for row in _rows(connection, owner, ids, ENTRY_COLUMNS)]

    def details(self, owner: str, id_: str) -> PictureDetails | None:
        """All that is known of `owner`'s picture `id_`; None where there is none."""
        with self._read_transaction() as connection:
            rows = _rows(connection, owner, [id_], f"{ENTRY_COLUMNS}, sha256")
            if not rows:
                return None
            (written,) = connection.execute("SELECT record FROM history_records WHERE picture = ?", (id_,)).fetchone()
            sources = [
                ReferenceOrigin(sha256=sha256, entry=self._by_hash(connection, owner, sha256))
                for (sha256,) in connection.execute(
                    "SELECT sha256 FROM history_sources WHERE picture = ? ORDER BY place", (id_,)
                ).fetchall()
            ]
            made = connection.execute(
                f"SELECT {ENTRY_COLUMNS} FROM history_pictures WHERE owner = ? AND deleted IS NULL AND id IN "
                "(SELECT picture FROM history_sources WHERE sha256 = ?) ORDER BY created DESC, id DESC LIMIT ?",
                (owner, rows[0]["sha256"], MAX_PICTURES_PER_CALL),
            ).fetchall()
        try:
            record = record_from_json(written)
        except RequestError:  # written by a later version: the rest is shown all the same
            record = None
        return PictureDetails(
            entry=self._entry(rows[0]),
            record=record,
            made_from=tuple(sources),
            made_into=tuple(map(self._entry, made)),
        )

    def find_file(self, owner: str, id_: str) -> Path | None:
        """The file of `owner`'s picture `id_`; None where there is no such picture, or its file is gone."""
        with self._read_transaction() as connection:
            rows = _rows(connection, owner, [id_], "id, path")
        return self._file(rows[0]) if rows else None

    def find_file_by_hash(self, owner: str, sha256: str) -> Path | None:
        """The file of a picture of `owner`'s that had this SHA-256 when it was saved, if it still has."""
        with self._read_transaction() as connection:
            rows = connection.execute(
                "SELECT id, path FROM history_pictures WHERE owner = ? AND sha256 = ? AND deleted IS NULL "
                "ORDER BY created",
                (owner, sha256),
            ).fetchall()
        for path in filter(None, map(self._file, rows)):
            with suppress(OSError):
                if hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
                    return path
        return None

    def set_favourite(self, owner: str, ids: Iterable[str], on: bool) -> int:
        """Make `owner`'s pictures `ids` favourites, or no longer. Returns how many there are of them."""
        with self._write_transaction() as connection:
            known = [row["id"] for row in _rows(connection, owner, ids, "id")]
            connection.executemany(
                "UPDATE history_pictures SET favourite = ? WHERE id = ?", [(int(on), id_) for id_ in known]
            )
        return len(known)

    def delete(self, owner: str, ids: Iterable[str]) -> list[str]:
        """Hide `owner`'s pictures `ids` at once, and put their files into the trash. Returns the ids of those there
        were."""
        with self._write_transaction() as connection:
            rows = _rows(connection, owner, ids, "id, path")
            connection.executemany(
                "UPDATE history_pictures SET deleted = ? WHERE id = ?", [(self._moment(), row["id"]) for row in rows]
            )
        for row in rows:
            self._move(self._outputs / row["path"], self._trashed(row))
            self._forget(row["id"])
        return [row["id"] for row in rows]

    def restore(self, owner: str, ids: Iterable[str]) -> list[str]:
        """Undo `delete`. Returns the ids of the pictures that are back."""
        with self._write_transaction() as connection:
            rows = _rows(connection, owner, ids, "id, path", deleted=True)
            for row in rows:
                self._move(self._trashed(row), self._outputs / row["path"])
            connection.executemany(
                "UPDATE history_pictures SET deleted = NULL WHERE id = ?", [(row["id"],) for row in rows]
            )
        return [row["id"] for row in rows]

    def empty_trash(self, owner: str) -> int:
        """Really remove what `owner` has deleted. Returns how many pictures that were. Raises `SaveError` where some
        files cannot be removed, once all others are."""
        removed, stuck = self._remove("owner = ?", owner)
        if stuck:
            raise SaveError(
                f"{stuck} of the deleted pictures cannot be removed from {self._trash.name}: allow writing there, or "
                f"remove them yourself."
            )
        return removed

    def purge(self) -> int:
        """Really remove what was deleted more than a day ago. Returns how many pictures that were; a file that cannot
        be removed is tried again the next time."""
        latest = self._moment() - TRASH_SECONDS * 10**6
        with self._read_transaction() as connection:  # which waits for nobody: usually there is nothing to do
            due = connection.execute("SELECT 1 FROM history_pictures WHERE deleted < ? LIMIT 1", (latest,)).fetchone()
        return self._remove("deleted < ?", latest)[0] if due else 0

    def _remove(self, where: str, value: str | int) -> tuple[int, int]:
        """How many deleted pictures were removed, and how many could not be."""
        with self._write_transaction() as connection:
            rows = connection.execute(
                f"SELECT id, path FROM history_pictures WHERE deleted IS NOT NULL AND {where}", (value,)
            ).fetchall()
            gone = []
            for row in rows:
                with suppress(OSError):
                    for place in (self._trashed(row), self._outputs / row["path"]):
                        place.unlink(missing_ok=True)
                    gone.append((row["id"],))
            for table, column in (("sources", "picture"), ("records", "picture"), ("pictures", "id")):
                connection.executemany(f"DELETE FROM history_{table} WHERE {column} = ?", gone)
        return len(gone), len(rows) - len(gone)

    def _move(self, here: Path, there: Path) -> None:
        """Move a file that may be gone; one on another drive stays. Raises `SaveError` where it cannot be moved."""
        try:
            there.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):  # a picture whose file is gone can be deleted, and come back as it was
                here.replace(there)
        except OSError as error:
            if error.errno == errno.EXDEV:  # it is looked for, and removed, in both places
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
                pass  # makes the tables
        with self._database.read_transaction() as connection:
            yield connection


def _condition(owner: str, search: HistorySearch) -> tuple[str, list[str | int]]:
    """The part of a query behind WHERE, and its values."""
    where, values = ["owner = ?", "deleted IS NULL"], [owner]
    found: list[str | int] = list(values)
    for word in fold_for_search(search.words).split()[:MAX_WORDS]:
        where.append("instr(folded, ?) > 0")  # unlike LIKE it takes every character for itself
        found.append(word)
    for condition, value in (
        ("checkpoint = ?", search.checkpoint or None),
        ("created >= ?", search.since),
        ("created < ?", search.until),
    ):
        if value is not None:
            where.append(condition)
            found.append(value)
    if search.favourites:
        where.append("favourite = 1")
    return " AND ".join(where), found


def _rows(connection: Connection, owner: str, ids: Iterable[str], columns: str, *, deleted: bool = False) -> list[Row]:
    """`owner`'s pictures with these `ids`, which come from anywhere, in that order and each once."""
    wanted: Sequence[str] = [id_ for id_ in dict.fromkeys(ids) if _ID.fullmatch(id_)]
    state = "IS NOT NULL" if deleted else "IS NULL"
    query = f"SELECT {columns} FROM history_pictures WHERE id = ? AND owner = ? AND deleted {state}"
    found = [connection.execute(query, (id_, owner)).fetchone() for id_ in wanted]
    return [row for row in found if row is not None]
