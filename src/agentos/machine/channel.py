"""Messages with descriptors over a Unix stream socket, between host, zygote, init and its servants.

A frame is 4 bytes of length (little-endian), 1 byte with the number of descriptors, and that many
bytes of JSON: an object. Where the highest bit of that byte is set they are no JSON, but packed as both
ends of the channel have agreed: for the messages of each exec, since JSON takes longer than all else on
their way. The descriptors travel as SCM_RIGHTS with the frame's first byte. Nothing from the other end
is trusted: a frame over the bound, JSON that is not an object, or a frame that promises descriptors
which did not come raises ChannelBroken, and every descriptor received is closed.

Only the standard library is imported: the zygote and all inits carry this module.
"""

from __future__ import annotations

import array
import json
import os
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any

Message = dict[str, Any]
Pack = Callable[[Message], bytes]
"""A message as it travels packed. Raises ValueError for one that only travels as JSON."""
Unpack = Callable[[bytes], Any]
"""A packed message as whoever agreed on it likes it; what travels as JSON is a dict."""

MAX_FRAME_BYTES = 16 * 1024 * 1024
MAX_FDS = 16
_HEADER = struct.Struct("<IB")
_PACKED = 0x80
_READ_BYTES = 64 * 1024
# Plain numbers: an operation on a flag of an enumeration costs more than the call it is meant for.
_MSG_CTRUNC, _MSG_CMSG_CLOEXEC = int(socket.MSG_CTRUNC), int(socket.MSG_CMSG_CLOEXEC)
_SOL_SOCKET, _SCM_RIGHTS, _MSG_NOSIGNAL = socket.SOL_SOCKET, socket.SCM_RIGHTS, int(socket.MSG_NOSIGNAL)
_CMSG_BYTES = socket.CMSG_SPACE(MAX_FDS * 4)

_encode = json.JSONEncoder(separators=(",", ":")).encode
_decode = json.JSONDecoder().raw_decode


class ChannelBroken(ConnectionError):
    """The other end is gone, or spoke something that is no frame: the channel is of no more use."""


def frame(message: Message, fd_count: int = 0) -> bytes:
    """`message` as the bytes that travel, announcing `fd_count` descriptors."""
    body = _encode(message).encode("ascii")
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes, at most {MAX_FRAME_BYTES} travel")
    return _HEADER.pack(len(body), fd_count) + body


def packed_frame(body: bytes, fd_count: int = 0) -> bytes:
    """`body`, which the other end knows how to unpack, as the bytes that travel."""
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"message of {len(body)} bytes, at most {MAX_FRAME_BYTES} travel")
    return _HEADER.pack(len(body), fd_count | _PACKED) + body


def send_some(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> int:
    """One sendmsg(2) of `data` with `fds`; returns how many bytes went. The descriptors go with the first of them."""
    control = [(_SOL_SOCKET, _SCM_RIGHTS, array.array("i", fds))] if fds else []
    return sock.sendmsg([data], control, _MSG_NOSIGNAL)


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message, with `fds` (which stay open here). Blocks as the socket does."""
    data = frame(message, len(fds))
    sent = send_some(sock, data, fds)
    if sent < len(data):
        sock.sendall(data[sent:], _MSG_NOSIGNAL)


def _message(body: bytes) -> Message:
    try:
        text = body.decode("ascii")
        message, end = _decode(text)
    except (ValueError, RecursionError) as error:
        raise ChannelBroken("frame holds no JSON") from error
    if not isinstance(message, dict) or end != len(text):
        raise ChannelBroken("frame holds no object")
    return message


class Decoder:
    """Bytes and descriptors as they arrive -> whole messages, in order. It holds one frame of `most` bytes at most.

    `unpack` reads packed messages, and raises ValueError for what is none; without it there may be none.
    """

    def __init__(self, most: int = MAX_FRAME_BYTES, unpack: Unpack | None = None) -> None:
        self._most = most
        self._unpack = unpack
        self._buffer = bytearray()
        self._fds: list[int] = []

    def feed(self, data: bytes, fds: Sequence[int] = ()) -> list[tuple[Any, list[int]]]:
        """The messages that are complete now, each with its descriptors, which the caller then owns."""
        if not self._buffer and len(data) >= _HEADER.size and not self._fds:
            length, kind = _HEADER.unpack_from(data)
            if len(data) == _HEADER.size + length and length <= self._most and len(fds) == kind & ~_PACKED:
                # As they mostly come: one whole message.
                body = data[_HEADER.size :]
                try:
                    return [(self._unpacked(body) if kind & _PACKED else _message(body), list(fds))]
                except ChannelBroken:
                    self._fds += fds
                    self.close()
                    raise
        self._buffer += data
        self._fds += fds
        complete = []
        try:
            while (one := self._next()) is not None:
                complete.append(one)
            if len(self._fds) > MAX_FDS:
                raise ChannelBroken(f"{len(self._fds)} descriptors that no frame has promised")
        except ChannelBroken:
            for _, owned in complete:
                self._fds += owned
            self.close()
            raise
        return complete

    def _next(self) -> tuple[Any, list[int]] | None:
        if len(self._buffer) < _HEADER.size:
            return None
        length, kind = _HEADER.unpack_from(self._buffer)
        fd_count = kind & ~_PACKED
        if length > self._most or fd_count > MAX_FDS:
            raise ChannelBroken(f"frame of {length} bytes with {fd_count} descriptors")
        end = _HEADER.size + length
        if len(self._buffer) < end:
            return None
        if len(self._fds) < fd_count:
            raise ChannelBroken(f"frame promises {fd_count} descriptors, {len(self._fds)} came")
        body = bytes(self._buffer[_HEADER.size : end])
        message = self._unpacked(body) if kind & _PACKED else _message(body)
        del self._buffer[:end]
        fds, self._fds = self._fds[:fd_count], self._fds[fd_count:]
        return message, fds

    def _unpacked(self, body: bytes) -> Any:
        if self._unpack is None:
            raise ChannelBroken("a packed frame, and none was agreed on")
        try:
            return self._unpack(body)
        except ValueError as error:
            raise ChannelBroken("packed frame that holds no message") from error

    def close(self) -> None:
        """Close every descriptor that no message claimed."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []


def read(sock: socket.socket, size: int = _READ_BYTES) -> tuple[bytes, list[int]]:
    """What has arrived: bytes (empty at the end) and descriptors, close-on-exec. Blocks as the socket does."""
    data, control, flags, _ = sock.recvmsg(size, _CMSG_BYTES, _MSG_CMSG_CLOEXEC)
    if not control and not flags & _MSG_CTRUNC:
        return data, []
    fds = array.array("i")
    for level, kind, payload in control:
        if level == _SOL_SOCKET and kind == _SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if flags & _MSG_CTRUNC:
        for fd in fds:
            os.close(fd)
        raise ChannelBroken("more descriptors than a frame may carry")
    return data, list(fds)


class BlockingChannel:
    """The guest side's end: one message at a time, waiting for it."""

    def __init__(self, sock: socket.socket, unpack: Unpack | None = None) -> None:
        self.sock = sock
        self._decoder = Decoder(unpack=unpack)
        self._ready: list[tuple[Message, list[int]]] = []

    def fileno(self) -> int:
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message; the descriptors stay open here."""
        send(self.sock, message, fds)

    def send_packed(self, body: bytes) -> None:
        """Send one message without descriptors, packed."""
        self.sock.sendall(packed_frame(body), _MSG_NOSIGNAL)

    def receive(self) -> tuple[Message, list[int]]:
        """The next message. Raises ChannelBroken at the end of the stream."""
        while not self._ready:
            self._ready = self.receive_some()
        return self._ready.pop(0)

    def receive_some(self) -> list[tuple[Message, list[int]]]:
        """The messages that one read completes, perhaps none. Raises ChannelBroken at the end of the stream."""
        data, fds = read(self.sock)
        if not data:
            raise ChannelBroken("the other end closed the channel")
        return self._decoder.feed(data, fds)

    def close(self) -> None:
        """Close the socket and every descriptor that arrived unclaimed."""
        self._decoder.close()
        self.sock.close()
