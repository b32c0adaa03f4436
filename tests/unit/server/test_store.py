"""Records: there and back, free keys, and what a killed process leaves."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from agentos.store import ActorRecord, Store

RECORD = ActorRecord("id1", "default", "vm", ("a", "b/c"), "default", "local", "sleep", b"\xa0", 1000)


def test_records_come_back_as_they_were(tmp_path: Path) -> None:
    """By key and by id, from the same file later."""
    store = Store(tmp_path / "db")
    store.add(RECORD)
    store.close()
    store = Store(tmp_path / "db")
    assert store.by_key("default", "vm", ("a", "b/c")) == RECORD
    assert store.by_id("id1") == RECORD
    assert store.by_key("default", "vm", ("a", "b", "c")) is None
    store.close()


def test_one_actor_for_a_key() -> None:
    """Until it is destroyed: then the key is free, though the record is still there."""
    store = Store(None)
    store.add(RECORD)
    with pytest.raises(sqlite3.IntegrityError):
        store.add(replace(RECORD, actor_id="id2"))
    store.destroying(RECORD)
    store.add(replace(RECORD, actor_id="id2"))
    assert store.by_id("id1") is None
    assert [one.actor_id for one in store.destroyed()] == ["id1"]
    store.remove("id1")
    assert store.destroyed() == []
    assert store.count() == 1
    store.close()


def test_times_of_a_life() -> None:
    """Boots are counted; a running actor has no sleep time."""
    store = Store(None)
    store.add(RECORD)
    started = store.started(store.slept(store.started(RECORD)))
    assert started.boots == 2
    assert started.sleep_ts is None
    assert store.by_id("id1") == started
    store.close()


def test_pages() -> None:
    """In order of id, from where the last page ended."""
    store = Store(None)
    for number in range(5):
        store.add(
            replace(RECORD, actor_id=f"id{number}", key=(str(number),), name="vm" if number else "other")
        )
    assert [one.actor_id for one in store.find("default", "vm", after="id1", most=2)] == ["id2", "id3"]
    assert store.find("elsewhere") == []
    store.close()


def test_a_newer_file_is_left_alone(tmp_path: Path) -> None:
    """An older version must not guess at it."""
    Store(tmp_path / "db").close()
    with sqlite3.connect(tmp_path / "db") as db:
        db.execute("pragma user_version = 99")
    db.close()
    with pytest.raises(ValueError, match="newer"):
        Store(tmp_path / "db")


def test_kill_at_any_moment_leaves_whole_records(tmp_path: Path) -> None:
    """All that was said to be written is there."""
    program = (
        "import sys; from pathlib import Path; from dataclasses import replace; from agentos.store import *\n"
        "store = Store(Path(sys.argv[1]))\n"
        "one = ActorRecord('', 'default', 'vm', (), 'p', 'r', 'c', None, 1)\n"
        "for i in range(10**9):\n"
        "    store.add(replace(one, actor_id=str(i), key=(str(i),))); print(i, flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "db")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 200:
                os.kill(child.pid, signal.SIGKILL)
                break
        last = max([200, *(int(line) for line in child.stdout if line.endswith("\n"))])
    store = Store(tmp_path / "db")
    assert last + 1 <= store.count() <= last + 2
    assert all(store.by_id(str(number)) for number in range(last + 1))
    store.close()
