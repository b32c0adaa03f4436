"""A tiny assembler of classic BPF as seccomp(2) runs it: blocks of code that are put together like values.

A block is the bytes of its instructions (struct sock_filter of linux/filter.h). It looks at the accumulator
and ends in a return on every path, so blocks need no labels, never fall off their end, and only ever jump
forward within themselves. Which system calls exist or are wanted is not this module's business.

Only loads, AND, jumps against a constant and constant returns are used: those are what the kernel (since
5.11) can see through at load time, to skip the filter for calls that it always allows.
"""

from __future__ import annotations

import struct

# linux/bpf_common.h
_LOAD_WORD = 0x20  # BPF_LD | BPF_W | BPF_ABS
_AND = 0x54  # BPF_ALU | BPF_AND | BPF_K
_JUMP = 0x05  # BPF_JMP | BPF_JA
_JUMP_EQUAL = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_JUMP_AT_LEAST = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_JUMP_ANY_BIT = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN = 0x06  # BPF_RET | BPF_K

INSTRUCTION_SIZE = 8
_FARTHEST = 255  # a conditional jump's distance is one byte

# struct seccomp_data of linux/seccomp.h
NUMBER = 0
ARCH = 4


def argument(index: int, *, high: bool = False) -> int:
    """Return the offset of one half of a system call's argument, on a little-endian machine."""
    return 16 + 8 * index + (4 if high else 0)


def _instruction(code: int, operand: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("<HBBI", code, if_true, if_false, operand)


def _size(block: bytes) -> int:
    return len(block) // INSTRUCTION_SIZE


def ret(action: int) -> bytes:
    """Return the block that ends the program with a SECCOMP_RET_* value."""
    return _instruction(_RETURN, action)


def look_at(offset: int, block: bytes, *, mask: int | None = None) -> bytes:
    """Run `block` on the 32 bits at `offset` of struct seccomp_data, ANDed with `mask`."""
    masked = b"" if mask is None else _instruction(_AND, mask)
    return _instruction(_LOAD_WORD, offset) + masked + block


def _choose(code: int, operand: int, then: bytes, otherwise: bytes) -> bytes:
    if _size(then) <= _FARTHEST:
        return _instruction(code, operand, 0, _size(then)) + then + otherwise
    return _instruction(code, operand, 1, 0) + _instruction(_JUMP, _size(then)) + then + otherwise


def at_least(bound: int, then: bytes, otherwise: bytes) -> bytes:
    """Run `then` if the accumulator, unsigned, is `bound` or more."""
    return _choose(_JUMP_AT_LEAST, bound, then, otherwise)


def any_bit(mask: int, then: bytes, otherwise: bytes) -> bytes:
    """Run `then` if the accumulator has a bit of `mask`."""
    return _choose(_JUMP_ANY_BIT, mask, then, otherwise)


def one_of(values: tuple[int, ...], then: bytes, otherwise: bytes) -> bytes:
    """Run `then` if the accumulator is one of `values`, which are few."""
    block = _choose(_JUMP_EQUAL, values[-1], then, otherwise)
    distance = _size(block) - _size(then) - _size(otherwise)
    for value in reversed(values[:-1]):
        block = _instruction(_JUMP_EQUAL, value, distance) + block
        distance += 1
    return block


def dispatch(cases: dict[int, bytes], otherwise: bytes) -> bytes:
    """Run the block that `cases` holds for the accumulator, found by a balanced binary search."""
    starts: list[tuple[int, bytes]] = [(0, otherwise)]
    for value in sorted(cases):
        starts += [(value, cases[value]), (value + 1, otherwise)]
    latest = dict(starts)  # of two blocks at one start the later holds: a case, not the end of the one before
    ranges: list[tuple[int, bytes]] = []
    for start, block in latest.items():
        if not ranges or ranges[-1][1] != block:
            ranges.append((start, block))
    return _search(ranges)


def _search(ranges: list[tuple[int, bytes]]) -> bytes:
    if len(ranges) == 1:
        return ranges[0][1]
    middle = len(ranges) // 2
    return at_least(ranges[middle][0], _search(ranges[middle:]), _search(ranges[:middle]))
