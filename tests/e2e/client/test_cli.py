"""The commands that talk to a server, as a person or a script runs them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from agentos.sync import create_client  # type: ignore[attr-defined]

SOURCE = Path(__file__).parents[3] / "src"
COMMAND = (sys.executable, "-W", "error", "-m", "agentos")

Cli = Callable[..., subprocess.CompletedProcess[bytes]]


def environment(url: str) -> dict[str, str]:
    """Of a command that finds the server at `url`."""
    return {**os.environ, "PYTHONPATH": str(SOURCE), "AGENTOS_ENDPOINT": url}


@pytest.fixture
def cli(url: str) -> Cli:
    """Runs a command line to its end."""

    def run(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, *arguments], input=stdin, capture_output=True, timeout=30, env=environment(url)
        )

    return run


@pytest.fixture
def key(cli: Cli) -> Any:
    """The key of a VM that is removed afterwards, where the test made it."""
    made = f"cli-{uuid.uuid4().hex[:8]}"
    yield made
    cli("rm", made)


def test_exec_is_as_if_the_command_ran_here(cli: Cli, key: str) -> None:
    """Output, stdin, exit code; one word for bash, several for a program."""
    done = cli("exec", key, "--", "echo out; echo err >&2; exit 7")
    assert (done.returncode, done.stdout, done.stderr) == (7, b"out\n", b"err\n")
    data = os.urandom(300_000)
    assert cli("exec", key, "--", "cat", stdin=data).stdout == data
    assert cli("exec", key, "--", "printf", "<%s>", "a b", "$HOME", "--").stdout == b"<a b><$HOME><-->"
    done = cli("exec", "-e", "A=b", "--cwd", "/tmp", "--user", "root", key, "--", "echo $A; pwd; id -u")
    assert done.stdout == b"b\n/tmp\n0\n"
    done = cli("exec", "--json", key, "--", "echo hi; exit 3")
    result = json.loads(done.stdout)
    assert (done.returncode, result["stdout"], result["exitCode"]) == (3, "hi\n", 3)
    assert b"no command is given" in cli("exec", key).stderr
    done = cli("exec", "--timeout", "0.2", key, "--", "sleep 1000")
    assert (done.returncode, done.stderr) == (137, b"agentos: killed after 0.2 s\n")


def test_exec_streams(url: str, key: str) -> None:
    """What a command writes comes while it runs; ctrl-c ends it there too."""
    process = subprocess.Popen(
        [*COMMAND, "exec", key, "--", "echo first; read line; echo $line; sleep 1000"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(url),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.readline() == b"first\n"
    process.stdin.write(b"second\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"second\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[1] == b""
    assert process.returncode == 130
    with create_client(url) as client:
        assert client.vm.get(key).all_processes() == []


def test_processes(url: str, cli: Cli, key: str) -> None:
    """ps, logs and kill."""
    with create_client(url) as client:
        agent = client.vm.get_or_create(key)
        process = agent.spawn("sh", ["-c", "echo said; echo wrong >&2; sleep 1000; true"])
        while len(agent.all_processes()) < 2:
            time.sleep(0.01)
        lines = cli("ps", key).stdout.decode().splitlines()
        assert lines[0].split() == ["PID", "PPID", "USER", "STATE", "CPU", "RSS", "DRIVER", "COMMAND"]
        assert re.search(r"native +sleep 1000$", "\n".join(lines), re.MULTILINE)
        assert re.search(r"native +  sleep 1000$", cli("ps", "--tree", key).stdout.decode(), re.MULTILINE)
        assert len(json.loads(cli("ps", key, "--json").stdout)) == 2
        pid = str(process.pid)
        done = cli("logs", key, pid)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"said\n", b"wrong\n")
        assert cli("kill", "-s", "KILL", key, pid).returncode == 0
        assert cli("logs", "-f", key, pid).stdout == b"said\n"
        assert process.wait() == 137
        agent.exec("sleep 1000 > /dev/null 2>&1 &")
        (stray,) = agent.all_processes()
        assert cli("kill", key, str(stray.pid)).returncode == 0
        assert agent.all_processes() == []
    done = cli("kill", key, "99999")
    assert (done.returncode, done.stderr) == (1, b"agentos: Process not found: 99999\n")


def test_cp(cli: Cli, key: str, tmp_path: Path) -> None:
    """Files with their modes, directories, stdin and stdout."""
    data = os.urandom(5_000_000)
    (tmp_path / "file").write_bytes(data)
    (tmp_path / "file").chmod(0o750)
    assert cli("cp", str(tmp_path / "file"), f"{key}:sub/copy").returncode == 0
    assert cli("cp", f"{key}:sub/copy", str(tmp_path / "back")).returncode == 0
    assert (tmp_path / "back").read_bytes() == data
    assert (tmp_path / "back").stat().st_mode & 0o777 == 0o750
    (tmp_path / "tree" / "a").mkdir(parents=True)
    (tmp_path / "tree" / "a" / "f").write_text("in a tree")
    assert cli("cp", str(tmp_path / "tree"), f"{key}:sub").returncode == 0
    assert cli("exec", key, "--", "cat sub/tree/a/f").stdout == b"in a tree"
    assert cli("cp", f"{key}:sub/tree", str(tmp_path / "tree2")).returncode == 0
    assert (tmp_path / "tree2" / "a" / "f").read_text() == "in a tree"
    assert cli("cp", "-", f"{key}:typed", stdin=b"typed").returncode == 0
    assert cli("cp", f"{key}:typed", "-").stdout == b"typed"
    done = cli("cp", f"{key}:nothing", str(tmp_path / "untouched"))
    assert done.returncode == 1
    assert b"No such file" in done.stderr
    assert not (tmp_path / "untouched").exists()
    assert b"No such file" in cli("cp", str(tmp_path / "nothing"), f"{key}:x").stderr
    assert b"KEY:PATH" in cli("cp", "./a:b", "/c").stderr


def test_vms(cli: Cli) -> None:
    """ls and rm, with keys of several parts."""
    key = f"cli/{uuid.uuid4().hex[:8]}"
    assert cli("exec", key, "--", "true").returncode == 0
    assert re.search(rf"^vm +{key} +running +\d{{4}}-", cli("ls").stdout.decode(), re.MULTILINE)
    assert key.split("/") in [one["key"] for one in json.loads(cli("ls", "--json").stdout)]
    assert cli("rm", key).returncode == 0
    assert key not in cli("ls").stdout.decode()
    done = cli("ps", key)
    assert (done.returncode, done.stderr) == (1, b"agentos: there is no VM of this key\n")


def test_nobody_serves(cli: Cli) -> None:
    """One line that says so, one that says what to do."""
    done = cli("ls", "--endpoint", "http://127.0.0.1:9")
    first, second = done.stderr.decode().splitlines()
    assert done.returncode == 1
    assert first.startswith("agentos: nobody answers at http://127.0.0.1:9")
    assert second == "agentos: start a server with `agentos serve`"


class Person:
    """Somebody at a terminal in which a command runs."""

    def __init__(self, url: str, *arguments: str) -> None:
        master, slave = pty.openpty()
        self.fd = master
        self.seen = b""
        self.resize(100, 30)
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdin=slave, stdout=slave, stderr=subprocess.PIPE, start_new_session=True,
            env=environment(url), preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(slave)

    def resize(self, cols: int, rows: int) -> None:
        """Drag the window's corner."""
        import fcntl
        import struct
        import termios

        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, cols, 0, 0))

    def see(self, text: bytes) -> None:
        """Wait until it is on the screen, after what was seen before."""
        end = time.monotonic() + 15
        while text not in self.seen:
            assert select.select([self.fd], [], [], max(0, end - time.monotonic()))[0], self.seen
            try:
                self.seen += os.read(self.fd, 65_536)
            except OSError:  # the terminal's other end is closed
                raise AssertionError(f"{text!r} never came: {self.seen!r} {self.end()}") from None
        self.seen = self.seen.partition(text)[2]

    def type(self, data: bytes) -> None:
        """Type it."""
        os.write(self.fd, data)

    def end(self) -> tuple[int, bytes]:
        """Exit code and stderr."""
        stderr = self.process.communicate(timeout=20)[1]
        os.close(self.fd)
        return self.process.returncode, stderr


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_shell(url: str, cli: Cli, key: str) -> None:
    """A terminal of the right size, that can be left, come back to, and ended with its exit code."""
    person = Person(url, "shell", key)
    person.see(b"$ ")
    person.type(b"stty size\r")
    person.see(b"30 100")
    person.resize(120, 40)
    person.see(b"$ ")
    time.sleep(0.3)
    person.type(b"stty size; x=kept\r")
    person.see(b"40 120")
    person.see(b"$ ")
    person.type(b"\x10")
    time.sleep(0.1)
    person.type(b"\x11")
    code, stderr = person.end()
    assert code == 0
    found = re.search(rb"left running: agentos shell --attach (\S+) (\S+)", stderr)
    assert found, stderr
    assert found[2].decode() == key
    shell_id = found[1].decode()
    assert shell_id in cli("shell", "--list", key).stdout.decode()
    person = Person(url, "shell", key, "--attach", shell_id)
    person.see(b"40 120")
    person.type(b"echo still $x; exit 6\r")
    person.see(b"still kept")
    assert person.end() == (6, b"")
    done = cli("shell", key)
    assert (done.returncode, done.stderr.splitlines()[0]) == (125, b"agentos: a shell needs a terminal")


def test_serve(start: Callable[..., AbstractContextManager[str]], tmp_path: Path) -> None:
    """The default registry, and one that a module makes."""
    with start("agentos", "serve") as url, create_client(url) as client:
        assert client.vm.get_or_create("x").exec("echo served").stdout == "served\n"
    (tmp_path / "mine.py").write_text(
        "from agentos import agent_os, setup\n"
        "registry = setup(use={'worker': agent_os(env={'ROLE': 'worker'})})\n"
    )
    with start("agentos", "serve", "mine:registry", cwd=tmp_path) as url, create_client(url) as client:
        assert client.worker.get_or_create("x").exec("echo $ROLE").stdout == "worker\n"


def test_serve_says_what_is_wrong(cli: Cli) -> None:
    """With a module, a name, an address."""
    assert b"a module that can be imported" in cli("serve", "no_such_module:x").stderr
    assert b"the name of a registry" in cli("serve", "json:registry").stderr
    assert b"as setup() makes it" in cli("serve", "json:dumps").stderr
    assert b"a token is needed" in cli("serve", "--host", "0.0.0.0").stderr
