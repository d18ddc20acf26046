"""The studio's own notebook: one SQLite file in which jobs and history are kept.

Write-ahead logging lets the page read while a run writes, and what was committed outlives a killed process.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

from flux2_studio.errors import SaveError

BUSY_TIMEOUT_SECONDS = 10.0  # seconds to wait for another writer


class Database:
    """The file at `path`, made when it is first used. Safe to use from any thread and several processes.

    Whoever keeps something in it makes its own tables, by `CREATE TABLE IF NOT EXISTS` in its first transaction.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are committed at the end, all of them or, after an error, none.

        Rows can be read by column name. Raises `SaveError` where the file cannot be used.
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
        """A connection that only reads, one state of everything, and waits for no writer. Raises as `transaction`."""
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
        # One each: opening takes a tenth of a millisecond, and no thread waits for another's.
        with closing(sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_SECONDS, isolation_level=None)) as connection:
            connection.row_factory = sqlite3.Row
            connection.execute("PRAGMA journal_mode = WAL")
            yield connection


def acquire_file_lock(path: Path) -> sqlite3.Connection | None:
    """A hold on the file at `path` that ends with this process, however it ends; None while somebody else has it.

    Close it to let go. Raises `sqlite3.Error` where there can be no such file.
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
