"""What the host and a spawner tell each other in each exec, packed, and the spawner's journal."""

from __future__ import annotations

import marshal
import struct
from typing import NamedTuple

from agentos.machine.channel import Pack, Unpack

JOURNAL_ENTRY = struct.Struct("<QQQ")
"""Number of the job, pid (0 while it is about to start), mark."""
REPORT = struct.Struct("<QHQQ?B")
"""A `Report`."""
FULL_DISK = (None, "disk_bytes", "disk_files")
"""The limit that the VM's files have come to."""


pack_job: Pack = marshal.dumps
"""What a spawner is told, packed."""
unpack_job: Unpack = marshal.loads
"""What `pack_job` made: nobody but the host writes to a spawner."""


class Report(NamedTuple):
    """What a spawner says of the end of a job's program."""

    number: int
    """Of the job."""
    status: int
    """As waitpid(2) gives it."""
    cpu_us: int
    max_rss_kib: int
    strangers: bool
    """Whether there is anything that may be of the program's lineage."""
    full: int
    """Index in FULL_DISK."""


def unpack_report(body: bytes) -> Report:
    """The report of an end, from a spawner that may be the guest's: raises ValueError for what is none."""
    if len(body) != REPORT.size or body[-1] >= len(FULL_DISK):
        raise ValueError("no report")
    return Report._make(REPORT.unpack(body))
