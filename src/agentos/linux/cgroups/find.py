"""Where this process's cgroup directories are: text of /proc in, paths out.

Pure: nothing is opened. See proc(5), cgroups(7) and cgroup_namespaces(7).
"""

from __future__ import annotations

V2 = ""
"""The key of the version 2 hierarchy among memberships: its line names no controller."""


class Mount:
    """A line of /proc/self/mountinfo: directory `root` of a file system is seen at `mount_point`."""

    __slots__ = ("fstype", "mount_point", "options", "root")

    def __init__(self, root: str, mount_point: str, fstype: str, options: frozenset[str]) -> None:
        self.root = root
        self.mount_point = mount_point
        self.fstype = fstype
        self.options = options


def parse_memberships(text: str) -> dict[str, str]:
    """/proc/self/cgroup as controller -> path in its hierarchy; V2 is the key of version 2.

    Controllers mounted together give one entry each. Lines that are not understood are passed over.
    """
    found = {}
    for line in text.splitlines():
        # The path comes last and may itself hold colons.
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[2].startswith("/"):
            for controller in parts[1].split(","):
                found[controller] = parts[2]
    return found


def unescape(text: str) -> str:
    """`text` of mountinfo with its octal escapes (\\040 for a space, \\134 for a backslash) resolved."""
    if "\\" not in text:
        return text
    first, *rest = text.split("\\")
    pieces = [first]
    for piece in rest:
        digits = piece[:3]
        if len(digits) == 3 and all(one in "01234567" for one in digits):
            pieces.append(chr(int(digits, 8)) + piece[3:])
        else:
            pieces.append("\\" + piece)
    return "".join(pieces)


def parse_mounts(text: str) -> list[Mount]:
    """The mounts of /proc/self/mountinfo, without those hidden by a later one on the same mount point."""
    visible: dict[str, Mount] = {}
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        fields, tail = before.split(" "), after.split(" ")
        if not dash or len(fields) < 6 or len(tail) < 3:
            continue
        mount = Mount(unescape(fields[3]), unescape(fields[4]), tail[0], frozenset(tail[2].split(",")))
        visible.pop(mount.mount_point, None)
        visible[mount.mount_point] = mount
    return list(visible.values())


def locate(path: str, mount: Mount) -> str | None:
    """The directory that shows cgroup `path` through `mount`; None where `path` lies outside of it.

    `path` and the mount's root are relative to this process's cgroup namespace; either begins with
    /.. where it lies above that namespace's root (cgroup_namespaces(7)).
    """
    if path == "/.." or path.startswith("/../"):
        return None
    root = mount.root.rstrip("/")
    if path != root and not path.startswith(root + "/"):
        return None
    return (mount.mount_point.rstrip("/") + path[len(root) :]).rstrip("/") or "/"


def own_directories(controller: str, memberships: dict[str, str], mounts: list[Mount]) -> list[str]:
    """Directories that show this process's own cgroup for `controller` (or V2), the newest mount first."""
    path = memberships.get(controller)
    if path is None:
        return []
    found = []
    for mount in reversed(mounts):
        if controller == V2:
            fits = mount.fstype == "cgroup2"
        else:
            fits = mount.fstype == "cgroup" and controller in mount.options
        directory = locate(path, mount) if fits else None
        if directory is not None:
            found.append(directory)
    return found
