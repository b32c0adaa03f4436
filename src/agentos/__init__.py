"""agentos: an operating system for AI agents.

The public names. `VM` boots an isolated Linux VM in this process; `setup(use={"vm": agent_os()}).start()` serves
VMs on a port, `create_client` uses them from anywhere. Only the last two need more than the standard library.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from agentos.client.aio import create_client
    from agentos.errors import AgentOSError
    from agentos.host import Host
    from agentos.machine.process import Process
    from agentos.machine.shell import Shell
    from agentos.machine.vm import VM
    from agentos.model import ExecResult, Limits, Mount, VmSpec
    from agentos.network.rules import Network
    from agentos.registry import agent_os, setup

__version__ = "0.1.0"

__all__ = [
    "VM",
    "AgentOSError",
    "ExecResult",
    "Host",
    "Limits",
    "Mount",
    "Network",
    "Process",
    "Shell",
    "VmSpec",
    "__version__",
    "agent_os",
    "create_client",
    "setup",
]

_WHERE = {
    "VM": "agentos.machine.vm",
    "AgentOSError": "agentos.errors",
    "ExecResult": "agentos.model",
    "Host": "agentos.host",
    "Limits": "agentos.model",
    "Mount": "agentos.model",
    "Network": "agentos.network.rules",
    "Process": "agentos.machine.process",
    "Shell": "agentos.machine.shell",
    "VmSpec": "agentos.model",
    "agent_os": "agentos.registry",
    "create_client": "agentos.client.aio",
    "setup": "agentos.registry",
}
"""Each is imported when it is asked for: a client does not wait for what boots VMs, nor a VM for the server."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_WHERE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
