"""The nested names of verbs: `vm.process.exec` is `vm.exec`, `vm.terminal.open` is `vm.open_shell`.

The same for embedded and remote VMs, async and blocking: each name is looked up on the VM that it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

PROCESS_NAMES: Final = {
    "exec": "exec",
    "exec_file": "exec_file",
    "spawn": "spawn",
    "write_stdin": "write_process_stdin",
    "close_stdin": "close_process_stdin",
    "wait": "wait_process",
    "list": "list_processes",
    "get": "get_process",
    "stop": "stop_process",
    "kill": "kill_process",
    "signal": "signal_process",
    "read_output": "read_process_output",
    "all": "all_processes",
    "tree": "process_tree",
}
TERMINAL_NAMES: Final = {
    "open": "open_shell",
    "write": "write_shell",
    "resize": "resize_shell",
    "close": "close_shell",
    "wait": "wait_shell",
    "list": "list_shells",
    "read": "read_shell",
}

NETWORK_NAMES: Final = {"preview": "create_preview"}

Handle = TypeVar("Handle")


class _Nested:
    _names: dict[str, str]

    def __init__(self, vm: Any) -> None:
        self._vm = vm

    def __getattr__(self, name: str) -> Any:
        verb = self._names.get(name)
        if verb is None:
            raise AttributeError(f"{type(self).__name__} has no verb {name!r}")
        return getattr(self._vm, verb)

    def __dir__(self) -> list[str]:
        return sorted(self._names)


class ProcessVerbs(_Nested, Generic[Handle]):
    """The verbs of a VM's processes by their nested names. Called with a pid, the handle of that process."""

    _names = PROCESS_NAMES

    def __init__(self, vm: Any, handle: Callable[[int], Handle]) -> None:
        super().__init__(vm)
        self._handle = handle

    def __call__(self, pid: int) -> Handle:
        """The handle of a spawned process. Of an embedded VM: ProcessNotFound when there is none of that pid."""
        return self._handle(pid)


class TerminalVerbs(_Nested):
    """The verbs of a VM's shells by their nested names."""

    _names = TERMINAL_NAMES


class NetworkVerbs(_Nested):
    """The verbs of a remote VM's network by their nested names."""

    _names = NETWORK_NAMES
