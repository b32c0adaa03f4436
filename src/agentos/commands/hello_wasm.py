"""A WASI program, assembled here byte by byte, so that the demo needs no compiler: it prints a text, and again.

The format is that of https://webassembly.github.io/spec/core/binary/, the two calls are WASI's preview 1.
"""

from __future__ import annotations

import struct

_I32, _FUNCTION_TYPE, _NO_RESULT_BLOCK = b"\x7f", b"\x60", b"\x40"
_CALL, _DROP, _LOOP, _BRANCH_IF, _END = b"\x10", b"\x1a", b"\x03", b"\x0d", b"\x0b"
_LOCAL_GET, _LOCAL_TEE, _CONST, _ADD, _LESS = b"\x20", b"\x22", b"\x41", b"\x6a", b"\x48"

_IOVEC, _WRITTEN, _SUBSCRIPTION, _EVENT, _EVENTS, _TEXT = 0, 8, 64, 128, 192, 256
"""Where things lie in the module's memory."""
_STDOUT, _MONOTONIC = 1, 1


def module(text: str, *, times: int = 1, pause: float = 0.0) -> bytes:
    """A module whose _start writes `text` to stdout `times` times and sleeps `pause` seconds after each."""
    data = text.encode()
    four_to_one = _FUNCTION_TYPE + _vector(_I32, _I32, _I32, _I32) + _vector(_I32)
    none_to_none = _FUNCTION_TYPE + _vector() + _vector()
    body = _LOOP + _NO_RESULT_BLOCK + _call(0, _STDOUT, _IOVEC, 1, _WRITTEN)
    if pause > 0:
        body += _call(1, _SUBSCRIPTION, _EVENT, 1, _EVENTS)
    body += _LOCAL_GET + _unsigned(0) + _constant(1) + _ADD + _LOCAL_TEE + _unsigned(0)
    body += _constant(times) + _LESS + _BRANCH_IF + _unsigned(0) + _END + _END
    one_local = _vector(_unsigned(1) + _I32)
    memory = _segment(_IOVEC, struct.pack("<II", _TEXT, len(data)))
    return b"\0asm\1\0\0\0" + b"".join(
        (
            _section(1, _vector(four_to_one, none_to_none)),
            _section(2, _vector(_imported("fd_write"), _imported("poll_oneoff"))),
            _section(3, _vector(_unsigned(1))),  # the one function here is of the second type
            _section(5, _vector(b"\0" + _unsigned(1 + (_TEXT + len(data)) // 65_536))),
            _section(7, _vector(_name("memory") + b"\2\0", _name("_start") + b"\0\2")),
            _section(10, _vector(_sized(one_local + body))),
            _section(11, _vector(memory, _segment(_SUBSCRIPTION, _clock(pause)), _segment(_TEXT, data))),
        )
    )


def _clock(pause: float) -> bytes:
    """A subscription of poll_oneoff: userdata, tag clock, clock id, nanoseconds from now, precision, flags."""
    return struct.pack("<QB7xI4xQQHxxxxxx", 0, 0, _MONOTONIC, int(pause * 1e9), 0, 0)


def _call(function: int, *arguments: int) -> bytes:
    return b"".join(_constant(one) for one in arguments) + _CALL + _unsigned(function) + _DROP


def _constant(value: int) -> bytes:
    return _CONST + _signed(value)


def _imported(name: str) -> bytes:
    return _name("wasi_snapshot_preview1") + _name(name) + b"\0" + _unsigned(0)


def _segment(address: int, data: bytes) -> bytes:
    return b"\0" + _constant(address) + _END + _sized(data)


def _section(number: int, content: bytes) -> bytes:
    return _unsigned(number) + _sized(content)


def _vector(*items: bytes) -> bytes:
    return _unsigned(len(items)) + b"".join(items)


def _name(text: str) -> bytes:
    return _sized(text.encode())


def _sized(data: bytes) -> bytes:
    return _unsigned(len(data)) + data


def _unsigned(value: int) -> bytes:
    """LEB128."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _signed(value: int) -> bytes:
    """LEB128 of a number that is not negative: bit 6 of the last byte, its sign, must be 0."""
    encoded = bytearray()
    while value > 0x3F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
