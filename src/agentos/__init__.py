"""agentos: an operating system for AI agents.

The public names. `VM` boots an isolated Linux VM in this process; see the README for the rest.
"""

from agentos.errors import AgentOSError
from agentos.host import Host
from agentos.machine.process import Process
from agentos.machine.shell import Shell
from agentos.machine.vm import VM
from agentos.model import ExecResult, Limits, Mount, VmSpec

__version__ = "0.1.0"

__all__ = [
    "VM",
    "AgentOSError",
    "ExecResult",
    "Host",
    "Limits",
    "Mount",
    "Process",
    "Shell",
    "VmSpec",
    "__version__",
]
