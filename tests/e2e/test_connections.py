"""Connections to ports in the VM: many at once, through one servant, which a guest may stop or kill."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import socket
from typing import Any

import pytest
from e2e_support import Transcript

from agentos import VM
from agentos.errors import PortUnreachable, VmStopped

_ECHO = """
import socket, sys, threading
def serve(family, address):
    listener = socket.socket(family)
    listener.bind((address, 0)); listener.listen(128)
    return listener
one, six = serve(socket.AF_INET, "127.0.0.1"), serve(socket.AF_INET6, "::1")
full = socket.socket(); full.bind(("127.0.0.1", 0)); full.listen(0)
crowd = [socket.socket() for _ in range(8)]
for each in crowd:
    each.setblocking(False); each.connect_ex(full.getsockname())
print(one.getsockname()[1], six.getsockname()[1], full.getsockname()[1], "ready", flush=True)
def answer(listener, word):
    while True:
        with listener.accept()[0] as sock:
            sock.sendall(word + sock.recv(100))
threading.Thread(target=answer, args=(six, b"6")).start()
answer(one, b"4")
"""


async def _ports(vm: VM) -> list[int]:
    server = await vm.spawn("python3", ["-c", _ECHO])
    said = await Transcript(server).until(rb"(\d+) (\d+) (\d+) ready")
    return [int(said[index]) for index in (1, 2, 3)]


async def _ask(vm: VM, port: int) -> bytes:
    loop = asyncio.get_running_loop()
    with await vm.connect(port) as sock:
        await loop.sock_sendall(sock, b"?")
        return await loop.sock_recv(sock, 100)


def test_one_after_the_other_and_all_at_once(in_vm: Any) -> None:
    """IPv4 and IPv6, and where nobody listens; a port that does not answer holds up none of them."""

    async def body(vm: VM) -> None:
        one, six, full = await _ports(vm)
        stuck = asyncio.create_task(vm.connect(full))
        assert [await _ask(vm, port) for port in (one, six, one)] == [b"4?", b"6?", b"4?"]
        answers = await asyncio.gather(*(_ask(vm, (one, six)[number % 2]) for number in range(60)))
        assert answers == [b"4?", b"6?"] * 30
        with pytest.raises(PortUnreachable) as caught:
            await vm.connect(1)
        assert isinstance(caught.value, ConnectionError)
        assert caught.value.details == {"port": 1, "errno": errno.ECONNREFUSED}
        assert not stuck.done()
        stuck.cancel()
        assert await _ask(vm, one) == b"4?"

    in_vm(body)


def test_they_share_a_servant(in_vm: Any) -> None:
    """Not a process for each: what they cost is what connecting costs."""

    async def body(vm: VM) -> None:
        one, _, _ = await _ports(vm)
        await _ask(vm, one)
        seen = []
        for _ in range(5):
            await _ask(vm, one)
            seen.append(await _newest_pid(vm))
        # Each look forks once or twice itself, and the same number every time.
        steps = {after - before for before, after in itertools.pairwise(seen)}
        for _ in range(5):
            await asyncio.gather(*(_ask(vm, one) for _ in range(20)))
            seen.append(await _newest_pid(vm))
        assert {after - before for before, after in itertools.pairwise(seen)} == steps
        assert len(steps) == 1

    in_vm(body)


async def _newest_pid(vm: VM) -> int:
    return int((await vm.exec_file("cat", ["/proc/loadavg"])).stdout.split()[-1])


def test_a_guest_that_kills_everything(in_vm: Any) -> None:
    """The next connection is served by another servant, and no descriptor is left over."""

    async def body(vm: VM) -> None:
        await _ask(vm, (await _ports(vm))[0])
        for _ in range(5):
            await vm.exec("kill -9 -1")
            one, _, _ = await _ports(vm)
            assert await _ask(vm, one) == b"4?"
        before = len(os.listdir("/proc/self/fd"))
        asking = [asyncio.create_task(vm.connect(one)) for _ in range(50)]
        await asyncio.sleep(0)
        for task in asking[::2]:
            task.cancel()
        for done in await asyncio.gather(*asking, return_exceptions=True):
            if isinstance(done, socket.socket):
                done.close()
            else:
                assert isinstance(done, asyncio.CancelledError)
        assert await _ask(vm, one) == b"4?"
        assert len(os.listdir("/proc/self/fd")) == before

    in_vm(body)


def test_whoever_waits_when_the_vm_ends(in_vm: Any) -> None:
    """Is told."""

    async def body(vm: VM) -> None:
        _, _, full = await _ports(vm)
        stuck = asyncio.create_task(vm.connect(full))
        await vm.exec("true")
        await vm.close()
        with pytest.raises(VmStopped):
            await stuck

    in_vm(body)
