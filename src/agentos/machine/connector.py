"""Connects to TCP ports inside the VM and hands the sockets to the host: a socket stays in its network namespace."""

from __future__ import annotations

import errno
import select
import socket
import time

from agentos.machine.channel import BlockingChannel, Message

_ADDRESSES = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))
_CONNECT_SECONDS = 10.0


class _Attempt:
    """One connection that is asked for, to one of the addresses after the other."""

    def __init__(self, number: int, port: int) -> None:
        self.number = number
        self.port = port
        self.addresses = list(_ADDRESSES)
        self.sock: socket.socket | None = None
        self.errno = errno.ECONNREFUSED
        self.deadline = 0.0

    def begin(self) -> int:
        """Try what is left. 0: connected; EINPROGRESS: not yet; else why none of them could be connected to."""
        while self.addresses:
            family, address = self.addresses.pop(0)
            try:
                self.close()
                self.sock = socket.socket(
                    family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
                )
                number = self.sock.connect_ex((address, self.port))
            except OSError as error:
                number = error.errno or errno.EIO
            if number == errno.EINPROGRESS:
                self.deadline = time.monotonic() + _CONNECT_SECONDS
            if number in (0, errno.EINPROGRESS):
                return number
            self.errno = number
        return self.errno

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
            self.sock = None


class Connector:
    """The loop of a connector: a port whose queue is full holds up nobody else."""

    def __init__(self, channel: BlockingChannel) -> None:
        self.channel = channel
        self.poll = select.poll()
        self.attempts: dict[int, _Attempt] = {}
        """Those under way, by descriptor."""

    def run(self) -> None:
        """Serve until the channel ends."""
        self.poll.register(self.channel.fileno(), select.POLLIN)
        while True:
            left = [one.deadline - time.monotonic() for one in self.attempts.values()]
            for fd, _ in self.poll.poll(max(0.0, min(left)) * 1000 if left else None):
                if fd == self.channel.fileno():
                    for message, _ in self.channel.receive_some():
                        self.go_on(_Attempt(int(message["id"]), int(message["connect"])))
                elif fd in self.attempts:
                    self.settled(fd)
            now = time.monotonic()
            for fd in [fd for fd, one in self.attempts.items() if one.deadline <= now]:
                attempt = self.forget(fd)
                attempt.errno = errno.ETIMEDOUT
                self.go_on(attempt)

    def settled(self, fd: int) -> None:
        """The kernel has connected it, or could not."""
        attempt = self.forget(fd)
        assert attempt.sock is not None
        number = attempt.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            attempt.errno = number
            self.go_on(attempt)
        else:
            self.answer(attempt, 0)

    def forget(self, fd: int) -> _Attempt:
        """It is not waited for any more."""
        self.poll.unregister(fd)
        return self.attempts.pop(fd)

    def go_on(self, attempt: _Attempt) -> None:
        """Try the next address."""
        number = attempt.begin()
        if number == errno.EINPROGRESS and attempt.sock is not None:
            self.attempts[attempt.sock.fileno()] = attempt
            self.poll.register(attempt.sock.fileno(), select.POLLOUT)
        else:
            self.answer(attempt, number)

    def answer(self, attempt: _Attempt, number: int) -> None:
        """A connected socket, or the errno why there is none."""
        answer: Message = {"id": attempt.number, "errno": number}
        try:
            self.channel.send(
                answer, [attempt.sock.fileno()] if attempt.sock is not None and not number else []
            )
        finally:
            attempt.close()


def serve(channel: BlockingChannel) -> None:
    """Answer each request with a socket that is connected to its port on loopback, or with the errno why not."""
    Connector(channel).run()
