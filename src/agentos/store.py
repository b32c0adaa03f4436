"""Records of actors, which outlive the process: one SQLite file, one row for each actor.

Every method is one short transaction and returns in well under a millisecond, so that the event loop calls
it directly. The journal is a write-ahead log: after kill -9 at any moment, each row is as some call left it.
A row is written before the actor's files are made and removed after they are gone, so that nothing on disk is
without a record.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agentos.wire.keys import Key, deserialize_key, serialize_key

_SCHEMA: Final = """
create table if not exists actors (
    actor_id text primary key,
    namespace text not null,
    name text not null,
    key text not null,
    pool text not null,
    region text not null,
    crash_policy text not null,
    input blob,
    create_ts integer not null,
    start_ts integer,
    sleep_ts integer,
    destroy_ts integer,
    boots integer not null default 0
) without rowid;
create unique index if not exists actors_by_key
    on actors (namespace, name, key) where destroy_ts is null;
"""
_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class ActorRecord:
    """What is known of an actor whether or not its VM runs. Times are milliseconds since the epoch."""

    actor_id: str
    namespace: str
    name: str
    key: Key
    pool: str
    region: str
    crash_policy: str
    input: bytes | None
    """What it was created with, as CBOR."""
    create_ts: int
    start_ts: int | None = None
    """Its latest boot; None until the first one has succeeded, seed files included."""
    sleep_ts: int | None = None
    destroy_ts: int | None = None
    boots: int = 0


_COLUMNS: Final = tuple(ActorRecord.__dataclass_fields__)
_SELECT: Final = f"select {', '.join(_COLUMNS)} from actors"
_INSERT: Final = f"insert into actors ({', '.join(_COLUMNS)}) values ({', '.join('?' * len(_COLUMNS))})"


def now_ms() -> int:
    """The time, as records have it."""
    return time.time_ns() // 1_000_000


class Store:
    """The records in the file `path`; in memory where it is None. Belongs to one thread."""

    def __init__(self, path: Path | None) -> None:
        self._db = sqlite3.connect(path or ":memory:", isolation_level=None)
        if path is not None:
            os.chmod(path, 0o600)  # creation input may hold secrets
        self._db.execute("pragma journal_mode = wal")
        # A process that is killed loses nothing; only a power failure may cost the newest transactions.
        self._db.execute("pragma synchronous = normal")
        version = self._db.execute("pragma user_version").fetchone()[0]
        if version > _VERSION:
            self._db.close()
            raise ValueError(f"{path} was written by a newer version of agentos (schema {version})")
        self._db.executescript(_SCHEMA)
        self._db.execute(f"pragma user_version = {_VERSION}")

    def close(self) -> None:
        """Let go of the file."""
        self._db.close()

    def add(self, record: ActorRecord) -> None:
        """Add a new actor. There must be none of its key that is not destroyed."""
        self._db.execute(_INSERT, [_stored(name, getattr(record, name)) for name in _COLUMNS])

    def by_key(self, namespace: str, name: str, key: Key) -> ActorRecord | None:
        """The actor of this key, unless it is destroyed."""
        return self._one(
            "namespace = ? and name = ? and key = ? and destroy_ts is null",
            (namespace, name, serialize_key(key)),
        )

    def by_id(self, actor_id: str) -> ActorRecord | None:
        """The actor of this id, unless it is destroyed."""
        return self._one("actor_id = ? and destroy_ts is null", (actor_id,))

    def find(
        self, namespace: str | None = None, name: str | None = None, *, after: str = "", most: int = 100
    ) -> list[ActorRecord]:
        """Actors that are not destroyed, in order of their ids, those after id `after`."""
        where, values = "destroy_ts is null and actor_id > ?", [after]
        for column, value in (("namespace", namespace), ("name", name)):
            if value is not None:
                where += f" and {column} = ?"
                values.append(value)
        return self._all(f"{where} order by actor_id limit {int(most)}", values)

    def destroyed(self) -> list[ActorRecord]:
        """Actors whose destruction began, and was not finished."""
        return self._all("destroy_ts is not null", ())

    def count(self) -> int:
        """How many actors there are."""
        row = self._db.execute("select count(*) from actors where destroy_ts is null").fetchone()
        return int(row[0])

    def started(self, record: ActorRecord) -> ActorRecord:
        """Its VM has booted."""
        return self._update(record, start_ts=now_ms(), sleep_ts=None, boots=record.boots + 1)

    def slept(self, record: ActorRecord) -> ActorRecord:
        """Its VM was put to sleep."""
        return self._update(record, sleep_ts=now_ms())

    def destroying(self, record: ActorRecord) -> ActorRecord:
        """Its destruction begins: from now on nobody finds it, and its key is free."""
        return self._update(record, destroy_ts=now_ms())

    def remove(self, actor_id: str) -> None:
        """Nothing is left of it."""
        self._db.execute("delete from actors where actor_id = ?", (actor_id,))

    def _update(self, record: ActorRecord, **changes: Any) -> ActorRecord:
        columns = ", ".join(f"{name} = ?" for name in changes)
        self._db.execute(
            f"update actors set {columns} where actor_id = ?", (*changes.values(), record.actor_id)
        )
        return replace(record, **changes)

    def _one(self, where: str, values: Iterable[Any]) -> ActorRecord | None:
        return next(iter(self._all(where, values)), None)

    def _all(self, where: str, values: Iterable[Any]) -> list[ActorRecord]:
        rows = self._db.execute(f"{_SELECT} where {where}", tuple(values)).fetchall()
        return [_record(row) for row in rows]


def _stored(name: str, value: Any) -> Any:
    return serialize_key(value) if name == "key" else value


def _record(row: tuple[Any, ...]) -> ActorRecord:
    values = dict(zip(_COLUMNS, row, strict=True))
    values["key"] = deserialize_key(values["key"])
    return ActorRecord(**values)
