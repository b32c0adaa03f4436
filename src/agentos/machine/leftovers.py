"""Pipes that background children of ended programs still hold: read and dropped, so that the children can write on."""

from __future__ import annotations

from collections import deque

from agentos.machine.pipes import Reader


class Leftovers:
    """At most `most` of them; beyond that the oldest is closed."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._readers: deque[Reader] = deque()

    def keep(self, reader: Reader) -> None:
        """Take over a pipe."""
        reader.discard()
        self._readers.append(reader)
        while len(self._readers) > self._most:
            self._readers.popleft().close()
        while self._readers and not self._readers[0].open:
            self._readers.popleft()

    def close(self) -> None:
        """Close them all."""
        for reader in self._readers:
            reader.close()
        self._readers.clear()
