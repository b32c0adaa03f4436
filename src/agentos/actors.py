"""All actors: found by (namespace, name, key) or by id, made, and taken from memory again.

All of it runs on one event loop, and finding or making an actor never waits: so however many calls race for a
key, they meet in the same actor.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from agentos.actor import Actor, VmKind
from agentos.errors import BootFailed, InvalidRequest, LimitExceeded, VmError, VmNotFound
from agentos.host import Host
from agentos.store import ActorRecord, Store, now_ms
from agentos.wire.keys import Key, serialize_key

log = logging.getLogger("agentos.server")

_LONGEST_KEY: Final = 2048
_LONGEST_NOTE: Final = 512
_ENDING_SECONDS: Final = 60.0
"""How long the VMs of a server that was killed may take to end: what they wrote last is written out."""
_CHOOSE_ANOTHER: Final = "choose another directory (--data-dir, or AGENTOS_DATA_DIR)"


class Actors:
    """All actors of one data directory (None: nothing is kept), and the host of their VMs.

    Make it within the event loop that is to run it; only one process may have the directory.
    """

    def __init__(
        self,
        kinds: Mapping[str, VmKind],
        data_dir: Path | None,
        host: Host,
        *,
        most: int = 10_000,
        reserve: int = 0,
    ):
        self.kinds = dict(kinds)
        self.host = host
        self.data_dir = data_dir
        self.live: set[Actor] = set()
        self.on_booted: Callable[[float], None] = lambda seconds: None
        self.on_limit: Callable[[str], None] = lambda limit: None
        self.closing = False
        """Whether the end has begun, and with it that of every VM."""
        self.closed = False
        """Whether there are no records any more to be asked for."""
        self._most = most
        self._reserve = reserve
        self._by_id: dict[str, Actor] = {}
        self._by_key: dict[tuple[str, str, Key], Actor] = {}
        self._lock_fd = -1 if data_dir is None else _lock(data_dir)
        self.store = Store(None if data_dir is None else data_dir / "actors.sqlite")

    async def recover(self) -> None:
        """Finish what a killed process left half done: running VMs, destroyed actors, directories without a record."""
        if self.data_dir is not None:
            await self._take_vms(self.data_dir)
        for record in self.store.destroyed():
            await self.remove_files(record.actor_id)
        if self.data_dir is not None:
            for entry in await asyncio.to_thread(os.listdir, self.data_dir / "vms"):
                if self.store.by_id(entry) is None:
                    await self.remove_files(entry)

    async def _take_vms(self, data_dir: Path) -> None:
        """Wait until nothing is left of the VMs of a server that was killed, and have those of this one waited for."""
        (data_dir / "vms").mkdir(mode=0o700, exist_ok=True)
        lock_fd = os.open(data_dir / "vms.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline = time.monotonic() + _ENDING_SECONDS
            while not _locked(lock_fd):
                if time.monotonic() > deadline:
                    raise BootFailed(
                        f"VMs of a server that was killed have not ended in {_ENDING_SECONDS:.0f} s",
                        step="lock",
                        errno=errno.EBUSY,
                        remedy=f"see who has {data_dir / 'vms.lock'} open",
                    )
                await asyncio.sleep(0.01)  # flock(2) knows no time limit
            await self.host.hold(str(data_dir), lock_fd)
        finally:
            os.close(lock_fd)

    async def get_ready(self, pool: int) -> None:
        """Have `pool` VMs of each kind booted before they are asked for."""
        directory = None if self.data_dir is None else str(self.data_dir / "vms")
        for name, kind in self.kinds.items():
            if kind.spec.image is not None:
                await asyncio.to_thread(_look_at_image, name, kind.spec.image)
            await self.host.keep_ready(kind.spec, pool, directory)

    def directory_of(self, actor_id: str) -> Path | None:
        """Where the files of an actor's VM are."""
        return None if self.data_dir is None else self.data_dir / "vms" / actor_id

    async def remove_files(self, actor_id: str) -> None:
        """Delete an actor's files, then its record. What cannot be deleted now is tried again at the next start."""
        directory = self.directory_of(actor_id)
        if directory is not None and directory.is_dir():
            try:
                # By the zygote, which has the ids that the VM's files belong to where the server is an ordinary user.
                factory = await self.host.ready()
                await asyncio.to_thread(factory.remove_tree, str(directory))
            except (OSError, VmError) as error:
                log.error("files could not be deleted", extra={"actor": actor_id, "error": str(error)[:500]})
                return
        self.store.remove(actor_id)

    def check_room(self, fresh: bool) -> None:
        """Raise LimitExceeded when as many VMs run as may, or the host has too little disk for a `fresh` one."""
        if len(self.live) >= self._most:
            raise LimitExceeded.of("live_vms", len(self.live) + 1, self._most, "too many VMs run already")
        if fresh and self.data_dir is not None:
            found = os.statvfs(self.data_dir)
            free = found.f_bavail * found.f_frsize
            if free < self._reserve:
                raise LimitExceeded(
                    f"the host's disk has {free} bytes left, and new VMs are made only above {self._reserve}",
                    limit="reserve_disk_bytes", value=free, maximum=self._reserve,
                )  # fmt: skip

    def kind_of(self, name: str) -> VmKind:
        """The kind of this name. Raises InvalidRequest."""
        kind = self.kinds.get(name)
        if kind is None:
            known = ", ".join(self.kinds)
            raise InvalidRequest.argument("actor name", name, f"one that the registry has ({known})")
        return kind

    def by_id(self, actor_id: str) -> Actor:
        """The actor of this id. Raises VmNotFound."""
        actor = self._by_id.get(actor_id)
        if actor is None:
            record = self.store.by_id(actor_id)
            if record is None or record.name not in self.kinds:
                raise VmNotFound("the VM does not exist or was destroyed", actorId=actor_id[:200])
            actor = self._keep(record)
        return actor

    def by_key(self, namespace: str, name: str, key: Key) -> Actor | None:
        """The actor of this key, if there is one."""
        kind = self.kind_of(name)
        actor = self._by_key.get((namespace, name, key))
        if actor is None:
            record = self.store.by_key(namespace, name, key)
            actor = self._keep(record, kind) if record is not None else None
        return actor

    def create(
        self,
        namespace: str,
        name: str,
        key: Key,
        *,
        pool: str | None = None,
        region: str | None = None,
        crash_policy: str | None = None,
        input: bytes | None = None,
    ) -> Actor:
        """Make the actor of this key; there must be none. Its VM boots when it is first used."""
        kind = self.kind_of(name)
        if len(serialize_key(key)) > _LONGEST_KEY:
            raise InvalidRequest.argument("key", key, f"at most {_LONGEST_KEY} characters")
        for what, value in (("namespace", namespace), ("pool", pool), ("region", region)):
            if value is not None and len(value) > 256:
                raise InvalidRequest.argument(what, value, "at most 256 characters")
        record = ActorRecord(
            actor_id=uuid.uuid4().hex, namespace=namespace, name=name, key=key, pool=pool or "default",
            region=region or "local", crash_policy=crash_policy or "sleep", input=input, create_ts=now_ms(),
        )  # fmt: skip
        self.store.add(record)
        actor = self._keep(record, kind)
        log.info("actor created", extra=actor.labels())
        return actor

    def _keep(self, record: ActorRecord, kind: VmKind | None = None) -> Actor:
        actor = Actor(self, record, kind or self.kind_of(record.name))
        self._by_id[record.actor_id] = actor
        self._by_key[record.namespace, record.name, record.key] = actor
        return actor

    def loaded(self, actor_id: str) -> Actor | None:
        """The actor of this id, if it is in memory: an actor that is not has no VM running."""
        return self._by_id.get(actor_id)

    def forget(self, actor: Actor) -> None:
        """Drop it from memory; its record is where it was."""
        record = actor.record
        if self._by_id.get(record.actor_id) is actor:
            del self._by_id[record.actor_id]
        if self._by_key.get((record.namespace, record.name, record.key)) is actor:
            del self._by_key[record.namespace, record.name, record.key]

    async def close(self) -> None:
        """Put every VM to sleep and let go of the directory."""
        self.closing = True
        actors = list(self._by_id.values())
        results = await asyncio.gather(*(one.sleep() for one in actors), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                log.error("a VM could not be shut down", extra={"error": str(result)})
        for one in actors:
            one.stop_watching()
        self._by_id.clear()
        self._by_key.clear()
        if self.data_dir is not None:
            await self.host.forget_ready(str(self.data_dir / "vms"))
            self.host.release(str(self.data_dir))
        self.closed = True
        self.store.close()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1


def _look_at_image(name: str, image: str) -> None:
    """What is wrong with it is known when the server starts, and not only when somebody asks for a VM."""
    try:
        os.close(os.open(image, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError as error:
        log.warning(
            "VMs cannot be made: the image cannot be used",
            extra={"vm": name, "image": image, "error": error.strerror},
        )


def _locked(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock(data_dir: Path) -> int:
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise BootFailed(
            f"the data directory {data_dir} cannot be used: {error.strerror}", step="data directory",
            errno=error.errno, remedy=_CHOOSE_ANOTHER,
        ) from None  # fmt: skip
    if not _locked(fd):
        try:
            raise _in_use(data_dir, os.pread(fd, _LONGEST_NOTE, 0))
        finally:
            os.close(fd)
    with contextlib.suppress(OSError):  # only for whoever finds it locked
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()} {os.uname().nodename}\n".encode(), 0)
    return fd


def _in_use(data_dir: Path, note: bytes) -> BootFailed:
    """The error that says who has the directory, as its lock file's `note` has it: empty for a moment at first."""
    pid, _, host = note.decode(errors="replace").strip().partition(" ")
    who, stop = "another server", "stop the other server"
    if pid.isdecimal() and host == os.uname().nodename:
        who, stop = f"another server, process {pid}", f"stop that server (kill {pid})"
    elif pid.isdecimal():  # a directory that containers or machines share
        who = f"another server, process {pid} on {host}"
    return BootFailed(
        f"the data directory {data_dir} is in use by {who}",
        step="lock",
        errno=errno.EBUSY,
        remedy=f"{stop}, or {_CHOOSE_ANOTHER}",
    )
