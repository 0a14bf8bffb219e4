"""What became of every file, in an SQLite file beside the outputs, and the locks of those who write it."""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .rows import Row

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.sqlite"
_COMMIT_SECONDS = 1.0  # between two commits: rows that a killed driver loses are adopted again
_WAIT = 60.0  # seconds for another process that reads or writes
_COLUMNS = ", ".join(Row._fields)
# A journal beside the database, which is SQLite's default, is safe on network folders; its write-ahead log is not.
_SETTINGS = "PRAGMA journal_mode = DELETE; PRAGMA synchronous = FULL;"
_TABLES = {
    "files": f"CREATE TABLE IF NOT EXISTS files ({_COLUMNS}, PRIMARY KEY (name))",
    "identity": "CREATE TABLE IF NOT EXISTS identity (json TEXT)",
}


class Manifest:
    """The rows of a folder of outputs, one for each file that is done or failed. Has one writer.

    ValueError for a file that is no manifest, or one of outputs made in another way; OSError where the disk is full.

    Args:
        path: the SQLite file; made if absent.
        identity: what the outputs depend on, by name; as JSON has it.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._path = path
        self._database = sqlite3.connect(path, timeout=_WAIT)
        self._committed = time.monotonic()
        try:
            with self._failures():
                self._database.executescript(_SETTINGS)
                self._database.execute("BEGIN IMMEDIATE")  # both tables and the identity appear together
                for statement in _TABLES.values():
                    self._database.execute(statement)
                if self._database.execute("SELECT json FROM identity").fetchone() is None:
                    self._database.execute("INSERT INTO identity VALUES (?)", (json.dumps(identity),))
                self._database.commit()
            check_identity(path, identity)
        except BaseException:
            self._database.close()
            raise

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in, in place of those of the same files."""
        marks = ", ".join("?" * len(Row._fields))
        with self._failures():
            self._database.executemany(f"INSERT OR REPLACE INTO files VALUES ({marks})", rows)
            if time.monotonic() > self._committed + _COMMIT_SECONDS:
                self._commit()

    def close(self) -> None:
        """Commit, and close."""
        try:
            with self._failures():
                self._commit()
        finally:
            self._database.close()

    def _commit(self) -> None:
        self._database.commit()
        self._committed = time.monotonic()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        with _said(self._path):
            yield


def read_rows(path: Path) -> list[Row]:
    """All rows of a manifest, sorted by name; none where there is no file."""
    with _reading(path) as database:
        found = () if database is None else database.execute(f"SELECT {_COLUMNS} FROM files ORDER BY name")
        return [Row(*values) for values in found]


def check_identity(path: Path, identity: Mapping[str, Any]) -> None:
    """ValueError where a manifest is of outputs that were made in another way; none is right."""
    with _reading(path) as database:
        found = None if database is None else database.execute("SELECT json FROM identity").fetchone()
    if found is None:
        return
    known, wanted = json.loads(found[0]), json.loads(json.dumps(identity))
    names = [name for name in {**known, **wanted} if known.get(name) != wanted.get(name)]
    if names:
        then, now = (", ".join(f"{name} {values.get(name)!r}" for name in names) for values in (known, wanted))
        raise ValueError(
            f"the outputs beside {path} were made with {then}, and not with {now}: ask for the same again, or name "
            "another folder"
        )


@contextlib.contextmanager
def locked(path: Path, *, shared: bool = False, wait: bool = False) -> Iterator[None]:
    """Hold a lock on a file, which is made if absent; ValueError where another process holds it.

    It ends with the process, however that ends, and is seen from other machines where the folder's file system has
    locks.

    shared: others may hold it too, if they share it. wait: until it is free, in place of the ValueError.
    """
    with path.open("a+") as file:
        if fcntl is not None:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            try:
                fcntl.flock(file, kind if wait else kind | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ValueError(f"another process works in {path.parent.parent}; wait until it has ended") from error
            except OSError:  # a file system without locks
                pass
        yield


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[sqlite3.Connection | None]:
    """A manifest that is only read; None where there is none, also where a process was killed as it made one.

    Another process may delete the file at any moment: it is not made anew. It is opened for writing, so that SQLite can
    undo what a killed writer had begun.
    """
    tables: set[str] = set()
    with _said(path), contextlib.ExitStack() as opened:
        try:
            address = f"{path.absolute().as_uri()}?mode=rw"
            database = opened.enter_context(contextlib.closing(sqlite3.connect(address, uri=True, timeout=_WAIT)))
            database.execute("PRAGMA query_only = ON")
            tables.update(name for (name,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'"))
        except sqlite3.OperationalError:
            if path.exists():
                raise
        known = tables.intersection(_TABLES)
        if tables and not known:
            raise sqlite3.DatabaseError("it has other tables")
        yield database if len(known) == len(_TABLES) else None


@contextlib.contextmanager
def _said(path: Path) -> Iterator[None]:
    """Turn errors of SQLite into those that name the file."""
    try:
        yield
    except sqlite3.OperationalError as error:
        raise OSError(f"cannot use {path}: {error}") from error
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path} is no manifest of purified files ({error}): name another folder") from error
