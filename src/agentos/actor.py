"""One actor: a record that stays, and a VM that comes and goes.

Its VM boots with the first action, sleeps when nothing has happened for a while, and boots again, with its
files, when the next action comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from agentos.conversions import write_value
from agentos.errors import AgentOSError, VmNotFound
from agentos.host import Host
from agentos.machine.process import Process
from agentos.machine.shell import Shell
from agentos.machine.vm import VM
from agentos.model import LimitReached, VmSpec
from agentos.store import ActorRecord, Store
from agentos.streams import Stream, Streams
from agentos.wire.keys import Key

log = logging.getLogger("agentos.server")

ShutdownReason = Literal["sleep", "destroy", "error"]


@dataclass(frozen=True, slots=True)
class Connecting:
    """Who wants in: what a hook decides by. `params` are those of the connection or request."""

    name: str
    key: Key
    namespace: str
    params: Any
    input: bytes | None


@dataclass(frozen=True, slots=True)
class Booted:
    """An actor with its running VM, for hooks."""

    name: str
    key: Key
    namespace: str
    actor_id: str
    input: bytes | None
    vm: VM


@dataclass(frozen=True, slots=True)
class VmKind:
    """One kind of VM that a registry offers: what its VMs are made from, and what is called in their lives."""

    spec: VmSpec
    files: Mapping[str, str | bytes]
    sleep_after: float | None
    on_before_connect: Callable[[Connecting], Awaitable[None] | None] | None = None
    on_boot: Callable[[Booted], Awaitable[None] | None] | None = None
    on_shutdown: Callable[[Booted, ShutdownReason], Awaitable[None] | None] | None = None


class Listener(Protocol):
    """Who is told what happens in an actor. None of it may wait."""

    def stream_started(self, stream: Stream) -> None:
        """A process or shell started."""

    def announce(self, event: str, payload: dict[str, Any]) -> None:
        """The VM booted or shut down."""

    def actor_destroyed(self) -> None:
        """There is no such actor any more."""


class Household(Protocol):
    """What an actor needs of those that keep it."""

    host: Host
    store: Store
    live: set[Actor]
    on_booted: Callable[[float], None]
    on_limit: Callable[[str], None]

    def check_room(self, fresh: bool) -> None:
        """Raise LimitExceeded when as many VMs run as may."""

    def directory_of(self, actor_id: str) -> Path | None:
        """Where the files of an actor's VM are."""

    def forget(self, actor: Actor) -> None:
        """Drop it from memory."""

    async def remove_files(self, actor_id: str) -> None:
        """Delete its files, then its record."""


class Actor:
    """One actor. Whoever uses it is within `with actor`, so that it neither sleeps nor is forgotten."""

    def __init__(self, actors: Household, record: ActorRecord, kind: VmKind) -> None:
        self.record = record
        self.kind = kind
        self.listeners: set[Listener] = set()
        self.streams = Streams()
        self.destroyed = False
        self._actors = actors
        self._vm: VM | None = None
        self._transition: asyncio.Task[Any] | None = None
        self._uses = 0
        self._idle_since = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._watch_idle(kind.sleep_after)

    @property
    def actor_id(self) -> str:
        """Its id."""
        return self.record.actor_id

    @property
    def running(self) -> bool:
        """Whether its VM runs."""
        return self._vm is not None and self._vm.running

    def labels(self) -> dict[str, Any]:
        """What its log lines say of it."""
        record = self.record
        return {
            "actor": record.actor_id,
            "vm": record.name,
            "key": list(record.key),
            "namespace": record.namespace,
        }

    def __enter__(self) -> None:
        self._uses += 1

    def __exit__(self, *exc_info: object) -> None:
        self._end_use()

    def _end_use(self) -> None:
        self._uses -= 1
        if not self._uses:
            self._idle_since = time.monotonic()

    # -- its VM

    async def vm(self) -> VM:
        """Its VM, booted if need be. Raises BootFailed; VmNotFound when it is destroyed."""
        while True:
            if self.destroyed:
                raise VmNotFound("the VM was destroyed", actorId=self.actor_id)
            if self._vm is not None and self._vm.running:
                return self._vm
            if self._transition is None:
                self._begin_transition(self._boot())
            await self._transition_over()

    async def _transition_over(self) -> None:
        """Wait for the boot or shutdown under way; its error is raised here too."""
        task = self._transition
        if task is None:
            return
        try:
            await asyncio.shield(task)
        finally:
            # It may have ended before its callbacks have run: whoever looks again must not find it.
            if task.done() and self._transition is task:
                self._transition = None

    def _begin_transition(self, work: Any) -> asyncio.Task[Any]:
        task = self._transition = asyncio.get_running_loop().create_task(work)
        task.add_done_callback(self._transition_done)
        return task

    def _transition_done(self, task: asyncio.Task[Any]) -> None:
        if self._transition is task:
            self._transition = None
        if not task.cancelled():
            task.exception()  # whoever waits gets it; nobody may wait any more

    async def _boot(self) -> None:
        began = time.perf_counter()
        spec, fresh = self.kind.spec, self.record.start_ts is None
        self._actors.check_room(fresh)
        directory = self._actors.directory_of(self.actor_id)
        if directory is not None:
            spec = replace(spec, storage=str(directory))
        else:
            fresh = True  # in memory: nothing was kept
        vm = VM(spec=spec, files=self.kind.files if fresh else None, host=self._actors.host)
        vm.labels = self.labels()
        vm.on_process = vm.on_shell = self._stream_started
        vm.on_process_end = vm.on_shell_end = self._stream_ended
        vm.on_stopped = lambda: self._vm_stopped(vm)
        vm.on_limit = self._limit_reached
        await vm.start()
        try:
            await _call(self.kind.on_boot, self._booted(vm))
        except BaseException:
            await vm.close()
            raise
        self._vm = vm
        self.record = self._actors.store.started(self.record)
        self._actors.live.add(self)
        self._announce("vmBooted", {})
        took = time.perf_counter() - began
        self._actors.on_booted(took)
        log.info("vm booted", extra={**self.labels(), "ms": round(took * 1000, 2)})
        self._watch_idle(self.kind.sleep_after)

    def _booted(self, vm: VM) -> Booted:
        record = self.record
        return Booted(record.name, record.key, record.namespace, record.actor_id, record.input, vm)

    def _stream_started(self, source: Process | Shell) -> None:
        self._uses += 1
        stream = self.streams.begin(source)
        for listener in list(self.listeners):
            listener.stream_started(stream)
        log.debug("%s started", stream.scope, extra={**self.labels(), "pid": source.pid})

    def _stream_ended(self, source: Process | Shell) -> None:
        self._end_use()
        log.debug("exited", extra={**self.labels(), "pid": source.pid, "exit_code": source.exit_code})
        self.streams.end(source)

    def _vm_stopped(self, vm: VM) -> None:
        if self._vm is not vm:
            return
        self._vm = None
        self._actors.live.discard(self)
        log.warning("vm ended by itself", extra=self.labels())
        self._announce("vmShutdown", {"reason": "error"})

    def _limit_reached(self, reached: LimitReached) -> None:
        self._actors.on_limit(reached.limit)
        self._announce("limitReached", write_value(reached))
        log.warning("limit reached", extra={**self.labels(), "limit": reached.limit, "pid": reached.pid})

    def _announce(self, event: str, payload: dict[str, Any]) -> None:
        for listener in list(self.listeners):
            listener.announce(event, payload)

    # -- sleep and end

    def stop_watching(self) -> None:
        """Never put its VM to sleep by itself again."""
        self._watch_idle(None)

    def _watch_idle(self, seconds: float | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None and not self.destroyed:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look_idle)

    def _look_idle(self) -> None:
        limit = self.kind.sleep_after
        assert limit is not None
        left = self._idle_since + limit - time.monotonic()
        if self._uses or self._transition is not None:
            self._watch_idle(limit)
        elif left > 0:
            self._watch_idle(left)
        elif self._vm is None:
            self._actors.forget(self)
        else:
            self._begin_transition(self._sleep_if_idle(self._vm))

    async def _sleep_if_idle(self, vm: VM) -> None:
        try:
            background = await vm.all_processes()
        except AgentOSError:
            background = []
        if background or self._uses:
            # Such as a server that an exec left behind: it is in use as long as it runs.
            self._watch_idle(self.kind.sleep_after)
            return
        await self._shut_down("sleep")
        if not self._uses:
            self._actors.forget(self)

    async def sleep(self) -> None:
        """Put its VM to sleep now, whatever runs in it. No effect when it sleeps."""
        while self._transition is not None:
            with contextlib.suppress(Exception):
                await self._transition_over()
        if self._vm is not None:
            await asyncio.shield(self._begin_transition(self._shut_down("sleep")))

    async def _shut_down(self, reason: ShutdownReason) -> None:
        vm, self._vm = self._vm, None
        if vm is None:
            return
        self._actors.live.discard(self)
        try:
            await _call(self.kind.on_shutdown, self._booted(vm), reason)
        except Exception:
            log.exception("hook on_shutdown failed", extra=self.labels())
        self._announce("vmShutdown", {"reason": reason})
        await vm.close()
        if reason == "sleep":
            self.record = self._actors.store.slept(self.record)
        log.info("vm shut down", extra={**self.labels(), "reason": reason})

    async def destroy(self) -> None:
        """End its VM and delete its files and its record. Calls in flight fail; its key is free at once."""
        if self.destroyed:
            return
        self.destroyed = True
        self._watch_idle(None)
        self.record = self._actors.store.destroying(self.record)
        self._actors.forget(self)
        while self._transition is not None:
            with contextlib.suppress(Exception):
                await self._transition_over()
        await self._shut_down("destroy")
        await self._actors.remove_files(self.actor_id)
        for listener in list(self.listeners):
            listener.actor_destroyed()

    async def admit(self, params: Any) -> None:
        """Ask the hook whether a connection or request with these parameters may come in; it raises if not."""
        if self.kind.on_before_connect is not None:
            record = self.record
            await _call(
                self.kind.on_before_connect,
                Connecting(record.name, record.key, record.namespace, params, record.input),
            )


async def _call(hook: Callable[..., Awaitable[None] | None] | None, *args: Any) -> None:
    result = hook(*args) if hook is not None else None
    if inspect.isawaitable(result):
        await result
