"""Gives the tests here a VM, a server, and the TypeScript client; and lets them import the module beside them."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from agentos import VM, Host

sys.path.insert(0, str(Path(__file__).parent))

from e2e_support import absent

SOURCE = Path(__file__).parents[2] / "src"
JS = Path(__file__).parent / "js"

BACKSTOP_SECONDS = 30.0
"""No test should come near it: what is waited for are events, and this only ends a test that hangs."""

Run = Callable[..., Any]


@pytest.fixture
def run() -> Run:
    """`run(main)`: runs the coroutine function `main` to its end on a fresh event loop, within the backstop."""

    def run_main(main: Callable[[], Awaitable[Any]], *, limit: float = BACKSTOP_SECONDS) -> Any:
        async def limited() -> Any:
            async with asyncio.timeout(limit):
                return await main()

        return asyncio.run(limited())

    return run_main


LISTENING_SECONDS = 0.1
"""By then a VM has opened all that it waits on for the kernel's word, which it does a moment after its start."""


@pytest.fixture
def in_vm(run: Run) -> Run:
    """`in_vm(body, **options)`: runs `body(vm)` with a VM made of `options`, which is closed afterwards.

    With `alone` the VM has a host of its own, that keeps none ready: nothing but the test opens descriptors.
    """

    def run_in_vm(
        body: Callable[[VM], Awaitable[Any]],
        *,
        limit: float = BACKSTOP_SECONDS,
        alone: bool = False,
        **options: Any,
    ) -> Any:
        async def main() -> Any:
            if alone:
                async with Host() as host, VM(host=host, **options) as vm:
                    await asyncio.sleep(LISTENING_SECONDS)
                    return await body(vm)
            async with VM(**options) as vm:
                return await body(vm)

        return run(main, limit=limit)

    return run_in_vm


@contextlib.contextmanager
def running(data_dir: Path, *command: str, cwd: Path | None = None) -> Iterator[str]:
    """The URL of a server that `python -m COMMAND` starts; it has to end with exit code 0."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("AGENTOS_")}
    port = [] if "--port" in command else ["--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", *command, *port, "--data-dir", str(data_dir)],
        stderr=subprocess.PIPE, env={**env, "PYTHONPATH": str(SOURCE)}, cwd=cwd,
    )  # fmt: skip
    said: list[bytes] = []
    listening: Future[int] = Future()
    # What it logs is read on and on: a pipe that nobody reads would hold it up one day.
    reader = threading.Thread(target=_read_log, args=(process.stderr, said, listening), daemon=True)
    reader.start()
    try:
        yield f"http://127.0.0.1:{listening.result(30)}"
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(30)
        reader.join(30)
    assert code == 0, b"".join(said)[-4000:]


def _read_log(stderr: Any, said: list[bytes], port: Future[int]) -> None:
    with stderr:
        for line in stderr:
            said.append(line)
            if not port.done() and b'"listening"' in line:
                port.set_result(json.loads(line)["port"])
    if not port.done():
        port.set_exception(AssertionError(f"the server did not start: {b''.join(said)!r}"))


@pytest.fixture(scope="session")
def running_server() -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Starts servers for as long as a context lasts: `running`."""
    return running


@pytest.fixture(scope="session")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server for all tests; each uses VMs of its own."""
    with running(tmp_path_factory.mktemp("data"), "agentos.server") as found:
        yield found


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., contextlib.AbstractContextManager[str]]:
    """Starts a server of the test's own."""
    return lambda *command, **options: running(tmp_path / "data", *command, **options)


@functools.cache
def npm_installed() -> tuple[Path, str]:
    """Where npm has installed what tests/e2e/js needs, in a cache outside the repository; what went wrong, if so."""
    if shutil.which("npm") is None or shutil.which("node") is None:
        return Path(), "npm and node are needed"
    digest = hashlib.sha256((JS / "package.json").read_bytes()).hexdigest()[:12]
    caches = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "agentos-tests"
    caches.mkdir(parents=True, exist_ok=True)
    cache = caches / f"js-{digest}"
    with open(f"{cache}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests of another clone may be at it
        if not (cache / "installed").exists():
            shutil.copytree(JS, cache, dirs_exist_ok=True)
            command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "--no-package-lock"]
            try:
                subprocess.run(command, cwd=cache, capture_output=True, text=True, timeout=500, check=True)
            except subprocess.SubprocessError as error:
                return cache, f"npm install failed: {error}: {str(getattr(error, 'stderr', ''))[-500:]}"
            (cache / "installed").touch()
    return cache, ""


def pytest_collection_finish(session: pytest.Session) -> None:
    """Install it before the first test of those that need it, since it may take longer than a test."""
    wanted = any("js" in one.fixturenames or "typescript" in one.nodeid for one in _functions(session))
    if wanted and not session.config.option.collectonly:
        npm_installed()


def _functions(session: pytest.Session) -> list[pytest.Function]:
    return [one for one in session.items if isinstance(one, pytest.Function)]


@pytest.fixture(scope="session")
def js(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs in tests/e2e/js, with the given client that npm has installed."""
    cache, problem = npm_installed()
    if problem:
        absent(problem)
    directory = tmp_path_factory.mktemp("js")
    shutil.copytree(JS, directory, dirs_exist_ok=True)
    (directory / "node_modules").symlink_to(cache / "node_modules")
    return directory
