"""The commands that talk to a server, as a person or a script runs them."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import uuid
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
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
    data = os.urandom(3_000_000)
    assert cli("exec", "-i", key, "cat", stdin=data).stdout == data
    assert cli("exec", key, "printf", "<%s>", "a b", "$HOME", "--").stdout == b"<a b><$HOME><-->"
    done = cli("exec", "-e", "A=b", "-w", "/tmp", "-u", "root", key, "--", "echo $A; pwd; id -u")
    assert done.stdout == b"b\n/tmp\n0\n"
    assert (
        cli("exec", "-e", "AGENTOS_ENDPOINT", "-e", "NOT_SET_HERE", key, "env").stdout.count(
            b"AGENTOS_ENDPOINT=http"
        )
        == 1
    )
    done = cli("exec", "--json", key, "--", "cat; exit 3", stdin=b"hi\n")
    result = json.loads(done.stdout)
    assert (done.returncode, result["stdout"], result["exitCode"]) == (3, "hi\n", 3)
    done = cli("exec", "--timeout", "200ms", key, "--", "sleep 1000")
    assert (done.returncode, done.stderr) == (137, b"agentos: killed after 0.2 s\n")
    # who reads no more ends it, as anywhere
    head = cli("exec", key, "--", "head -c 3", stdin=data)
    assert (head.returncode, head.stdout) == (0, data[:3])


def test_exit_codes_are_those_of_docker(cli: Cli, key: str) -> None:
    """125: agentos itself; 126: it may not be run; 127: there is none; else the command's own, signals included."""
    assert cli("exec", key, "--", "kill -9 $$").returncode == 137
    assert cli("exec", key, "--", "no-such-program").returncode == 127
    assert cli("exec", key, "--", "-no-option; exit 3").returncode == 3
    for code, word, said in (
        (127, "no-such-program", b"No such file"),
        (126, "/etc/passwd", b"Permission denied"),
    ):
        for command in ("exec", "spawn"):
            done = cli(command, key, word, "argument")
            assert done.returncode == code
            assert done.stdout == b""
            assert said in done.stderr
            assert done.stderr.count(b"\n") == 1
    assert cli("exec", "-w", "/no/such", key, "ls", "-l").returncode == 126
    for line in (
        ("exec", key), ("exec", "-e", "=b", key, "true"), ("exec", "-u", "nobody-here", key, "true"),
        ("exec", "--endpoint", "http://127.0.0.1:9", key, "true"), ("exec", "-it", key, "bash"),
        ("exec", "-t", "--timeout", "1", key, "bash"), ("spawn", key), ("shell", key),
    ):  # fmt: skip
        done = cli(*line)
        assert (done.returncode, done.stdout) == (125, b""), line
        assert done.stderr.startswith(b"agentos: "), line


def test_with_json_an_error_is_an_object_too(cli: Cli, key: str) -> None:
    """On stderr, alone, with the exit code that it has in words; on stdout is a result or nothing."""
    elsewhere = ("--endpoint", "http://127.0.0.1:9")
    for line, exit_code, code, said in (
        (("exec", "--json", key, "no-such-program", "x"), 127, "process.spawn_failed", "No such file"),
        (("spawn", "--json", key, "no-such-program", "x"), 127, "process.spawn_failed", "No such file"),
        (("exec", "--json", "-u", "nobody-here", key, "true"), 125, "request.invalid", "^user: wanted"),
        (("exec", "--json", key), 125, "request.invalid", "no command"),
        (("ps", "--json", "nobody-made-it"), 1, "vm.not_found", "'nobody-made-it'"),
        (("shell", "--list", "--json", "nobody-made-it"), 125, "vm.not_found", "'nobody-made-it'"),
        (("ls", "--json", *elsewhere), 1, "connection.lost", "127.0.0.1"),
        (("top", "--json", "--interval", "0", key), 1, "request.invalid", "--interval"),
    ):
        done = cli(*line)
        told = json.loads(done.stderr)
        assert (done.returncode, done.stdout, told["code"]) == (exit_code, b"", code), line
        assert set(told) == {"code", "message", "details"}
        assert re.search(said, told["message"]), told
        assert done.stderr.count(b"\n") == 1
        assert ("remedy" in told["details"]) == (code == "connection.lost" or said == "no command")
    done = cli("top", "--json", key, "nobody-made-it")
    assert (done.returncode, json.loads(done.stderr)["code"]) == (1, "vm.not_found")
    assert [one["key"] for one in json.loads(done.stdout)] == [[key]]


def started(url: str, *arguments: str, **more: Any) -> subprocess.Popen[bytes]:
    """A command line that runs, its three streams piped."""
    return subprocess.Popen(
        [*COMMAND, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=environment(url), **more,
    )  # fmt: skip


def test_exec_streams(url: str, key: str) -> None:
    """What a command writes comes while it runs; ctrl-c reaches it, with all that it started, and its code is ours."""
    process = started(url, "exec", key, "--", "echo first; read line; echo $line; sleep 1000")
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
        assert alive(client.vm.get(key)) == []


def alive(agent: Any) -> list[str]:
    """What runs in a VM."""
    return [one.command for one in agent.all_processes() if one.status == "running"]


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_reach_the_command(url: str, key: str, name: str) -> None:
    """Which may do with them what it likes. It has no children here: those would get them too."""
    short = name.removeprefix("SIG")
    script = f"trap 'echo got {short}; exit 7' {short}; echo ready; while :; do read -t 1 line; done"
    process = started(url, "exec", key, "--", script)
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (7, f"got {short}\n".encode(), b"")


def test_a_command_that_ignores_interrupts_is_killed_by_the_third(url: str, key: str) -> None:
    """So that nobody is stuck."""
    process = started(
        url, "exec", key, "--", "trap '' INT; setsid sleep 1000 & echo ready; while :; do wait; done"
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"ready\n"
    for _ in range(3):
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    process.communicate(timeout=20)
    assert process.returncode == 137
    with create_client(url) as client:
        assert alive(client.vm.get(key)) == []


def test_a_vm_that_is_removed_while_a_command_runs(url: str, cli: Cli, key: str) -> None:
    """Stays removed: the command ends, and does not make another VM to ask it how."""
    process = started(url, "exec", key, "echo begun; exec sleep 1000")
    assert process.stdout is not None
    assert process.stdout.readline() == b"begun\n"
    assert cli("rm", key).returncode == 0
    stderr = process.communicate(timeout=20)[1]
    assert (process.returncode, stderr) == (125, f"agentos: there is no VM of the key {key!r}\n".encode())
    assert key not in cli("ls").stdout.decode()


def test_a_reader_that_goes_away_ends_the_command(url: str, key: str) -> None:
    """As `| head` does."""
    process = started(url, "exec", key, "yes")
    assert process.stdout is not None
    process.stdout.read(10)
    process.stdout.close()
    assert process.wait(20) == 141
    assert process.stdin is not None
    assert process.stderr is not None
    process.stdin.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    with create_client(url) as client:
        assert alive(client.vm.get(key)) == []


def test_output_that_cannot_be_written(url: str, cli: Cli, key: str) -> None:
    """A full disk is told in a line, and ends the command."""
    cli("exec", key, "true")
    for code, arguments in ((1, ("ls",)), (125, ("exec", key, "echo x; exec sleep 1000"))):
        with open("/dev/full", "wb") as full:
            done = subprocess.run(
                [*COMMAND, *arguments], stdin=subprocess.DEVNULL, stdout=full, stderr=subprocess.PIPE,
                timeout=30, env=environment(url),
            )  # fmt: skip
        assert (done.returncode, done.stderr) == (code, b"agentos: No space left on device\n"), arguments
    with create_client(url) as client:
        assert alive(client.vm.get(key)) == []


def test_exec_in_a_terminal(url: str, key: str) -> None:
    """-it: the command has this terminal, its size and its keys; -t alone shows, and needs none here."""
    person = Person(url, "exec", "-it", "-u", "root", key, "bash", "--norc")
    person.see(b"# ")
    person.type(b"tty; stty size; echo $TERM; id -u\r")
    person.see(b"/dev/pts/")
    person.see(b"30 100")
    person.type(b"sleep 1000\r")
    person.see(b"sleep 1000")
    time.sleep(0.3)
    person.type(b"\x03")
    person.see(b"# ")
    person.type(b"echo code $?; exit 5\r")
    person.see(b"code 130")
    assert person.end() == (5, b"")
    done = subprocess.run(
        [*COMMAND, "exec", "-t", key, "--", "tty; stty size; echo err >&2; exit 4"], stdin=subprocess.DEVNULL,
        capture_output=True, timeout=30, env=environment(url),
    )  # fmt: skip
    assert done.returncode == 4
    assert re.fullmatch(rb"/dev/pts/\d+\r\n24 80\r\nerr\r\n", done.stdout), done.stdout
    assert done.stderr == b""


def test_a_person_without_a_pipe(url: str, key: str) -> None:
    """At a terminal, -i gives what is typed line by line; without it the command's stdin is empty."""
    person = Person(url, "exec", "-i", key, "cat")
    person.type(b"typed\r")
    person.see(b"typed\r\n")
    person.see(b"typed\r\n")
    person.type(b"\x04")
    assert person.end() == (0, b"")
    person = Person(url, "exec", key, "wc", "-c")
    person.see(b"0\r\n")
    assert person.end() == (0, b"")


def test_spawn_and_its_logs(url: str, cli: Cli, key: str) -> None:
    """A pid to work with; output from where one left, or its last lines, or as it comes."""
    done = cli(
        "spawn", "-e", "A=b", "-w", "/tmp", key, "--", "echo $A; pwd; echo wrong >&2; echo last; read line"
    )
    pid = done.stdout.decode().strip()
    assert (done.returncode, pid.isdecimal(), done.stderr) == (0, True, b"")
    following = started(url, "logs", "-f", key, pid)
    assert following.stdout is not None
    assert [following.stdout.readline() for _ in range(3)] == [b"b\n", b"/tmp\n", b"last\n"]
    done = cli("logs", "--cursor", key, pid)
    assert (done.stdout, done.stderr) == (b"b\n/tmp\nlast\n", b"wrong\nagentos: --after 18\n")
    assert cli("logs", "--after", "18", key, pid).stdout == b""
    assert cli("logs", "--after", "2", key, pid).stdout == b"/tmp\nlast\n"
    assert cli("logs", "--tail", "9", key, pid).stdout == b"b\n/tmp\nlast\n"
    lines = cli("spawn", key, "--", "seq 1000; printf unfinished; read line").stdout.decode().strip()
    until = time.monotonic() + 10
    while b"unfinished" not in cli("logs", key, lines).stdout:
        assert time.monotonic() < until
    assert cli("logs", "--tail", "3", key, lines).stdout == b"999\n1000\nunfinished"
    assert cli("logs", "-n", "0", key, pid).stdout == b""
    assert cli("kill", key, pid).returncode == 0
    out, err = following.communicate(timeout=20)
    assert (following.returncode, out, err) == (0, b"", b"wrong\n")
    assert json.loads(cli("spawn", "--json", key, "sleep", "1000").stdout)["pid"] > int(pid)
    for line in (
        ("logs", key, "99999"),
        ("logs", "--after", "-1", key, pid),
        ("logs", "--since", "soon", key, pid),
        ("logs", "-n", "-1", key, pid),
    ):
        done = cli(*line)
        assert (done.returncode, done.stdout) == (1, b"")


def test_top(url: str, cli: Cli, key: str) -> None:
    """One snapshot into a pipe, live in a terminal, busiest first; no VM is woken or made for it."""
    pid = int(cli("spawn", key, "--", "while :; do :; done").stdout)
    cli("spawn", key, "sleep", "1000")
    done = cli("top", key)
    lines = done.stdout.decode().splitlines()
    assert (done.returncode, done.stderr) == (0, b"")
    assert lines[0].split() == ["KEY", "NAME", "CPU", "RSS", "PROCESSES"]
    assert re.match(rf"{key} +vm +\d+\.\d% +\d+\.\dM +2$", lines[1])
    assert lines[3].split() == ["KEY", "PID", "USER", "STATE", "CPU", "RSS", "COMMAND"]
    assert re.match(rf"{key} +{pid} +agentos +R ", lines[4])
    assert "sleep 1000" in lines[5]
    (vm,) = json.loads(cli("top", "--json", key).stdout)
    assert (vm["key"], next(one["pid"] for one in vm["processes"])) == ([key], pid)
    assert vm["cpu"] > 0.1
    assert vm["rssBytes"] > 100_000
    assert key in cli("top").stdout.decode()
    done = cli("top", "no-such-key")
    assert (done.returncode, done.stdout) == (1, b"KEY  NAME  CPU  RSS  PROCESSES\n")
    assert done.stderr == b"agentos: no running VM of the key 'no-such-key'\n"
    assert "no-such-key" not in cli("ls").stdout.decode()
    assert b"--interval" in cli("top", "-d", "0").stderr
    person = Person(url, "top", "-d", "0.2", key)
    person.see(b"q ends")
    person.see(key.encode())
    person.see(b"q ends")
    person.type(b"q")
    assert person.end() == (0, b"")


def test_processes(url: str, cli: Cli, key: str) -> None:
    """ps, logs and kill."""
    with create_client(url) as client:
        agent = client.vm.get_or_create(key)
        process = agent.spawn("sh", ["-c", "echo said; echo wrong >&2; sleep 1000; true"])
        while not any(one.command == "sleep" for one in agent.all_processes()):
            time.sleep(0.01)  # the shell's child is a shell until it has become that
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
        assert [one for one in agent.all_processes() if one.status == "running"] == []  # or not reaped yet
    done = cli("kill", key, "99999")
    assert (done.returncode, done.stderr) == (1, b"agentos: Process not found: 99999\n")
    done = cli("kill", key, "1")
    assert (done.returncode, done.stderr.splitlines()[0]) == (1, b"agentos: pid 1 is the VM itself")


@pytest.mark.parametrize(("option", "code"), [("-9", 137), ("-KILL", 137), ("-SIGINT", 130), ("-sINT", 130)])
def test_kill_as_a_shell_has_it(cli: Cli, key: str, option: str, code: int) -> None:
    """`kill -9`, `kill -INT`; what became of it is waited for, and shown by `ps --all`."""
    pid = cli("spawn", key, "sleep", "1000").stdout.decode().strip()
    done = cli("wait", "--timeout", "100ms", key, pid)
    assert (done.returncode, done.stdout) == (1, b"")
    assert b"still runs after 0.1 s" in done.stderr
    assert cli("kill", option, key, pid).returncode == 0
    done = cli("wait", key, pid)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{code}\n".encode(), b"")
    assert pid not in cli("ps", key).stdout.decode()
    shown = cli("ps", "-a", key).stdout.decode()
    assert re.search(rf"^ *{pid} .* signaled {code} .* sleep 1000$", shown, re.MULTILINE)
    (ended,) = [one for one in json.loads(cli("ps", "--all", "--json", key).stdout) if one["pid"] == int(pid)]
    assert (ended["status"], ended["exitCode"]) == ("exited", code)


def test_wait(cli: Cli, key: str) -> None:
    """Exit codes one a line, as docker has it; of what is not known it says so, and goes on."""
    first = cli("spawn", key, "--", "sleep 0.2; exit 7").stdout.decode().strip()
    second = cli("spawn", key, "true").stdout.decode().strip()
    done = cli("wait", key, first, "99999", second)
    assert (done.returncode, done.stdout) == (1, b"7\n0\n")
    assert done.stderr == b"agentos: Process not found: 99999\n"
    done = cli("wait", "--json", key, first, "99999", second)
    assert done.returncode == 1
    assert json.loads(done.stderr)["code"] == "process.not_found"
    ended = [(one["pid"], one["exitCode"], one["reason"]) for one in json.loads(done.stdout)]
    assert ended == [(int(first), 7, "exited"), (int(second), 0, "exited")]


def test_logs_since(cli: Cli, key: str) -> None:
    """A duration, a time, a timestamp, as docker takes them; with lines and positions too."""
    pid = (
        cli("spawn", key, "--", "echo early; sleep 2.5; date +%s.%N; echo late; read line")
        .stdout.decode()
        .strip()
    )
    until = time.monotonic() + 20
    while b"late" not in cli("logs", key, pid).stdout:
        assert time.monotonic() < until
    first, stamp, last = cli("logs", key, pid).stdout.splitlines(keepends=True)
    moment = datetime.fromtimestamp(float(stamp), UTC)
    for since in (stamp.decode().strip(), moment.isoformat(), moment.strftime("%Y-%m-%dT%H:%M:%SZ")):
        assert cli("logs", "--since", since, key, pid).stdout == stamp + last
    local = moment.astimezone().replace(tzinfo=None).isoformat()
    assert cli("logs", "--since", local, key, pid).stdout == stamp + last
    for since in ("1h", "1h30m", "1.5h", "90m", "5400s", "2020-01-01", "0"):
        assert cli("logs", "--since", since, key, pid).stdout == first + stamp + last
    assert cli("logs", "--since", str(time.time() + 1000), key, pid).stdout == b""
    assert cli("logs", "--since", str(float(stamp)), "-n", "9", key, pid).stdout == stamp + last
    assert cli("logs", "--since", "1h", "--after", "6", key, pid).stdout == stamp + last
    assert cli("logs", "--since", "1h", "-n", "1", key, pid).stdout == last


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
    # What is in a directory, as docker has it, also where there is the target already.
    for _ in range(2):
        assert cli("cp", f"{tmp_path / 'tree'}/.", f"{key}:within").returncode == 0
    assert cli("exec", key, "--", "find within").stdout.split() == [b"within", b"within/a", b"within/a/f"]
    # Errors name what the user has named.
    assert cli("exec", key, "--", "mkdir -m 555 closed").returncode == 0
    assert cli("cp", str(tmp_path / "file"), f"{key}:closed/file").stderr == (
        b"agentos: Permission denied: /home/agentos/closed/file\n"
    )
    assert cli("cp", f"{key}:typed", f"{tmp_path}/none/").stderr == (
        f"agentos: Not a directory: {tmp_path}/none/\n".encode()
    )


def listing(root: Path) -> dict[str, tuple[str, int, float, str]]:
    """What is below a directory here, itself included: kind, mode, time and what there is in it."""
    found = {}
    for path in (root, *sorted(root.rglob("*"))):
        about = path.lstat()
        if path.is_symlink():
            found[str(path.relative_to(root))] = ("link", 0, about.st_mtime, os.readlink(path))
        else:
            text = "" if path.is_dir() else path.read_text()
            kind = "directory" if path.is_dir() else "file"
            found[str(path.relative_to(root))] = (kind, about.st_mode & 0o777, about.st_mtime, text)
    return found


def timeless(found: dict[str, tuple[str, int, float, str]]) -> dict[str, tuple[str, int, float, str]]:
    """The same without the times of links, which stay behind on the way into a VM."""
    return {name: one if one[0] != "link" else ("link", 0, -1.0, one[3]) for name, one in found.items()}


def planted(root: Path) -> Path:
    """A tree with links of every sort, and modes and times that no copy would have by chance."""
    (root / "a" / "closed").mkdir(parents=True)
    (root / "a" / "closed" / "f").write_text("content")
    (root / "run").write_text("#!/bin/sh\n")
    for link, to in (
        ("to-file", "run"), ("to-directory", "a"), ("dangling", "nothing/here"), ("away", "/etc"),
        ("a/closed/up", "../../.."), ("größe", "run"),
    ):  # fmt: skip
        (root / link).symlink_to(to)
    for path, mode, moment in (
        ("run", 0o750, 1_000_000_000.25), ("a/closed/f", 0o604, 1.0), ("a/closed", 0o555, 1_100_000_000.0),
        ("a", 0o711, 1_200_000_000.5), (".", 0o751, 1_300_000_000.0),
    ):  # fmt: skip
        (root / path).chmod(mode)
        os.utime(root / path, (moment, moment))
    return root


def test_cp_keeps_links_modes_and_times(cli: Cli, key: str, tmp_path: Path) -> None:
    """There and back, over what is there already too; as files, and as tar archives."""
    source = planted(tmp_path / "source")
    wanted = timeless(listing(source))
    assert len(wanted) == 11
    done = cli("cp", str(source), f"{key}:copy")
    assert (done.returncode, done.stderr) == (0, b"")
    said = cli("exec", key, "--", "cd copy; find . -printf '%P %y %m %T@ %l\\n'").stdout.decode().splitlines()
    there = {line.split()[0] if line[0] != " " else ".": line.split() for line in said}
    assert there["run"][1:4] == ["f", "750", "1000000000.2500000000"]
    assert there["a/closed"][1:4] == ["d", "555", "1100000000.0000000000"]
    assert there["."][:3] == ["d", "751", "1300000000.0000000000"]
    assert (there["away"][1], there["away"][-1], there["dangling"][-1]) == ("l", "/etc", "nothing/here")

    back = tmp_path / "back"
    done = cli("cp", f"{key}:copy", str(back))
    assert (done.returncode, done.stderr) == (0, b"")
    assert timeless(listing(back)) == wanted
    # Once more: links take the place of links, and are not followed.
    (back / "a" / "closed").chmod(0o755)
    (back / "away").unlink()
    (back / "away").symlink_to(tmp_path / "source")
    done = cli("cp", f"{key}:copy/.", str(back))
    assert (done.returncode, done.stderr) == (0, b"")
    again = timeless(listing(back))
    again["."] = wanted["."]  # the directory that was there is the user's
    assert again == wanted
    assert timeless(listing(source)) == wanted

    packed = cli("cp", f"{key}:copy", "-")
    assert (packed.returncode, packed.stderr) == (0, b"")
    unpacked = tmp_path / "unpacked"
    unpacked.mkdir()
    subprocess.run(["tar", "-xpf", "-", "-C", str(unpacked)], input=packed.stdout, check=True)
    assert timeless(listing(unpacked / "copy")) == wanted
    assert cli("exec", key, "--", "mkdir in").returncode == 0
    done = cli("cp", "-", f"{key}:in", stdin=packed.stdout)
    assert (done.returncode, done.stderr) == (0, b"")
    done = cli("cp", f"{key}:in/copy", str(tmp_path / "third"))
    assert timeless(listing(tmp_path / "third")) == wanted
    # One that is named itself is what it leads to.
    assert cli("cp", f"{key}:copy/to-file", str(tmp_path / "one")).returncode == 0
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o750
    assert (tmp_path / "one").stat().st_mtime == 1_000_000_000.25


def test_cp_is_not_led_elsewhere_by_a_link_of_the_archive(cli: Cli, key: str, tmp_path: Path) -> None:
    """What comes behind a link in a tar archive, and under its name, is not written through it."""
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        link = tarfile.TarInfo("x/there")
        link.type, link.linkname = tarfile.SYMTYPE, "/home/agentos/kept"
        archive.addfile(link)
        archive.addfile(tarfile.TarInfo("x/there/evil"))
    assert cli("exec", key, "--", "mkdir kept x").returncode == 0
    done = cli("cp", "-", f"{key}:.", stdin=(tmp_path / "evil.tar").read_bytes())
    assert done.returncode == 1
    assert cli("exec", key, "--", "ls kept; test -d x/there").returncode == 0
    assert cli("exec", key, "--", "ls kept").stdout == b""
    # What is another user's is copied into, and left as it is.
    (tmp_path / "root" / "tmp").mkdir(parents=True)
    (tmp_path / "root" / "tmp" / "f").write_text("mine")
    done = cli("cp", f"{tmp_path / 'root'}/.", f"{key}:/")
    assert done.returncode == 0
    assert cli("exec", key, "--", "cat /tmp/f").stdout == b"mine"
    if cli("exec", key, "--", "test -O /tmp").returncode:  # where a VM has one id, nothing is another's
        assert done.stderr == b"agentos: another user's, mode and time are left: /tmp\n"
        assert cli("exec", key, "--", "stat -c %a /tmp").stdout == b"1777\n"


def test_cp_of_tar_archives(cli: Cli, key: str, tmp_path: Path) -> None:
    """A directory to stdout and from stdin, as tar itself packs and unpacks it; nothing leaves the target."""
    tree = tmp_path / "tree"
    (tree / "a").mkdir(parents=True)
    data = os.urandom(2_500_000)
    (tree / "a" / "large").write_bytes(data)
    (tree / "run").write_text("#!/bin/sh\n")
    (tree / "run").chmod(0o750)
    (tree / "empty").touch()
    for packing in ("-cf", "-czf"):
        packed = subprocess.run(
            ["tar", packing, "-", "-C", str(tmp_path), "tree"], stdout=subprocess.PIPE, check=True
        )
        assert cli("cp", "-", f"{key}:/tmp", stdin=packed.stdout).returncode == 0
    assert cli("exec", key, "--", "mkfifo /tmp/tree/fifo; stat -c %a /tmp/tree/run").stdout == b"750\n"
    done = cli("cp", f"{key}:/tmp/tree", "-")
    assert (done.returncode, done.stderr) == (0, b"agentos: not a regular file, left out: /tmp/tree/fifo\n")
    back = tmp_path / "back"
    back.mkdir()
    subprocess.run(["tar", "-xf", "-", "-C", str(back)], input=done.stdout, check=True)
    assert sorted(str(one.relative_to(back)) for one in back.rglob("*")) == [
        "tree", "tree/a", "tree/a/large", "tree/empty", "tree/run",
    ]  # fmt: skip
    assert (back / "tree" / "a" / "large").read_bytes() == data
    assert (back / "tree" / "run").stat().st_mode & 0o777 == 0o750
    done = cli("cp", "-", f"{key}:/tmp", stdin=b"no archive")
    assert (done.returncode, b"no whole tar archive" in done.stderr) == (1, True)
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../evil"))
    done = cli("cp", "-", f"{key}:/tmp", stdin=(tmp_path / "evil.tar").read_bytes())
    assert (done.returncode, b"not below its directory" in done.stderr) == (1, True)
    done = cli("cp", f"{key}:nothing", str(tmp_path / "untouched"))
    assert done.returncode == 1
    assert b"No such file" in done.stderr
    assert not (tmp_path / "untouched").exists()
    assert b"No such file" in cli("cp", str(tmp_path / "nothing"), f"{key}:x").stderr
    assert b"KEY:PATH" in cli("cp", "./a:b", "/c").stderr


def test_cp_stays_below_its_target(cli: Cli, key: str, tmp_path: Path) -> None:
    """A symbolic link that lies there already leads no file, and no directory, elsewhere."""
    assert (
        cli("exec", key, "--", "mkdir -p t/sub; echo theirs >t/file; echo theirs >t/sub/file").returncode == 0
    )
    outside, target = tmp_path / "outside", tmp_path / "target"
    outside.mkdir()
    (outside / "file").write_text("mine")
    (target / "t").mkdir(parents=True)
    for link, to in (
        ("t/file", outside / "file"),
        ("t/sub", outside),
        ("t/file", tmp_path / "new"),
        ("t", outside),
    ):
        path = target / link
        if path.is_symlink():
            path.unlink()
        if link == "t":
            shutil.rmtree(path)
        path.symlink_to(to)
        done = cli("cp", f"{key}:t", str(target))
        assert (done.returncode, b"symbolic link" in done.stderr) == (1, True), (link, done)
        if link == "t/sub":
            path.unlink()
    assert [one.name for one in outside.iterdir()] == ["file"]
    assert (outside / "file").read_text() == "mine"
    assert not (tmp_path / "new").exists()
    (target / "file").symlink_to(outside / "file")
    assert cli("cp", f"{key}:t/file", str(target)).returncode == 1
    assert (outside / "file").read_text() == "mine"
    # What the user names is the user's: as cp has it.
    (tmp_path / "mine").symlink_to(target)
    (target / "t").unlink()
    assert cli("cp", f"{key}:t", str(tmp_path / "mine")).returncode == 0
    assert (target / "t" / "sub" / "file").read_text() == "theirs\n"
    assert cli("cp", f"{key}:t/file", str(target / "file")).returncode == 0
    assert (outside / "file").read_text() == "theirs\n"


def test_vms(cli: Cli) -> None:
    """ls and rm, with keys of several parts."""
    key = f"cli/{uuid.uuid4().hex[:8]}"
    assert cli("exec", key, "--", "true").returncode == 0
    assert cli("exec", f"{key}-b", "--", "true").returncode == 0
    shown = [line.split()[1] for line in cli("ls").stdout.decode().splitlines()[1:]]
    assert shown == sorted(shown)
    done = cli("rm", "no-such-key", f"{key}-b")
    assert (done.returncode, done.stderr) == (1, b"agentos: there is no VM of the key 'no-such-key'\n")
    assert f"{key}-b" not in cli("ls").stdout.decode()
    assert re.search(rf"^vm +{key} +running +\d{{4}}-", cli("ls").stdout.decode(), re.MULTILINE)
    assert key.split("/") in [one["key"] for one in json.loads(cli("ls", "--json").stdout)]
    assert key in cli("ls", "--name", "vm").stdout.decode()
    assert json.loads(cli("ls", "--json", "--name", "other").stdout) == []
    assert cli("rm", key).returncode == 0
    assert key not in cli("ls").stdout.decode()
    done = cli("ps", key)
    assert (done.returncode, done.stderr) == (1, f"agentos: there is no VM of the key {key!r}\n".encode())


def test_nobody_serves(cli: Cli) -> None:
    """One line that says so, one that says what to do, by every command, at once."""
    for command in (
        ("ls",), ("exec", "k", "true"), ("spawn", "k", "true"), ("ps", "k"), ("logs", "k", "1"), ("kill", "k", "1"),
        ("rm", "k"), ("cp", "k:x", "-"), ("top",), ("shell", "--list", "k"),
    ):  # fmt: skip
        name, *rest = command
        done = cli(name, "--endpoint", "http://127.0.0.1:9", *rest)
        first, second = done.stderr.decode().splitlines()
        assert done.returncode == (125 if name in ("exec", "spawn", "shell") else 1), command
        assert first.startswith("agentos: nobody answers at http://127.0.0.1:9"), command
        assert second == "agentos: start a server with `agentos serve`", command
    assert b"endpoint: wanted a URL" in cli("ls", "--endpoint", "localhost").stderr


def test_a_server_with_a_token(start: Callable[..., AbstractContextManager[str]], tmp_path: Path) -> None:
    """By option or environment, for every command; without it one line says what is wanted."""
    (tmp_path / "file").write_text("content")

    def run(*line: str, **env: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [*COMMAND, *line], stdin=subprocess.DEVNULL, capture_output=True, timeout=30,
            env={**environment(url), **env},
        )  # fmt: skip

    with start("agentos", "serve", "--token", "correct-horse") as url:
        pid = run("spawn", "--token", "correct-horse", "k", "sleep", "1000").stdout.decode().strip()
        shown = {"AGENTOS_TOKEN": "correct-horse"}
        for line in (
            ("exec", "k", "true"), ("ps", "k"), ("ps", "--tree", "k"), ("logs", "k", pid), ("ls",), ("top",),
            ("cp", str(tmp_path / "file"), "k:file"), ("cp", "k:file", "-"), ("shell", "--list", "k"),
            ("kill", "k", pid), ("rm", "k"),
        ):  # fmt: skip
            failed = 125 if line[0] in ("exec", "spawn", "shell") else 1
            for wrong in ({}, {"AGENTOS_TOKEN": "wrong-horse"}):
                done = run(*line, **wrong)
                assert (done.returncode, done.stdout) == (failed, b""), line
                assert done.stderr.startswith(b"agentos: a valid token is needed\nagentos: --token, "), line
            done = run(*line, **shown)
            assert (done.returncode, done.stderr) == (0, b""), line


def test_help(cli: Cli) -> None:
    """Every command says what it does and takes; usage errors are told on stderr."""
    whole = cli("--help").stdout.decode()
    for name in (
        "demo",
        "serve",
        "exec",
        "spawn",
        "shell",
        "ps",
        "logs",
        "wait",
        "kill",
        "top",
        "cp",
        "ls",
        "rm",
        "doctor",
    ):
        assert re.search(rf"^    {name} +\S", whole, re.MULTILINE), name
        done = cli(name, "--help")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.startswith(b"usage: agentos " + name.encode())
    assert re.fullmatch(rb"agentos \d+\.\d+\.\d+\n", cli("--version").stdout)
    for wrong, said in (
        ((), "a shell of a VM"), (("no-such-command",), "invalid choice"), (("ps",), "KEY"),
        (("ps", "k", "--no-such-option"), "unrecognized arguments: --no-such-option"),
        (("ls", "k"), "unrecognized arguments: k"), (("kill", "k", "x"), "a pid, got 'x'"),
        (("kill", "k", "0"), "a pid, got '0'"), (("ps", ""), "a VM's key, got ''"), (("rm", "k", ""), "a VM's key"),
        (("top", ""), "a VM's key"), (("top", "-d", "often"), "wanted seconds, or a duration"),
    ):  # fmt: skip
        done = cli(*wrong)
        assert (done.returncode, done.stdout) == (2, b""), wrong
        usage = (
            f"usage: agentos {wrong[0]} " if wrong and wrong[0] != "no-such-command" else "usage: agentos "
        )
        assert done.stderr.decode().startswith(usage), wrong
        assert said in done.stderr.decode(), wrong
    for wrong in (
        ("exec",), ("exec", "--bogus", "k", "ls"), ("exec", "", "ls"), ("exec", "--timeout", "soon", "k", "ls"),
        ("exec", "--timeout", "-1", "k", "ls"), ("spawn",), ("shell", "--bogus", "k"),
    ):  # fmt: skip
        done = cli(*wrong)
        assert (done.returncode, done.stdout) == (125, b""), wrong
        assert done.stderr.decode().startswith(f"usage: agentos {wrong[0]} "), wrong
        assert done.stderr.decode().endswith(f"agentos: see `agentos {wrong[0]} --help`\n"), wrong


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
    assert stderr.startswith(b"\nleft running"), "behind a prompt, it says so on a line of its own"
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
    person = Person(url, "shell", key, "no-such-program")
    assert person.end()[0] == 127
    done = cli("shell", key)
    assert (done.returncode, done.stderr.splitlines()[0]) == (125, b"agentos: a shell needs a terminal")


def test_a_shell_whose_terminal_ends(url: str, cli: Cli, key: str) -> None:
    """Goes on; and what was its terminal has nobody to tell, and ends as a hangup ends a program."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [*COMMAND, "shell", key], stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        env=environment(url), preexec_fn=_take_terminal,
    )  # fmt: skip
    os.close(slave)
    seen = b""
    while b"$ " not in seen:
        seen += os.read(master, 65_536)
    os.close(master)
    assert process.wait(20) == 128 + signal.SIGHUP
    (shell,) = json.loads(cli("shell", "--list", "--json", key).stdout)
    assert shell["running"]


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
    for named in ("no_such_module:x", "no_such_package.module:x", "examples/server.py"):
        assert b"agentos: MODULE:NAME: wanted a module that can be imported" in cli("serve", named).stderr
    done = cli("serve", "--data-dir", "/dev/null", "--port", "0")
    assert done.returncode == 3
    assert b"the data directory /dev/null cannot be used: File exists: choose another" in done.stderr
    assert b"the name of a registry" in cli("serve", "json:registry").stderr
    assert b"as setup() makes it" in cli("serve", "json:dumps").stderr
    assert b"a token is needed" in cli("serve", "--host", "0.0.0.0").stderr
