"""The parts of a VM that every family of verbs uses."""

from __future__ import annotations

from agentos.errors import VmStopped
from agentos.machine.alarms import Alarms
from agentos.machine.leftovers import Leftovers
from agentos.machine.link import Link
from agentos.machine.pipes import Reader
from agentos.machine.shells import Shells
from agentos.machine.spawned import Spawned
from agentos.machine.starts import Starts
from agentos.model import VmSpec


class VmParts:
    """A VM as its verbs see it. `VM` makes the parts; the verbs use them."""

    spec: VmSpec
    boot_id: str
    _link: Link | None
    _alarms: Alarms
    _starts: Starts
    _spawned: Spawned
    _shells: Shells
    _leftovers: Leftovers

    @property
    def link(self) -> Link:
        """The channel to the VM. Raises VmStopped before `start`."""
        if self._link is None:
            raise VmStopped("the VM was not started", reason="new")
        return self._link

    @property
    def running(self) -> bool:
        """Whether it has been started and has not ended."""
        return self._link is not None and not self._link.ended.done()

    def _check_running(self) -> None:
        if not self.running:
            raise self.link.stopped_error()

    def keep_draining(self, reader: Reader) -> None:
        """Go on reading a pipe that a background child holds, so that the child can go on writing."""
        if self.running:
            self._leftovers.keep(reader)
        else:
            reader.close()
