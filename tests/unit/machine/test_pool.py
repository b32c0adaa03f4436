"""Ready VMs, without any that boots."""

from __future__ import annotations

from typing import Any

import pytest

from agentos.errors import BootFailed
from agentos.machine import pool
from agentos.model import VmSpec

BAD = VmSpec(hostname="bad")


def test_a_kind_that_cannot_be_made_keeps_no_other_from_being_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried once each time, and the others are brought to their size."""
    made: list[str] = []

    def make(spec: VmSpec) -> Any:
        made.append(spec.hostname)
        if spec == BAD:
            raise BootFailed("no")
        return object()

    monkeypatch.setattr(pool, "_get_ready", lambda raw: None)
    shelves = pool.Pool(make, lambda storage: None)
    for spec in (BAD, VmSpec(hostname="one"), VmSpec(hostname="two")):
        shelves.keep(spec, 2)
    shelves.fill()
    assert (sorted(made), len(shelves.ready())) == (["bad", "one", "one", "two", "two"], 4)
