"""Programs that use up what a VM may use, without end: run inside VMs by tests and by bench/neighbour.py.

Each says `full` on stdout when it has met its limit for the first time, and goes on until it is killed.
"""

from __future__ import annotations

from typing import NamedTuple

from agentos import Limits

MIB = 1024 * 1024


class Attack(NamedTuple):
    """A program, as Python source, and the resource that it goes for."""

    name: str
    source: str
    limit: str | None = None
    """The limit of Limits that it meets, None where the kernel's own bound is what stops it."""
    says_full: bool = True
    starves: bool = False
    """Whether the VM has no memory left for anything else as long as it goes on."""
    needs_cgroup: bool = False
    """Whether without cgroups nothing stops it."""


LIMITS = Limits(
    memory_bytes=128 * MIB,
    processes=128,
    disk_bytes=32 * MIB,
    disk_files=4000,
    shm_bytes=8 * MIB,
    open_files=256,
)
"""What the attacked VM has."""

_HEAD = """\
import ctypes, errno, itertools, mmap, os, resource, select, signal, socket, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)
def full(what=""):
    global full
    os.write(1, b"full " + str(what).encode() + b"\\n")
    full = lambda what="": None
def pause():
    time.sleep(0.002)
"""


def _attack(name: str, source: str, limit: str | None = None, **more: bool) -> Attack:
    return Attack(name, _HEAD + source, limit, **more)


ATTACKS = (
    _attack(
        "fork_bomb",
        """\
while True:
    try: os.fork()
    except OSError as e: full(e.errno)
""",
        "processes",
    ),
    _attack(
        "fork_bomb_setsid",
        """\
# Each child leaves its session and parent, and does it again.
while True:
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork(): os._exit(0)
    except OSError as e: full(e.errno)
""",
        "processes",
    ),
    _attack(
        "threads",
        """\
threading.stack_size(65536)
def sleep():
    while True: time.sleep(1000)
while True:
    try: threading.Thread(target=sleep, daemon=True).start()
    except RuntimeError: full(); pause()
""",
        "processes",
    ),
    _attack(
        "memory",
        """\
if os.fork():
    while True:
        os.wait(); full()
        if os.fork() == 0: break
b = []
while True: b.append(bytearray(b"x" * (1 << 20)))
""",
        "memory_bytes",
        needs_cgroup=True,
    ),
    _attack(
        "memory_of_many",
        """\
def eat():
    b = bytearray(b"x" * (4 << 20))
    while True: time.sleep(1000)
alive = 0
while True:
    try:
        alive += 1
        if os.fork() == 0: eat()
    except OSError: pause()
    while True:
        try: pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: break
        if not pid: break
        if os.WIFSIGNALED(status): full()
""",
        "memory_bytes",
        needs_cgroup=True,
    ),
    _attack(
        "shared_memory",
        """\
# Files in /dev/shm, memfds, System V segments and anonymous shared mappings.
kept = []
while True:
    fd = os.memfd_create("x")
    try:
        os.posix_fallocate(fd, 0, 8 << 20)
        kept.append(fd)
    except OSError as e: full(e.errno); os.close(fd); pause()
    kept.append(mmap.mmap(-1, 8 << 20)); kept[-1].write(b"x" * (8 << 20))
""",
        "memory_bytes",
        says_full=False,
        needs_cgroup=True,
    ),
    _attack(
        "page_cache",
        """\
while True:
    for directory, _, names in os.walk("/usr"):
        for name in names:
            try:
                with open(directory + "/" + name, "rb", 0) as file:
                    while file.read(1 << 20): pass
            except OSError: pass
""",
        "memory_bytes",
        says_full=False,
    ),
    _attack(
        "disk",
        """\
fd = os.open("/var/tmp/big", os.O_CREAT | os.O_RDWR)
block = b"x" * (1 << 20)
while True:
    try: os.write(fd, block)
    except OSError as e: full(e.errno); os.ftruncate(fd, 0); os.lseek(fd, 0, 0)
""",
        "disk_bytes",
    ),
    _attack(
        "inodes",
        """\
os.mkdir("/var/tmp/many")
for n in itertools.count():
    try: os.close(os.open(f"/var/tmp/many/{n}", os.O_CREAT | os.O_WRONLY))
    except OSError as e: full(e.errno); pause()
""",
        "disk_files",
    ),
    _attack(
        "descriptors",
        """\
# In as many processes as there may be.
for _ in range(100):
    try:
        if os.fork() == 0: break
    except OSError: break
while True:
    try: os.open("/dev/null", 0)
    except OSError as e: full(e.errno); time.sleep(1)
""",
        "open_files",
    ),
    _attack(
        "ptys",
        """\
for n in itertools.count():
    try: os.open("/dev/ptmx", os.O_RDWR | os.O_NOCTTY)
    except OSError as e:
        full(f"{n} {e.errno}")
        if e.errno != errno.EMFILE or os.fork(): time.sleep(1000)
        os.closerange(3, 1 << 16)
""",
    ),
    _attack(
        "log_flood",
        """\
full()
block = b"x" * 65536
while True: os.write(1, block); os.write(2, block)
""",
        "runaway_bytes",
    ),
    _attack(
        "tiny_writes",
        """\
full()
while True: os.write(1, b"x\\n")
""",
        "runaway_bytes",
    ),
    _attack(
        "signals",
        """\
# Whatever there is besides this process: pid 1, spawners, file workers.
full()
numbers = [n for n in range(1, 65) if n not in (32, 33)]
while True:
    for pid in (1, -1, *range(2, 40)):
        if pid == os.getpid(): continue
        for number in numbers if pid != -1 else (0,):
            try: os.kill(pid, number)
            except OSError: pass
""",
    ),
    _attack(
        "stopping_signals",
        """\
full()
while True:
    for pid in range(1, 60):
        if pid != os.getpid():
            for number in (signal.SIGSTOP, signal.SIGKILL):
                try: os.kill(pid, number)
                except OSError: pass
""",
    ),
    _attack(
        "inotify",
        """\
for n in itertools.count():
    fd = libc.inotify_init1(0)
    if fd < 0:
        full(f"{n} {ctypes.get_errno()}")
        if ctypes.get_errno() != errno.EMFILE: time.sleep(1000)
        time.sleep(1)
""",
    ),
    _attack(
        "kernel_objects",
        """\
# Sockets, pipes, epolls, timers, eventfds with all that fits in them; in many processes.
def set_oom_score(number):
    with open("/proc/self/oom_score_adj", "w") as file: file.write(str(number))
set_oom_score(0)  # so that the kernel ends others, and who is to be killed is still there
for _ in range(60):
    try:
        if os.fork() == 0:
            set_oom_score(500)
            break
    except OSError: break
else:
    while True:
        try: os.wait()
        except OSError: time.sleep(1000)
while True:
    kept = []
    try:
        while True:
            a, b = socket.socketpair()
            a.setblocking(False)
            try:
                while True: a.send(b"x" * 4096)
            except BlockingIOError: pass
            r, w = os.pipe()
            os.set_blocking(w, False)
            try:
                while True: os.write(w, b"x" * 4096)
            except BlockingIOError: pass
            kept += [a, b]
            epoll = select.epoll(); kept.append(epoll)
            for fd in range(3, w):
                try: epoll.register(fd, 1)
                except OSError: pass
    except OSError as e: full(e.errno); time.sleep(2)
""",
        "memory_bytes",
        says_full=False,
        starves=True,
        needs_cgroup=True,
    ),
    _attack(
        "sysv_and_mqueue",
        """\
for n in itertools.count():
    failed = 0
    for call in ("shmget", "semget", "msgget"):
        args = {"shmget": (0, 1 << 16, 0o1600), "semget": (0, 200, 0o1600), "msgget": (0, 0o1600)}[call]
        if getattr(libc, call)(*args) < 0: failed += 1
    name = f"/q{n}".encode()
    if libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None) < 0: failed += 1
    if failed == 4: full(); time.sleep(1)
""",
        says_full=False,
    ),
    _attack(
        "timers",
        """\
while True:
    id = ctypes.c_void_p()
    if libc.timer_create(1, None, ctypes.byref(id)) < 0: full(ctypes.get_errno()); time.sleep(1)
""",
    ),
    _attack(
        "spin",
        """\
full()
for _ in range(440):
    try:
        if os.fork() == 0: break
    except OSError: break
while True: pass
""",
    ),
    _attack(
        "arguments",
        """\
# As large as the kernel takes them, again and again.
full()
big = "x" * 131000
while True:
    pids = []
    for _ in range(8):
        try: pid = os.fork()
        except OSError: break
        if pid == 0:
            try: os.execve("/bin/true", ["true"] + [big] * 7, {str(n): big for n in range(7)})
            finally: os._exit(1)
        pids.append(pid)
    for pid in pids: os.waitpid(pid, 0)
""",
    ),
    _attack(
        "deep_directory",
        """\
os.mkdir("/var/tmp/deep"); os.chdir("/var/tmp/deep")
while True:
    try: os.mkdir("d" * 200); os.chdir("d" * 200)
    except OSError as e: full(e.errno); pause()
""",
        "disk_files",
    ),
    _attack(
        "unlinked_files",
        """\
# Nothing of it is to be seen in any directory.
kept = []
for n in itertools.count():
    try:
        fd = os.open("/var/tmp", os.O_TMPFILE | os.O_RDWR)
        os.posix_fallocate(fd, 0, 1 << 20)
        kept.append(fd)
    except OSError as e: full(e.errno); pause()
""",
        "disk_bytes",
    ),
)
BY_NAME = {attack.name: attack for attack in ATTACKS}
