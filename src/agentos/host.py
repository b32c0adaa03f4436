"""The host of VMs in this process: its zygote, and every VM that came from it."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import threading
import warnings
from collections.abc import Callable
from weakref import WeakKeyDictionary

from agentos.errors import BootFailed
from agentos.machine.factory import Factory
from agentos.machine.retention import Retention
from agentos.machine.vm import VM
from agentos.model import MIB, VmSpec, check_count
from agentos.network.gate import Traffic

DEFAULT_POOL = 2
EXITED_LOG_BYTES = 512 * MIB
LOSSLESS_BYTES = 512 * MIB


class Host:
    """Makes VMs. `pool` booted, unnamed VMs are kept ready for specs that ask for nothing special.

    A VM in the pool costs what an idle VM costs; taking one makes room for the next, which boots in the
    background. Usable from any number of event loops and threads, one after another or at once. If its zygote is
    killed its VMs end, and the next one is made by another zygote. One that nobody has any more without having closed
    it ends by itself, with a ResourceWarning.

    `exited_log_bytes` and `lossless_bytes` bound for all its VMs of one event loop together what the limits of these
    names bound for each.
    """

    def __init__(
        self, *, pool: int = 0, exited_log_bytes: int = EXITED_LOG_BYTES, lossless_bytes: int = LOSSLESS_BYTES
    ) -> None:
        self._exited_log_bytes = check_count("exited_log_bytes", exited_log_bytes, least=1)
        self._lossless_bytes = check_count("lossless_bytes", lossless_bytes, least=1)
        self._retentions: WeakKeyDictionary[asyncio.AbstractEventLoop, Retention] = WeakKeyDictionary()
        self._factory = Factory(check_count("pool", pool, most=1000))
        self.vms: set[VM] = set()
        self.traffic = Traffic()
        """What its VMs have had of the network."""

    def __del__(self, warn: Callable[..., None] = warnings.warn) -> None:
        factory: Factory | None = getattr(self, "_factory", None)
        if factory is not None and factory.open:
            warn(f"unclosed host {self!r}", ResourceWarning, source=self)
            factory.drop()

    async def __aenter__(self) -> Host:
        await self.ready()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def ready(self) -> Factory:
        """Start a zygote unless one runs: the first, or another in place of one that died. Raises BootFailed."""
        if not self._factory.running:
            await asyncio.to_thread(self._factory.start)
        return self._factory

    def retention(self) -> Retention:
        """What bounds the output that its VMs of the running event loop keep."""
        loop = asyncio.get_running_loop()
        found = self._retentions.get(loop)
        if found is None:
            found = self._retentions[loop] = Retention(self._exited_log_bytes, self._lossless_bytes)
        return found

    async def keep_ready(self, spec: VmSpec, count: int, storage_in: str | None = None) -> None:
        """Have `count` VMs of `spec` booted before they are asked for, from now on.

        With `storage_in`, a directory, they serve specs that are equal but for a `storage` in it which does not exist
        yet. Directories of VMs that nobody has asked for are removed at the end; after a kill, those in `storage_in`
        whose names begin with `spare-` are left over.
        """
        check_count("count", count, most=1000)
        factory = await self.ready()
        if count:
            factory.pool.keep(spec, count, storage_in)
            await asyncio.to_thread(factory.pool.fill)

    async def forget_ready(self, storage_in: str) -> None:
        """Have none ready any more for storage in this directory, and remove what is there of them."""
        factory = self._factory
        if factory.zygote is None:
            return
        dropped = await asyncio.to_thread(factory.pool.drop, storage_in)
        # A second time if the zygote dies meanwhile: the files are those of ids that only a zygote has.
        for _ in range(2):
            with contextlib.suppress(BootFailed):
                await self.ready()
            if await asyncio.to_thread(factory.discard, dropped):
                return
            dropped = []

    async def hold(self, name: str, fd: int) -> None:
        """Have a copy of `fd` stay open until `release`, or the last VM is gone, even if this process is killed."""
        (await self.ready()).hold(name, fd)

    def release(self, name: str) -> None:
        """Close what was to be held under this name. No effect where there is nothing."""
        self._factory.release(name)

    async def close(self) -> None:
        """End every VM and the zygote, and wait until nothing of them is left."""
        await asyncio.to_thread(self.shut_down)

    def shut_down(self) -> None:
        """As `close`, blocking, from any thread."""
        self._factory.close()


_default: Host | None = None
_default_pid = 0
_lock = threading.Lock()


def default_host() -> Host:
    """The host that VM() uses: made at first use, ended with this Python process."""
    global _default, _default_pid
    with _lock:
        if _default is None or _default_pid != os.getpid():
            _default = Host(pool=DEFAULT_POOL)
            _default_pid = os.getpid()
            atexit.register(_close_default, os.getpid())
        return _default


def _close_default(pid: int) -> None:
    if _default is not None and os.getpid() == pid:
        _default.shut_down()
