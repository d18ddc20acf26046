"""The studio's notebook: all of a transaction or none of it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from flux2_studio.errors import SaveError
from flux2_studio.storage.database import Database


@pytest.fixture
def database(tmp_path: Path) -> Database:
    made = Database(tmp_path / "deep" / "studio.sqlite3")
    with made.transaction() as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS words (word TEXT)")
    return made


def words(database: Database) -> list[str]:
    with database.read_transaction() as connection:
        return [row["word"] for row in connection.execute("SELECT word FROM words ORDER BY rowid")]


def test_what_is_committed_stays(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('fox')")
    assert words(Database(database.path)) == ["fox"]


def test_an_error_takes_all_of_it_back(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), database.transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('fox')")
        _ = 1 / 0
    assert words(database) == []


def test_a_reader_waits_for_no_writer_and_sees_one_state(database: Database) -> None:
    with database.read_transaction() as reader, database.transaction() as writer:
        assert reader.execute("SELECT count(*) FROM words").fetchone()[0] == 0
        writer.execute("INSERT INTO words VALUES ('fox')")
        assert reader.execute("SELECT count(*) FROM words").fetchone()[0] == 0


def test_reading_changes_nothing(database: Database) -> None:
    with pytest.raises(SaveError, match="cannot be read"), database.read_transaction() as connection:
        connection.execute("INSERT INTO words VALUES ('fox')")
    assert words(database) == []


def test_a_file_that_is_no_notebook_is_told(tmp_path: Path) -> None:
    (tmp_path / "studio.sqlite3").write_bytes(b"rubbish " * 1000)
    with (
        pytest.raises(SaveError, match="move it away to begin a new one") as told,
        Database(tmp_path / "studio.sqlite3").read_transaction(),
    ):
        pass
    assert isinstance(told.value.__cause__, sqlite3.DatabaseError)
