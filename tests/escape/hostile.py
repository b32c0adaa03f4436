"""What a servant of a VM does when the guest has taken it over. Copied into a copy of the package, never the product's.

Runs in the VM in the servant's place, on the servant's socket. The VM's host name says which servants and how:
`evil.KIND.MODE`, with hyphens for spaces.
"""

from __future__ import annotations

import array
import json
import marshal
import os
import select
import socket
import struct
import time

BLOCK = b"\xa5" * 65536


def frame(message: object, fds: int = 0) -> bytes:
    """As `channel` frames."""
    body = json.dumps(message).encode("ascii")
    return struct.pack("<IB", len(body), fds) + body


def raw_frame(body: bytes, fds: int = 0) -> bytes:
    """The same with a body that need not be JSON."""
    return struct.pack("<IB", len(body), fds) + body


def with_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    """Send with descriptors."""
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def job_of(sock: socket.socket) -> int:
    """The number of the first job that is asked for, 7 where there is none."""
    data = b""
    readable, _, _ = select.select([sock], [], [], 1)
    if readable:
        data = sock.recv(65536)
    try:
        return int(marshal.loads(data[5:])["job"])
    except (ValueError, KeyError, EOFError, TypeError):
        return 7


def say_wrong(sock: socket.socket, which: int) -> None:
    """One of WRONG, and then nothing."""
    number = job_of(sock)
    started = {"started": number, "pid": 2, "mark": 3}
    sock.sendall(b"".join(map(frame, WRONG[which](number, started))))
    time.sleep(1000)


WRONG = [
    lambda number, started: [{**started, "pid": -1}],
    lambda number, started: [{**started, "pid": 2**70}],
    lambda number, started: [{**started, "pid": float("inf")}],
    lambda number, started: [{**started, "mark": "x"}],
    lambda number, started: [{**started, "started": [1]}],
    lambda number, started: [{**started, "pid": True}],
    lambda number, started: [started, started],
    lambda number, started: [{"exited": number}],
    lambda number, started: [
        started,
        {"exited": number, "end": [10**30, 0, 0], "strangers": False},
    ],
    lambda number, started: [
        started,
        {"exited": number, "end": [0, float("nan"), 0], "strangers": False},
    ],
    lambda number, started: [{"failed": number, "errno": 10**9, "step": "x"}],
    lambda number, started: [{"failed": {}, "errno": 1, "step": "x"}],
    lambda number, started: [{"unheard": "of"}],
    lambda number, started: [{"id": 1}, {"ev": "booted"}],
]


def flood(sock: socket.socket, data: bytes) -> None:
    """The same again and again, for as long as it is taken."""
    while True:
        sock.sendall(data)


def loose_descriptors(sock: socket.socket) -> None:
    """A frame that never ends, and sixteen descriptors with each of its bytes."""
    fd = os.open("/dev/null", os.O_RDONLY)
    sock.sendall(struct.pack("<IB", 60000, 16))
    while True:
        with_fds(sock, b" ", [fd] * 16)


def no_terminal(sock: socket.socket) -> None:
    """A fifo in place of a terminal, which would block whoever reads it."""
    number = job_of(sock)
    os.mkfifo("/tmp/fifo") if not os.path.exists("/tmp/fifo") else None
    fd = os.open("/tmp/fifo", os.O_RDWR)
    with_fds(sock, frame({"started": number, "pid": 2, "mark": 3}, 1), [fd])
    time.sleep(1000)


def no_socket(sock: socket.socket) -> None:
    """The same in place of a connection."""
    left, _right = socket.socketpair()
    sock.recv(1)
    with_fds(sock, frame({"id": 1, "errno": 0}, 1), [left.fileno()])
    time.sleep(1000)


def unasked(sock: socket.socket) -> None:
    """A connection that nobody has asked for, again and again."""
    sock.recv(1)
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as loose:
        while True:
            with_fds(sock, frame({"id": 2, "errno": 0}, 1), [loose.fileno()])


def files_data(sock: socket.socket) -> None:
    """A file worker that is ready, and then sends data for ever, whatever was asked."""
    sock.sendall(b"R" + struct.pack("<I", 2) + b"{}")
    sock.recv(1)
    flood(sock, b"D" + struct.pack("<I", 65536) + BLOCK)


def files_names(sock: socket.socket) -> None:
    """The same with names."""
    page = json.dumps(["n" * 100] * 300).encode()
    sock.sendall(b"R" + struct.pack("<I", 2) + b"{}")
    sock.recv(1)
    flood(sock, b"P" + struct.pack("<I", len(page)) + page)


def files_deep(sock: socket.socket) -> None:
    """An answer of brackets."""
    deep = b"[" * 100_000
    sock.sendall(b"R" + struct.pack("<I", 2) + b"{}")
    sock.recv(1)
    flood(sock, b"R" + struct.pack("<I", len(deep)) + deep)


def files_lies(sock: socket.socket) -> None:
    """Wrong types where numbers and names belong."""
    lie = json.dumps(
        {"size": "x", "mode": -1, "type": [], "exists": {}, "error": "many", "limit": None}
    ).encode()
    sock.sendall(b"R" + struct.pack("<I", 2) + b"{}")
    sock.recv(1)
    sock.sendall(b"R" + struct.pack("<I", len(lie)) + lie)
    time.sleep(1000)


def closes(sock: socket.socket) -> None:
    """It ends."""


MODES = {
    "garbage": lambda sock: flood(sock, BLOCK),
    "zeros": lambda sock: flood(sock, bytes(65536)),
    "giant": lambda sock: flood(sock, struct.pack("<IB", 0xFFFFFFFF, 0)),
    "large": lambda sock: flood(sock, raw_frame(b" " * (8 * 1024 * 1024))),
    "many": lambda sock: flood(sock, frame({"told": 1}) * 1000),
    "deep": lambda sock: sock.sendall(raw_frame(b"[" * 50_000)) or time.sleep(1000),
    "brackets": lambda sock: flood(sock, raw_frame(b'{"a":[' + b"[]," * 20_000 + b"1]}")),
    "digits": lambda sock: flood(sock, raw_frame(b'{"exited":' + b"9" * 50_000 + b"}")),
    "promises": lambda sock: flood(sock, frame({"told": 1}, 16)),
    "loose descriptors": loose_descriptors,
    "no terminal": no_terminal,
    "no socket": no_socket,
    "unasked": unasked,
    "silent": lambda sock: time.sleep(1000),
    "closes": closes,
    "data": files_data,
    "names": files_names,
    "nested": files_deep,
    "lies": files_lies,
}


def takes_over(kind: str) -> bool:
    """Whether a servant of this kind is hostile in this VM."""
    names = os.uname().nodename.split(".")
    return names[0] == "evil" and (names[1] == kind or (names[1], kind) == ("spawner", "reserve"))


def serve(sock: socket.socket) -> int:
    """Be hostile until the host closes the socket."""
    try:
        mode = os.uname().nodename.split(".")[2].replace("-", " ")
        if mode.startswith("wrong "):
            say_wrong(sock, int(mode.split()[1]))
        else:
            MODES[mode](sock)
    except OSError:
        pass
    return 0
