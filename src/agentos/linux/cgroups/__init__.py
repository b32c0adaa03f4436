"""Limits on a VM's memory, processes and CPU time, through whatever cgroups the host gives (cgroups(7)).

`detect` finds out, controller by controller and by trying, what this process may use: version 1,
version 2, a mix of both, or nothing. `open_scope` makes one parent directory for a host process,
`Scope.create` a VM's cgroup in it. Where a controller is missing its operations do nothing and its
figures are None (or 0 for counts of events), so that no caller branches.

Two processes use this: the one that starts VMs (creates, joins, releases) and the host (reads figures
by path, with `Cgroup.from_dict`). Nothing here knows what a VM is, or imports more than a handful of
modules of the standard library.
"""

from agentos.linux.cgroups.detect import CgroupSetup, detect
from agentos.linux.cgroups.group import Cgroup
from agentos.linux.cgroups.scope import Scope, open_scope, remove, sweep_stale

__all__ = ["Cgroup", "CgroupSetup", "Scope", "detect", "open_scope", "remove", "sweep_stale"]
