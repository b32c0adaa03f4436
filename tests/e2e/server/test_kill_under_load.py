"""kill -9 of a server under load, again and again: what was answered is there afterwards, and nothing else is."""

from __future__ import annotations

import contextlib
import glob
import os
import random
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

VMS = int(os.environ.get("AGENTOS_KILL_VMS", "50"))
ROUNDS = int(os.environ.get("AGENTOS_KILL_ROUNDS", "2"))
LOAD_SECONDS = float(os.environ.get("AGENTOS_KILL_SECONDS", "2"))
WORKERS = 8
MARK = "86421"
"""What the programs that run in the VMs sleep for, by which they are found on the host."""


@dataclass
class Ledger:
    """What the server has answered about one key; only one worker ever uses a key."""

    files: dict[str, str] = field(default_factory=dict)
    doubtful: set[str] = field(default_factory=set)
    """Files with a change that was not answered: they may have it or not."""
    exists: bool = False
    """Whether it was made, and not destroyed."""
    destroying: bool = False


@dataclass
class Counts:
    """What was done in all."""

    writes: int = 0
    made: int = 0
    destroyed: int = 0


class Worker(threading.Thread):
    """Writes, makes and destroys, on keys of its own, until the server is gone."""

    def __init__(
        self, server: Any, number: int, ledgers: dict[str, Ledger], counts: Counts, seed: int
    ) -> None:
        super().__init__()
        self.server = server
        self.ledgers = {key: one for key, one in ledgers.items() if int(key[1:]) % WORKERS == number}
        self.all = ledgers
        self.counts = counts
        self.dice = random.Random(seed * 1000 + number)
        self.next_key = number + VMS * 1000 * (seed + 1)
        self.next_key -= (self.next_key - number) % WORKERS
        self.failure: Exception | None = None

    def run(self) -> None:
        """Until the server is gone."""
        with self.server.client() as http:
            try:
                while True:
                    self.step(http)
            except httpx.HTTPError:
                pass  # killed
            except Exception as error:
                self.failure = error

    def step(self, http: httpx.Client) -> None:
        """One action on a random key."""
        key = self.dice.choice(sorted(self.ledgers))
        chance = self.dice.random()
        if chance < 0.1:
            key = f"k{self.next_key}"
            self.next_key += WORKERS
            self.all[key] = self.ledgers[key] = Ledger()
            self.write(http, key, first=True)
            self.counts.made += 1
        elif chance < 0.15 and len(self.ledgers) > VMS // WORKERS:
            ledger = self.ledgers.pop(key)
            ledger.destroying = True
            self.call(http, key, "destroy")
            ledger.exists = False
            self.counts.destroyed += 1
        else:
            self.write(http, key)

    def write(self, http: httpx.Client, key: str, *, first: bool = False) -> None:
        """Replace the content of one of its files, by a program or by an action."""
        ledger = self.ledgers[key]
        name, content = f"f{self.dice.randrange(5)}", f"{self.dice.random()}\n"
        ledger.doubtful.add(name)
        if first or self.dice.random() < 0.5:
            self.call(http, key, "exec", f"printf '{content}' > {name}")
        else:
            self.call(http, key, "writeFile", name, content)
        ledger.exists = True
        ledger.files[name] = content
        ledger.doubtful.discard(name)
        self.counts.writes += 1

    def call(self, http: httpx.Client, key: str, action: str, *args: Any) -> None:
        """An action that is answered, or whose server is gone."""
        answer = http.post(self.server.path(key, f"action/{action}"), json={"args": list(args)})
        assert answer.status_code == 200, (key, action, answer.text)


def test_kill_under_load(start_server: Callable[..., Any]) -> None:
    """Files, records and destructions that were answered hold; no process, mount, device or directory is left over."""
    ledgers: dict[str, Ledger] = {f"k{number}": Ledger() for number in range(VMS)}
    counts = Counts()
    zygotes: list[str] = []
    for round_ in range(ROUNDS):
        server = start_server()
        zygotes += children(server.process.pid)
        check(server, ledgers)
        workers = [Worker(server, number, ledgers, counts, round_) for number in range(WORKERS)]
        if round_ == 0:
            for key in list(ledgers)[:10]:
                server.call(key, "spawn", "sleep", [MARK])
                ledgers[key].exists = True
        for one in workers:
            one.start()
        time.sleep(LOAD_SECONDS)
        server.kill()
        for one in workers:
            one.join()
        failed = [one.failure for one in workers if one.failure]
        assert not failed, failed
        server.close()
    last = start_server()
    check(last, ledgers)
    # The new server has waited for the old one's VMs: nothing of them runs any more.
    assert subprocess.run(["pgrep", "-f", f"^sleep {MARK}"], capture_output=True).returncode == 1
    assert last.close() == 0
    check_directory(last.data_dir, ledgers)
    assert len(zygotes) == ROUNDS
    for pid in zygotes:
        assert not glob.glob(f"/sys/fs/cgroup/**/agentos-*-{pid}-*", recursive=True)
    assert counts.writes > VMS
    assert counts.made > 0
    print(counts)


def check(server: Any, ledgers: dict[str, Ledger]) -> None:
    """Whether every key is as the last answer about it said."""
    for key, ledger in ledgers.items():
        found = server.http.get("/actors", params={"name": "vm", "key": key}).json()["actors"]
        if ledger.exists and not ledger.destroying:
            assert found, key
        if ledger.destroying and not ledger.exists:
            assert not found, key
        if not found or ledger.destroying or not ledger.files:
            continue
        shown = server.call(key, "exec", "for f in f*; do printf '%s ' $f; cat $f; done")["stdout"]
        kept = dict(line.split(" ", 1) for line in shown.splitlines(keepends=True) if " " in line)
        for name, content in ledger.files.items():
            assert kept.get(name) == content or name in ledger.doubtful, (key, name, content, kept)
    # What was in doubt is known now, or is written anew.
    for ledger in ledgers.values():
        for name in ledger.doubtful:
            ledger.files.pop(name, None)
        ledger.doubtful.clear()
    for key in [key for key, one in ledgers.items() if one.destroying]:
        del ledgers[key]


def children(pid: int) -> list[str]:
    """The pids of a process's children."""
    tasks = glob.glob(f"/proc/{pid}/task/*/children")
    return [child for path in tasks for child in Path(path).read_text(encoding="ascii").split()]


def check_directory(data_dir: Path, ledgers: dict[str, Ledger]) -> None:
    """Whether the files of a server that has ended are those of its records, and nothing uses them."""
    with contextlib.closing(sqlite3.connect(data_dir / "actors.sqlite")) as db:
        assert db.execute("pragma integrity_check").fetchall() == [("ok",)]
        rows = db.execute("select actor_id, start_ts, destroy_ts from actors").fetchall()
    assert not [row for row in rows if row[2] is not None]
    directories = {path.name for path in (data_dir / "vms").iterdir()}
    assert directories <= {row[0] for row in rows}
    assert directories >= {row[0] for row in rows if row[1] is not None}
    assert len(rows) >= sum(one.exists for one in ledgers.values())
    for path in glob.glob("/sys/block/loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            assert not Path(path).read_text(encoding="utf-8").startswith(str(data_dir))
    with open("/proc/self/mountinfo", encoding="utf-8") as file:
        assert str(data_dir) not in file.read()
