"""The escape tests take defences out of copies of the source by their text: the text has to be there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.escape.mutations import DEFENCES, mutate


@pytest.mark.parametrize("name", DEFENCES)
def test_the_text_of_a_defence_is_found(name: str, tmp_path: Path) -> None:
    """A change of the source that moves a defence is to be followed in tests/escape/mutations.py."""
    mutate(tmp_path, (name,))
