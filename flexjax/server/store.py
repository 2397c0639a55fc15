"""Store: what the service must not forget, in one SQLite file: files, jobs, their events and checkpoints, adapters.

What a call has written when it returns survives the death of the process. It knows nothing of what the rows mean.
"""

import json
import secrets
import sqlite3
import string
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexjax.fields import ConfigError

SCHEMA = """
CREATE TABLE files (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created INTEGER NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, bytes INTEGER NOT NULL, rows INTEGER NOT NULL);
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created INTEGER NOT NULL, name TEXT UNIQUE NOT NULL,
    request TEXT NOT NULL, status TEXT NOT NULL, error TEXT, finished INTEGER, result_file TEXT,
    trained_tokens INTEGER NOT NULL);
CREATE TABLE events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created INTEGER NOT NULL, job TEXT NOT NULL,
    key TEXT NOT NULL, level TEXT NOT NULL, message TEXT NOT NULL, type TEXT NOT NULL, data TEXT NOT NULL,
    UNIQUE (job, key));
CREATE TABLE checkpoints (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created INTEGER NOT NULL, job TEXT NOT NULL,
    name TEXT UNIQUE NOT NULL, step INTEGER NOT NULL, metrics TEXT NOT NULL, UNIQUE (job, step));
"""

MIGRATIONS = (
    """
ALTER TABLE files ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE jobs ADD COLUMN deleted INTEGER;
""",
    """
CREATE TABLE adapters (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT UNIQUE NOT NULL, created INTEGER NOT NULL, owner TEXT NOT NULL,
    name TEXT NOT NULL, path TEXT NOT NULL, folder TEXT NOT NULL, fingerprint TEXT NOT NULL, UNIQUE (owner, name));
""",
)
"""What makes the tables of each version those of the next; SCHEMA is the first. What was kept before there were owners
belongs to the operator. ``deleted`` is when a job's model was. Of an adapter, ``path`` is where a client said that it
is, and ``folder`` where in the owner's part of adapter_dir it was found."""

VERSION = 1 + len(MIGRATIONS)
"""Of the tables; a file of a newer one is refused."""

LETTERS = string.ascii_letters + string.digits
JSON_COLUMNS = ("request", "data", "metrics")


def new_id(kind: str) -> str:
    """An identifier as OpenAI's look: "file-...", "ftjob-...", "ftevent-...", "ftckpt-..."."""
    return f"{kind}-{''.join(secrets.choice(LETTERS) for _ in range(24))}"


class Store:
    """One connection, which any thread may use.

    Args:
        path: of the database; made if it does not exist.

    Raises:
        ConfigError: the file cannot be used: it is torn, of another version, or no database.
    """

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = FULL")  # a commit is on the disk when it returns
            self._prepare(path)
        except sqlite3.DatabaseError as error:
            raise ConfigError(f"{path} cannot be used as the database: {error}; move it away, or its folder") from error

    def _prepare(self, path: Path) -> None:
        (found,) = self._connection.execute("PRAGMA user_version").fetchone()
        if not 0 <= found <= VERSION:
            raise ConfigError(
                f"{path} has tables of version {found}, and this program knows those up to {VERSION}; choose another "
                "data_dir, or the program that made it"
            )
        fault = self._connection.execute("PRAGMA quick_check").fetchone()[0]
        if fault != "ok":
            raise ConfigError(f"{path} is torn: {fault}; move it away to start anew")
        steps = "".join((SCHEMA, *MIGRATIONS)[found:])
        if steps:
            self._connection.executescript(f"BEGIN;{steps}PRAGMA user_version = {VERSION};COMMIT;")

    def close(self) -> None:
        with self._lock:
            self._connection.close()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """What is written inside is written together or not at all, and on the disk at the end."""
        with self._lock:
            if self._connection.in_transaction:
                yield  # part of the one around it
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has rolled it back already
                    self._connection.execute("ROLLBACK")
                raise

    def add(self, table: str, **values: Any) -> bool:
        """Insert a row, unless one with a value that must be unique is there already; whether it was inserted."""
        columns, marks = ", ".join(values), ", ".join("?" * len(values))
        with self._lock:
            text = f"INSERT INTO {table} ({columns}) VALUES ({marks}) ON CONFLICT DO NOTHING"
            return self._connection.execute(text, [written(each) for each in values.values()]).rowcount == 1

    def change(self, table: str, identifier: str, **values: Any) -> None:
        settings = ", ".join(f"{name} = ?" for name in values)
        with self._lock:
            text = f"UPDATE {table} SET {settings} WHERE id = ?"
            self._connection.execute(text, [*map(written, values.values()), identifier])

    def remove(self, table: str, identifier: str) -> bool:
        """Whether there was such a row."""
        with self._lock:
            return self._connection.execute(f"DELETE FROM {table} WHERE id = ?", [identifier]).rowcount == 1

    def find(self, table: str, **where: Any) -> dict[str, Any] | None:
        """The first row with these values."""
        return next(iter(self.rows(table, where, limit=1)), None)

    def rows(
        self,
        table: str,
        where: Mapping[str, Any],
        *,
        limit: int | None = None,
        newest_first: bool = False,
        beyond: int | None = None,
    ) -> list[dict[str, Any]]:
        """Rows with these values, in the order in which they were added or the reverse.

        Args:
            beyond: ``seq`` of the last row that is not wanted.
        """
        order, side = ("DESC", "<") if newest_first else ("ASC", ">")
        conditions, values = [f"{name} = ?" for name in where], list(where.values())
        if beyond is not None:
            conditions, values = [*conditions, f"seq {side} ?"], [*values, beyond]
        clause = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        text = f"SELECT * FROM {table} {clause} ORDER BY seq {order} LIMIT ?"
        with self._lock:
            return [read(row) for row in self._connection.execute(text, [*values, -1 if limit is None else limit])]

    def count(self, table: str, by: str, **where: Any) -> dict[str, int]:
        """Rows with these values, for each value of a column."""
        text = f"SELECT {by}, COUNT(*) FROM {table} {condition(where)} GROUP BY {by}"
        with self._lock:
            return dict(map(tuple, self._connection.execute(text, [*where.values()])))

    def total(self, table: str, column: str, **where: Any) -> int:
        """Sum of a column over the rows with these values."""
        text = f"SELECT COALESCE(SUM({column}), 0) FROM {table} {condition(where)}"
        with self._lock:
            return self._connection.execute(text, [*where.values()]).fetchone()[0]


def condition(where: Mapping[str, Any]) -> str:
    return f"WHERE {' AND '.join(f'{name} = ?' for name in where)}" if where else ""


def written(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, dict) else value


def read(row: sqlite3.Row) -> dict[str, Any]:
    return {name: json.loads(row[name]) if name in JSON_COLUMNS else row[name] for name in row.keys()}  # noqa: SIM118
