"""What the host asks of a spawner and of init when a launch is given up, or its spawner is lost."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pytest

from agentos.errors import SpawnFailed
from agentos.machine.channel import BlockingChannel
from agentos.machine.execution import ExecOptions, Execution
from agentos.machine.jobs import Program
from agentos.machine.jobwire import JOURNAL_ENTRY, REPORT, unpack_job
from agentos.machine.link import Link
from agentos.machine.pipes import Reader

UID = 1000
MARK, PID = 4026532000, 77


class Far:
    """The other ends: of a VM's init, and of the spawner that the VM was made with."""

    def __init__(self, init: socket.socket, spawner: socket.socket, journal: int) -> None:
        self.init = BlockingChannel(init)
        self.spawner = BlockingChannel(spawner, unpack_job)
        self._journal = journal

    def told(self, channel: BlockingChannel) -> dict[str, Any]:
        """The next thing that was said, with its descriptors closed."""
        message, fds = channel.receive()
        for fd in fds:
            os.close(fd)
        return message

    def note(self, number: int) -> None:
        """In the journal: this job is about to be started."""
        os.write(self._journal, JOURNAL_ENTRY.pack(number, 0, MARK))


@contextmanager
def linked() -> Iterator[tuple[Link, Far]]:
    """A link with a spawner for UID, and who it speaks to."""
    with ExitStack() as stack:
        init, their_init = socket.socketpair()
        spawner, their_spawner = socket.socketpair()
        journal, their_journal = os.pipe2(os.O_NONBLOCK)
        for sock in (init, spawner, their_init, their_spawner):
            sock.setblocking(False)
        stack.callback(os.close, their_journal)
        stack.enter_context(closing(their_init))
        stack.enter_context(closing(their_spawner))
        link = Link(asyncio.get_running_loop(), init)
        link.take_spawner(UID, spawner, journal)
        try:
            yield link, Far(their_init, their_spawner, their_journal)
        finally:
            link.close(link.stopped_error())


def job(**more: Any) -> dict[str, Any]:
    """A job of UID, as a program makes it."""
    return {"argv": ["cat"], "cwd": "/", "env": {}, "uid": UID, "path": None, "as_bash": False, **more}


def on_a_loop(body: Callable[[Link, Far], Awaitable[None]]) -> None:
    """Run `body`, within a second."""

    async def main() -> None:
        async with asyncio.timeout(1):
            with linked() as (link, far):
                await body(link, far)

    asyncio.run(main())


def test_the_spawner_of_a_terminal_is_lost_as_it_starts_the_program() -> None:
    """Whoever waits is told what init found, without the terminal: that went with the spawner."""

    async def body(link: Link, far: Far) -> None:
        launch = link.launch(job(pty=[24, 80]))
        far.note(far.told(far.spawner)["job"])
        far.spawner.close()
        asked = await _once(far, far.init)
        assert (asked["op"], asked["mark"], asked["left_by"]) == ("members", MARK, 1)
        far.init.send({"id": asked["id"], "members": [[PID, "cat"]]})
        await asyncio.shield(launch.settling())
        assert (launch.pid, launch.mark, launch.master_fd, launch.error) == (PID, MARK, -1, None)
        assert await _once(far, far.init) == {"op": "adopt", "jobs": [[launch.number, PID]]}

    on_a_loop(body)


def test_a_mark_is_kept_until_what_it_names_is_killed() -> None:
    """Also where the launch was given up before anything was known of it: a free number is given to another command."""

    async def body(link: Link, far: Far) -> None:
        launch = link.launch(job())
        link.take_back(launch)
        link.launch(job())
        told = [far.told(far.spawner) for _ in range(3)]
        assert told[1] == {"tell": launch.number}
        assert "forget" not in told[2]
        far.spawner.send({"started": launch.number, "pid": PID, "mark": MARK})
        asked = await _once(far, far.init)
        assert (asked["op"], asked["mark"]) == ("kill", MARK)
        link.launch(job())
        assert "forget" not in far.told(far.spawner)
        far.init.send({"id": asked["id"]})
        await _turns()
        link.launch(job())
        assert far.told(far.spawner)["forget"] == [launch.number]

    on_a_loop(body)


def test_a_mark_of_what_ended_before_it_was_killed_is_of_no_more_use() -> None:
    """The program was short, and nothing was told of it but its end."""

    async def body(link: Link, far: Far) -> None:
        launch = link.launch(job(quiet=True))
        link.take_back(launch)
        far.spawner.send_packed(REPORT.pack(launch.number, 0, 1, 1, False, 0))
        await _turns()
        for _ in range(2):
            far.told(far.spawner)
        link.launch(job())
        assert far.told(far.spawner)["forget"] == [launch.number]

    on_a_loop(body)


def test_a_time_limit_holds_for_the_program_that_is_tried_again() -> None:
    """It passed while a spawner was lost before it had begun anything: what is started then is killed at once."""

    async def body(link: Link, far: Far) -> None:
        program = Program(["sleep", "1000"], "/", {}, "agentos")
        options = ExecOptions(None, True, 0.01, None, None, 100, 100, "utf8", "drain")
        execution = Execution(link, program, options, lambda: 0, Reader.close)
        first = asyncio.ensure_future(execution.run(False))
        await asyncio.sleep(0.02)
        far.spawner.close()
        with pytest.raises(SpawnFailed):
            await first
        second = asyncio.ensure_future(execution.run(False))
        await _turns()
        _, (sock, journal) = far.init.receive()
        os.close(journal)
        with socket.socket(fileno=sock) as mine:
            mine.setblocking(False)
            spawner = BlockingChannel(mine, unpack_job)
            number = far.told(spawner)["job"]
            assert await _once(far, spawner) == {"tell": number}
            spawner.send({"started": number, "pid": PID, "mark": MARK})
            asked = await _once(far, far.init)
            assert (asked["op"], asked["mark"]) == ("kill", MARK)
            far.init.send({"id": asked["id"]})
            spawner.send_packed(REPORT.pack(number, 9, 1, 1, False, 0))
            far.init.send(
                {"id": (await _once(far, far.init))["id"]}
            )  # nothing is left, as a second look shows
            assert (await second).reason == "timeout"

    on_a_loop(body)


async def _turns() -> None:
    """As many of the loop as it takes to read what came, and to do what follows from it."""
    for _ in range(5):
        await asyncio.sleep(0)


async def _once(far: Far, channel: BlockingChannel) -> dict[str, Any]:
    """The next thing that is said, as soon as it is."""
    while True:
        try:
            return far.told(channel)
        except BlockingIOError:
            await asyncio.sleep(0)
