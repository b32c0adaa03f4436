"""Every attempt is held by the product, and gets out of a copy that lacks the defence: see README.md beside this."""

from __future__ import annotations

import functools

import pytest

from tests.escape.matrix import MINUTES, Outcome, groups, lacks, make, mode_here
from tests.escape.stage import ALL

MODE = mode_here()
GROUPS = groups(ALL, MODE)


@functools.cache
def on_the_product() -> Outcome:
    """All attempts, made once."""
    return make(list(ALL))


@pytest.mark.timeout(MINUTES * 60 + 20)
@pytest.mark.parametrize("name", ALL)
def test_it_is_held(name: str) -> None:
    """On the product, in whatever mode this user has, no attempt succeeds."""
    success, seen = on_the_product()[name]
    assert success == (MODE in ALL[name].unpromised), seen
    assert not seen.startswith("the stage broke down"), seen


@pytest.mark.timeout(MINUTES * 60 + 20)
@pytest.mark.parametrize("without", GROUPS, ids=" + ".join)
def test_it_gets_out_without_the_defence(without: tuple[str, ...]) -> None:
    """So the attempt is a real one, and the defence what holds it."""
    outcome = make(GROUPS[without], without)
    held = {name: seen for name, (success, seen) in outcome.items() if not success}
    assert {name: seen for name, seen in held.items() if not lacks(ALL[name], seen)} == {}


def test_the_table_is_of_the_size_that_is_promised() -> None:
    """Each attempt once, most of them shown to succeed here."""
    assert len(ALL) >= 150
    assert sum(map(len, GROUPS.values())) >= {"root": 150, "subuid": 100, "single": 60}[MODE]
