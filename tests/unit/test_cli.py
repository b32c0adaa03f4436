"""The command line before anything is asked of a server."""

from __future__ import annotations

import subprocess
import sys

import pytest

from agentos.cli import parse
from agentos.commands.remote import printable, table


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("exec KEY ls", ["ls"]),
        ("exec KEY ls -la --json", ["ls", "-la", "--json"]),
        ("exec KEY -- ls -la", ["ls", "-la"]),
        ("exec KEY --user root -- ls -- -la", ["ls", "--", "-la"]),
        ("exec KEY --user root ls -u x", ["ls", "-u", "x"]),
        ("exec KEY -u root printf -- %s x", ["printf", "--", "%s", "x"]),
        ("exec -u root KEY printf -- %s x", ["printf", "--", "%s", "x"]),
        ("exec -itu root KEY -- -dash", ["-dash"]),
        ("spawn KEY sleep 5", ["sleep", "5"]),
    ],
)
def test_words_of_a_command_are_left_as_they_are(line: str, words: list[str]) -> None:
    """Wherever our own options are."""
    arguments = parse(line.split())
    assert (arguments.key, arguments.words) == ("KEY", words)
    assert arguments.user == ("root" if "root" in line else None)


def test_half_an_option_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    """It would be another's, sooner or later."""
    with pytest.raises(SystemExit):
        parse(["ls", "--nam", "x"])
    assert "unrecognized arguments: --nam" in capsys.readouterr().err


def test_options_without_a_command() -> None:
    """As `shell` has them."""
    arguments = parse(["shell", "KEY", "--attach", "shell-1"])
    assert (arguments.key, arguments.attach, arguments.words) == ("KEY", "shell-1", [])


def test_control_characters_are_shown_not_obeyed() -> None:
    """What a guest calls its programs and files goes to somebody's terminal."""
    assert printable("plain größe €") == "plain größe €"
    assert printable("\x1b]0;owned\x07\r\n") == r"\x1b]0;owned\x07\r\n"
    assert "\x1b" not in table(["A", "B"], [["\x1b[2J", "x\x1b[H"]])


def test_a_command_does_not_wait_for_what_it_does_not_use() -> None:
    """A client's command is over sooner than all of the library is imported."""
    program = "import agentos.cli, sys; print(*(one for one in sys.modules if one.startswith('agentos.')))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    imported = {one.split(".")[1] for one in done.stdout.split()}
    assert imported.isdisjoint({"machine", "host", "server", "client", "registry", "linux"})
