"""A small internet in network namespaces of its own, and a host in it: runs a program there.

    python internet.py PROGRAM ARGUMENT...

Two namespaces and a cable between them. In one is the host, whose process runs the program and boots the VMs; in
the other are all the servers: names, web, echo, and some that no VM must ever reach. As an ordinary user the
namespaces belong to a user namespace, and the program is run without any privilege over them.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[2] / "src")]

from agentos.linux import syscalls  # noqa: E402

HOST, HOST6 = "192.168.77.1", "fd77::1"
ROUTER, ROUTER6 = "192.168.77.2", "fd77::2"
DNS = "8.8.4.4"
WEB, OTHER, WEB6 = "93.184.216.34", "198.35.26.96", "2606:2800:220:1::1"
PRIVATE, METADATA = "10.1.2.3", "169.254.169.254"
ELSEWHERE = (DNS, WEB, OTHER, PRIVATE, METADATA, "100.64.7.7", "100.100.100.200", "168.63.129.16")
ELSEWHERE6 = (WEB6, "fd00:ec2::254", "64:ff9b::a01:203", "2002:7f00:1::1")


def become_a_host() -> None:
    """Enter new namespaces, with this user's own ids, and all privileges over them until the next execve(2)."""
    uid, gid = os.getuid(), os.getgid()
    if uid:
        syscalls.unshare(syscalls.CLONE_NEWUSER)
        for name, content in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            Path(f"/proc/self/{name}").write_text(content)
    syscalls.unshare(syscalls.CLONE_NEWNET | syscalls.CLONE_NEWNS)
    syscalls.mount("", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
    with tempfile.NamedTemporaryFile("w", dir="/tmp") as file:
        file.write(f"nameserver {DNS}\n")
        file.flush()
        os.chmod(file.name, 0o644)
        bind(file.name, os.path.realpath("/etc/resolv.conf"))
    if uid and os.path.exists("/etc/subuid"):
        bind("/dev/null", "/etc/subuid")  # newuidmap cannot give what this namespace does not have


def bind(source: str, target: str) -> None:
    """Show `source` at `target`."""
    bind_flag = 4096
    syscalls.mount(source, target, "", bind_flag)


def keep_capabilities() -> None:
    """In a child before its execve(2): for whoever is not root only ambient privileges outlive that."""
    if os.getuid():
        net_admin = 12
        mask = 1 << net_admin
        syscalls.capset(mask, mask, mask)
        syscalls.prctl(47, 2, net_admin)  # PR_CAP_AMBIENT, PR_CAP_AMBIENT_RAISE


def start_servers() -> socket.socket:
    """The rest of the world, at the other end of the cable."""
    ours, theirs = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        syscalls.prctl(syscalls.PR_SET_PDEATHSIG, 9)
        syscalls.unshare(syscalls.CLONE_NEWNET)
        theirs.send(b"n")
        theirs.recv(1)
        for arguments in (
            ["link", "set", "lo", "up"],
            ["link", "set", "cable1", "up"],
            ["address", "add", f"{ROUTER}/24", "dev", "cable1"],
            ["-6", "address", "add", f"{ROUTER6}/64", "dev", "cable1", "nodad"],
            *(["address", "add", f"{one}/32", "dev", "lo"] for one in ELSEWHERE),
            *(["-6", "address", "add", f"{one}/128", "dev", "lo", "nodad"] for one in ELSEWHERE6),
        ):
            ip_here(*arguments)
        import servers

        servers.serve(theirs)
        os._exit(0)
    theirs.close()
    ours.recv(1)
    ip_here("link", "add", "cable0", "type", "veth", "peer", "name", "cable1")
    ip_here("link", "set", "cable1", "netns", str(pid))
    for arguments in (
        ["link", "set", "lo", "up"],
        ["link", "set", "cable0", "up"],
        ["address", "add", f"{HOST}/24", "dev", "cable0"],
        ["-6", "address", "add", f"{HOST6}/64", "dev", "cable0", "nodad"],
        ["route", "add", "default", "via", ROUTER],
        ["-6", "route", "add", "default", "via", ROUTER6],
    ):
        ip_here(*arguments)
    ours.send(b"g")
    assert ours.recv(1) == b"r", "the servers did not start"
    return ours


def ip_here(*arguments: str) -> None:
    """ip(8) with this process's privileges."""
    subprocess.run(["ip", *arguments], check=True, preexec_fn=keep_capabilities)


def main() -> None:
    """Lay the cable, start the servers, and become the program."""
    become_a_host()
    keep = start_servers()
    os.set_inheritable(keep.fileno(), True)
    os.execv(sys.executable, [sys.executable, *sys.argv[1:]])


if __name__ == "__main__":
    main()
