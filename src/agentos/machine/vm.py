"""One VM: its life, on the event loop that started it. Its verbs are in `verbs/`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from agentos.errors import BootFailed, InvalidRequest, VmError, VmStopped
from agentos.linux.cgroups import Cgroup
from agentos.machine.alarms import Alarms
from agentos.machine.connections import Connections
from agentos.machine.factory import Factory
from agentos.machine.files import Files
from agentos.machine.footprint import Footprint
from agentos.machine.image import shell_of
from agentos.machine.jobs import BASH
from agentos.machine.leftovers import Leftovers
from agentos.machine.link import Link
from agentos.machine.outlets import PROXY_PORT, SERVICE, Ways
from agentos.machine.plan import HOME, UIDS
from agentos.machine.pool import RawVm
from agentos.machine.process import Process
from agentos.machine.remains import Remains
from agentos.machine.shell import Shell
from agentos.machine.shells import Shells
from agentos.machine.spawned import Spawned
from agentos.machine.starts import Starts
from agentos.machine.verbs.exec import ExecVerbs
from agentos.machine.verbs.processes import BackgroundVerbs
from agentos.machine.verbs.shells import ShellVerbs
from agentos.machine.zygote_process import ZygoteEnded
from agentos.model import LimitReached, Limits, Mount, VmSpec, check_count, check_data, check_env, check_text
from agentos.network.rules import Network

if TYPE_CHECKING:
    from agentos.host import Host
    from agentos.network.egress import Egress

_REFILL_SECONDS = 0.02
_END_SECONDS = 2.0
"""An init that has not ended by then, when the VM was closed, is killed."""


class VM(ExecVerbs, BackgroundVerbs, ShellVerbs):
    """An isolated Linux VM in this process: `async with VM() as vm: await vm.exec("echo hello")`.

    Boots when entered (or with `start`), ends when left (or with `close`): every process in it is killed and
    its files are gone, unless `storage` names a directory for them. Belongs to the event loop that started it.

    The arguments are the fields of VmSpec, or `spec` is one. `files` are written before anything runs: path, from
    the home directory on, and content.
    """

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        env: Mapping[str, str] | None = None,
        user: str = "agentos",
        hostname: str = "agentos",
        mounts: Sequence[Mount] = (),
        image: str | None = None,
        storage: str | None = None,
        network: Network | str | Sequence[str] = "none",
        isolation: str = "namespaces",
        files: Mapping[str, str | bytes] | None = None,
        spec: VmSpec | None = None,
        host: Host | None = None,
    ) -> None:
        if spec is not None:
            if not isinstance(spec, VmSpec):
                raise InvalidRequest.argument("spec", spec, "a VmSpec")
            rest = (limits, env or None, user, hostname, mounts or (), image, storage, network, isolation)
            if rest != (None, None, "agentos", "agentos", (), None, None, "none", "namespaces"):
                raise InvalidRequest.argument(
                    "spec", spec, "all that the VM is made from, or arguments and no spec"
                )
        if host is not None and not callable(getattr(host, "ready", None)):
            raise InvalidRequest.argument("host", host, "a Host")
        if not isinstance(mounts, Sequence):
            raise InvalidRequest.argument("mounts", mounts, "a list of Mount")
        self.spec = spec or VmSpec(
            limits=Limits() if limits is None else limits, env=check_env(env), user=user, hostname=hostname,
            mounts=tuple(mounts), image=image, storage=storage, network=Network.of(network), isolation=isolation,
        )  # fmt: skip
        self.boot_id: str = uuid.uuid4().hex
        """Names this boot: only within it a pid or a shell's id means the same process."""
        self._host = host
        self._seed = _check_files(files)
        self._remains: Remains | None = None
        self._gone: asyncio.Future[None] | None = None
        self._closed = False
        self._end_timer: asyncio.TimerHandle | None = None
        self._cgroup: Cgroup | None = None
        self._files: Files | None = None
        self._connections: Connections | None = None
        self._footprint: Footprint | None = None
        self._shell = BASH
        self._egress: Egress | None = None
        self.labels: dict[str, Any] = {}
        """What log lines about it say besides; to be set before the start."""
        self.on_process: Callable[[Process], None] | None = None
        """Called when a spawned process has started, before its pid is returned."""
        self.on_process_end: Callable[[Process], None] | None = None
        self.on_shell: Callable[[Shell], None] | None = None
        self.on_shell_end: Callable[[Shell], None] | None = None
        self.on_stopped: Callable[[], None] | None = None
        self.on_limit: Callable[[LimitReached], None] | None = None
        """Called when the VM has come to one of its limits: once for each burst, and once a second at most."""
        self._make_parts()

    def _make_parts(self) -> None:
        limits = self.spec.limits
        self._link: Link | None = None
        self._alarms = Alarms(limits, self._limit_reached)
        self._starts = Starts(limits, self._alarms)
        self._spawned = Spawned(limits)
        self._shells = Shells(limits)
        self._leftovers = Leftovers(limits.background_pipes)

    def __repr__(self) -> str:
        state = "new" if self._link is None else "stopped" if self._link.ended.done() else "running"
        return f"<VM {self.spec.hostname} {state}>"

    # -- life

    async def __aenter__(self) -> VM:
        return await self.start()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def start(self) -> VM:
        """Boot. Raises BootFailed with the step, errno and remedy when the host does not allow it."""
        if self._link is not None:
            raise InvalidRequest("this VM was started already; make a new VM")
        if self._host is None:
            from agentos.host import default_host

            self._host = default_host()
        try:
            await self._boot(self._host)
        except ZygoteEnded:
            if self._closed:
                raise
            self._make_parts()
            await self._boot(self._host)
        self._host.vms.add(self)
        return self

    async def _boot(self, host: Host) -> None:
        """Raises BootFailed; ZygoteEnded where a second try may do."""
        factory = await host.ready()
        shell = BASH if self.spec.image is None else _shell_of(self.spec.image)
        _look_at_mounts(self.spec)
        raw = factory.pool.take(self.spec) or await _create(factory, self.spec)
        if shell != BASH:
            self._shell = shell
            self.spec = replace(self.spec, env={"SHELL": shell, **self.spec.env})
        self._attach(raw)
        try:
            await self._come_up(host, factory, has_disk=raw.has_disk)
            self._check_up()
        except BaseException as error:
            self.link.close(VmStopped("the VM was closed", reason="closed"))
            await self._over()
            if isinstance(error, VmError) and raw.remains.lost and factory.zygote is not None:
                raise ZygoteEnded.of("the VM was booting") from error
            raise

    def _check_up(self) -> None:
        # It may have ended after it said that it had booted.
        if not self.running or self._remains is None or self._remains.ended:
            raise BootFailed("the VM ended while it booted", step="boot", errno=0, remedy="")

    async def _come_up(self, host: Host, factory: Factory, *, has_disk: bool) -> None:
        self._spawned.retention.join(host.retention())
        booted = await asyncio.shield(self.link.booted)
        if self.link.warm is not None:
            await asyncio.shield(self.link.warm)
        self._check_up()
        self._cgroup = Cgroup.from_dict(booted["cgroup"])
        if self.spec.network:
            self._begin_egress(host)
        self._alarms.start(asyncio.get_running_loop(), self._cgroup)
        if self.spec.storage is not None and not has_disk:
            self._footprint = Footprint(
                self.spec.storage, self.spec.limits, factory.measure, self._storage_exceeded
            )
            self.files.full = lambda: self._footprint.full if self._footprint else None
        # Not at once: the next VM's boot would compete with what this one was made for.
        asyncio.get_running_loop().call_later(_REFILL_SECONDS, self._alarms.listen)
        if factory.pool.lacking:
            asyncio.get_running_loop().call_later(_REFILL_SECONDS, _refill, factory)
        for path, content in self._seed.items():
            await self.files.write_file(path, content)

    def _begin_egress(self, host: Host) -> None:
        # Not at the top: most VMs have no network, and their programs shall not pay for it.
        from agentos.network.egress import Egress, proxy_env

        outlets, self.link.outlets = self.link.outlets, {}
        if "proxy" not in outlets:
            raise VmStopped("the VM's init ended", reason="error")
        routes = outlets.pop("routes", None)
        ways = Ways(routes) if routes is not None else None
        self._egress = Egress(
            self.spec.network, outlets, most=self.spec.limits.network_connections,
            traffic=host.traffic, labels=self.labels, ways=ways,
            on_full=lambda: self._alarms.reached("network_connections"),
        )  # fmt: skip
        if "tcp" not in outlets:
            self.spec = replace(self.spec, env=proxy_env(SERVICE, PROXY_PORT) | dict(self.spec.env))

    def _attach(self, raw: RawVm) -> None:
        loop = asyncio.get_running_loop()
        self._gone = loop.create_future()
        self._remains = raw.remains
        self._watch(raw.remains, raw.remains.fileno())
        self._link = Link(loop, raw.sock)
        self._link.on_end = self._stopped
        self._link.on_disk = self._disk_seen
        if raw.spawner is not None:
            self._link.take_spawner(UIDS[self.spec.user], *raw.spawner)
        self._files = Files(
            self._open_file_worker, limits=self.spec.limits, home=HOME, no_space=self._no_space
        )
        self._connections = Connections(self._link, UIDS[self.spec.user])

    def _disk_seen(self, full: object) -> None:
        if (
            self._footprint is None
        ):  # else the file system is the host's, whose room says nothing of the limit
            self._alarms.disk(full)

    def _no_space(self, limit: str) -> None:
        if self._footprint is None:
            self._alarms.reached(limit)

    def _storage_exceeded(self, limit: str) -> None:
        self._alarms.reached(limit)
        self._starts.disk_kills += 1
        self._starts.disk_limit = limit
        for process in self._spawned.running():
            process.end("diskLimit")
        with contextlib.suppress(VmStopped):
            self.link.send({"op": "kill_all"})

    def _watch(self, remains: Remains, fd: int) -> None:
        asyncio.get_running_loop().add_reader(fd, self._look_at_remains, remains, fd)

    def _look_at_remains(self, remains: Remains, fd: int) -> None:
        """The zygote has said something of this VM, or has ended; or init has, after the zygote."""
        over, now = remains.look(), remains.fileno()
        if remains.lost:
            self.link.close(VmStopped("the zygote ended, and its VMs with it", reason="error"))
        if over or now != fd:
            asyncio.get_running_loop().remove_reader(fd)
        if over:
            remains.close()
            if self._gone is not None and not self._gone.done():
                self._gone.set_result(None)
            if self._end_timer is not None:
                self._end_timer.cancel()
        elif now != fd:
            self._watch(remains, now)

    def _insist_on_end(self) -> None:
        """Init should have ended when its channel did. Whoever keeps it from that is killed with it."""
        if self._remains is not None:
            self._remains.kill()

    def _stopped(self) -> None:
        self._end_timer = self.link.loop.call_later(_END_SECONDS, self._insist_on_end)
        self._alarms.stop()
        if self._footprint is not None:
            self._footprint.stop()
        self._leftovers.close()
        self._spawned.retention.close()
        if self._files is not None:
            self._files.close(self.link.stopped_error())
        if self._connections is not None:
            self._connections.close()
        if self._egress is not None:
            self._egress.close()
        if self._host is not None and self in self._host.vms:
            self._host.vms.discard(self)
            if self.on_stopped:
                self.on_stopped()

    async def close(self) -> None:
        """End the VM and wait until nothing of it is left. No effect when it has ended."""
        if self._link is None:
            return
        self._closed = True
        self._link.close(VmStopped("the VM was closed", reason="closed"))
        await self._over()

    async def _over(self) -> None:
        """Wait until nothing is left of it."""
        assert self._gone is not None
        await asyncio.shield(self._gone)

    @property
    def files(self) -> Files:
        """The file actions, streams included."""
        self._check_running()
        assert self._files is not None
        return self._files

    @property
    def limits_hit(self) -> Mapping[str, int]:
        """How often the VM came to each of its limits: those that it came to, by their names in Limits."""
        return dict(self._alarms.hits)

    def _limit_reached(self, reached: LimitReached) -> None:
        if self.on_limit:
            self.on_limit(reached)

    # -- jobs that are no programs

    async def _open_file_worker(self) -> socket.socket:
        self._check_running()
        return self.link.fork_servant("files", uid=UIDS[self.spec.user])[1]

    async def connect(self, port: int) -> socket.socket:
        """A non-blocking socket, connected to `port` on the VM's loopback: the caller closes it.

        Raises PortUnreachable, which is a ConnectionError, when nobody listens there.
        """
        check_count("port", port, least=1, most=65535)
        self._check_running()
        assert self._connections is not None
        return await self._connections.open(port)


async def _create(factory: Factory, spec: VmSpec) -> RawVm:
    """A VM that no pool has. Not in the event loop's thread where its disk has to be mounted."""
    if spec.storage is None:
        return factory.create(spec)
    making = asyncio.get_running_loop().run_in_executor(None, factory.create, spec)
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(_let_go)
        raise


def _let_go(making: asyncio.Future[RawVm]) -> None:
    if not making.cancelled() and making.exception() is None:
        making.result().close()


def _refill(factory: Factory) -> None:
    with contextlib.suppress(RuntimeError):  # the event loop is ending
        asyncio.get_running_loop().run_in_executor(None, factory.replenish)


def _check_files(files: object) -> dict[str, bytes]:
    """The files that a VM begins with, by path."""
    if files is None:
        return {}
    if not isinstance(files, Mapping):
        raise InvalidRequest.argument("files", files, "a mapping of paths to text or bytes")
    return {
        check_text("files path", path, empty=False): check_data(f"files[{path!r}]", content)
        for path, content in files.items()
    }


def _shell_of(image: str) -> str:
    try:
        return shell_of(image)
    except OSError as error:
        raise BootFailed(
            f"the image {image} cannot be used: {error.strerror}",
            step="image",
            errno=error.errno or 0,
            remedy="name a directory with an unpacked root file system that the server may read",
        ) from None


def _look_at_mounts(spec: VmSpec) -> None:
    for mount in spec.mounts:
        try:
            os.close(os.open(mount.host_path, os.O_PATH | os.O_CLOEXEC))
        except OSError as error:
            raise BootFailed(
                f"the mount {mount.host_path} cannot be used: {error.strerror}",
                step="mounts",
                errno=error.errno or 0,
                remedy="name a directory that the host has, and that whoever boots the VM may reach",
            ) from None
