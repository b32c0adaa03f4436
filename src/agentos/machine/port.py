"""The host's end of a channel into a VM, on the event loop."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Sequence

from agentos.errors import VmStopped
from agentos.machine import channel
from agentos.machine.channel import ChannelBroken, Decoder, Message, Pack, Unpack

MAX_UNSENT_BYTES = 4 * 1024 * 1024
SERVANT_FRAME_BYTES = 64 * 1024
"""Greatest message of a spawner or connector."""
NO_SENSE = (KeyError, TypeError, ValueError)
"""What reading a message raises that is not as it should be."""


def whole(value: object, most: int, *, least: int = 0) -> int:
    """A whole number from the VM. Raises ValueError for anything else, or out of bounds."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"no number from {least} to {most}")
    return value


class Port:
    """One non-blocking Unix socket on the event loop: messages out in order, messages in as they come."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        received: Callable[[Message, list[int]], None],
        ended: Callable[[], None],
        most: int = SERVANT_FRAME_BYTES,
        *,
        pack: Pack | None = None,
        unpack: Unpack | None = None,
    ) -> None:
        self._loop = loop
        self.sock = sock
        self._received = received
        self._ended = ended
        self._decoder = Decoder(most, unpack)
        self._pack = pack
        self._unsent: deque[tuple[bytes, Sequence[int]]] = deque()
        """Where there is something, the loop tells when the socket takes more."""
        self._unsent_bytes = 0
        self.closed = False
        loop.add_reader(sock.fileno(), self.readable)

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send, with `fds` (closed here once they have gone out). What the socket does not take waits, in order."""
        if self.closed:
            for fd in fds:
                os.close(fd)
            raise VmStopped("the VM is not running", reason="error")
        data = self._frame(message, len(fds))
        if not self._unsent:
            data, fds = self._send_some(data, fds)
            if not data:
                return
            self._loop.add_writer(self.sock.fileno(), self._flush)
        self._unsent.append((data, fds))
        self._unsent_bytes += len(data)
        if self._unsent_bytes > MAX_UNSENT_BYTES:
            self.close()
            self._ended()

    def _frame(self, message: Message, fd_count: int) -> bytes:
        if self._pack is not None:
            try:
                body = self._pack(message)
            except ValueError:
                pass
            else:
                return channel.packed_frame(body, fd_count)
        return channel.frame(message, fd_count)

    def _send_some(self, data: bytes, fds: Sequence[int]) -> tuple[bytes, Sequence[int]]:
        """What is left to be sent."""
        try:
            sent = channel.send_some(self.sock, data, fds)
        except BlockingIOError:
            return data, fds
        except OSError:
            sent = len(data)  # the reading side tells that the other end is gone
        for fd in fds:
            os.close(fd)
        return data[sent:], ()

    def _flush(self) -> None:
        while self._unsent:
            data, fds = self._unsent[0]
            left, fds = self._send_some(data, fds)
            self._unsent_bytes -= len(data) - len(left)
            if left:
                self._unsent[0] = (left, fds)
                return
            self._unsent.popleft()
        self._loop.remove_writer(self.sock.fileno())

    def readable(self) -> None:
        """Take what has arrived."""
        if self.closed:
            return
        try:
            data, fds = channel.read(self.sock)
            messages = self._decoder.feed(data, fds) if data else None
        except BlockingIOError:
            return
        except (OSError, ChannelBroken):
            messages = None
        if messages is None:
            self.close()
            self._ended()
            return
        for message, owned in messages:
            if self.closed:
                for fd in owned:  # the one before was the last that is listened to
                    os.close(fd)
            else:
                self._received(message, owned)

    def close(self) -> None:
        """Close the socket and every descriptor that waits on it."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self.sock.fileno())
        self._loop.remove_writer(self.sock.fileno())
        self.sock.close()
        self._decoder.close()
        for _, fds in self._unsent:
            for fd in fds:
                os.close(fd)
        self._unsent.clear()
