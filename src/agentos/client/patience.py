"""How long, and how often, a server is tried again that does not come through."""

from __future__ import annotations

import time
from typing import Final

from agentos.errors import AgentOSError

PATIENCE_SECONDS: Final = 60.0
"""While the server takes connections, and they break: so long after the last thing that came through."""
AWAY_SECONDS: Final = 20.0
"""While nobody takes a connection: time for a server to start again."""
_DELAYS: Final = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
"""Seconds before each further try; the last one from then on."""


class Patience:
    """That for one thing which is wanted of a server."""

    def __init__(self) -> None:
        self._tries = 0
        self._since = 0.0
        self._away_since: float | None = None

    def rewarded(self) -> None:
        """Something came through."""
        self._tries = 0
        self._away_since = None

    def delay(self, failure: AgentOSError) -> float | None:
        """Seconds until it is to be tried again after this failure; None: it was enough."""
        now = time.monotonic()
        if not self._tries:
            self._since = now
        if "reason" not in failure.details:
            self._away_since = None
        elif self._away_since is None:
            self._away_since = now
        if now - self._since >= PATIENCE_SECONDS:
            return None
        if self._away_since is not None and now - self._away_since >= AWAY_SECONDS:
            return None
        self._tries += 1
        return _DELAYS[min(self._tries, len(_DELAYS)) - 1]
