"""The studio's database: one SQLite file for jobs, history and other persistent data.

Write-ahead logging lets the page read while a run writes. Committed data survives a killed process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flux2_studio.errors import SaveError

BUSY_TIMEOUT_SECONDS = 10.0  # to wait for another writer


class Database:
    """The SQLite file at `path`, created at first use. Safe to use from any thread and several processes.

    Each user of the database creates its own tables, with `CREATE TABLE IF NOT EXISTS` in its first transaction.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a connection whose changes are committed at the end, or rolled back after an error.

        Rows can be read by column name. Raises `SaveError` if the file cannot be used.
        """
        try:
            with self._opened() as connection:
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
                connection.execute("COMMIT")
        except (sqlite3.DatabaseError, OSError) as error:
            raise SaveError(
                f"The studio's notebook {self.path} cannot be used ({error}): allow writing there and free some space, "
                f"or move the file away to begin a new one."
            ) from error

    @contextmanager
    def read_transaction(self) -> Iterator[sqlite3.Connection]:
        """Open a read-only connection with a consistent snapshot that does not wait for writers. Raises as
        `transaction` does."""
        try:
            with self._opened() as connection:
                connection.execute("PRAGMA query_only = ON")
                connection.execute("BEGIN")
                yield connection
        except (sqlite3.DatabaseError, OSError) as error:
            raise SaveError(
                f"The studio's notebook {self.path} cannot be read ({error}): check the file, or move it away to begin "
                f"a new one."
            ) from error

    @contextmanager
    def _opened(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        # A connection per transaction: opening takes 0.1 ms, and threads do not wait for each other.
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            yield connection


def acquire_file_lock(path: Path) -> sqlite3.Connection | None:
    """Lock the file at `path` until the connection is closed or the process ends; return None if it is locked already.

    Raises `sqlite3.Error` if the file cannot be created.
    """
    connection = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("BEGIN EXCLUSIVE")
    except sqlite3.OperationalError as error:
        connection.close()
        if error.sqlite_errorcode == sqlite3.SQLITE_BUSY:
            return None
        raise
    return connection
