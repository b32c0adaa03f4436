"""A server in a process of its own, to be measured from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"


class Serving:
    """One server process. `url` is where it listens, `errors` what it has logged of them."""

    def __init__(self, data_dir: str) -> None:
        env = {name: value for name, value in os.environ.items() if not name.startswith("AGENTOS_")}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "agentos.server", "--port", "0", "--data-dir", data_dir],
            stderr=subprocess.PIPE,
            env={**env, "PYTHONPATH": str(SOURCE)},
        )
        self.errors: list[dict[str, Any]] = []
        self.port = 0
        self._listening = threading.Event()
        self._reader = threading.Thread(target=self._read_logs, daemon=True)
        self._reader.start()
        if not self._listening.wait(30) or not self.port:
            raise RuntimeError(f"the server did not start: {self.errors}")
        self.url = f"http://127.0.0.1:{self.port}"

    def _read_logs(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            try:
                entry = json.loads(line)
            except ValueError:
                entry = {"level": "error", "message": line.decode(errors="replace")}
            if entry["message"] == "listening":
                self.port = entry["port"]
                self._listening.set()
            elif entry["level"] == "error" and len(self.errors) < 20:
                self.errors.append(entry)
        self._listening.set()

    def rss_kib(self) -> int:
        """Its resident memory."""
        return self._status("VmRSS")

    def peak_kib(self) -> int:
        """The most that it ever was."""
        return self._status("VmHWM")

    def _status(self, name: str) -> int:
        for line in Path(f"/proc/{self._process.pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1])
        raise RuntimeError(f"no {name}")

    def descriptors(self) -> int:
        """How many it has open."""
        return len(os.listdir(f"/proc/{self._process.pid}/fd"))

    def stop(self) -> int:
        """SIGTERM, and its exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        code = self._process.wait(60)
        self._reader.join(10)
        assert self._process.stderr is not None
        self._process.stderr.close()
        return code


@contextlib.contextmanager
def serving() -> Iterator[Serving]:
    """A server on an empty data directory, which goes with it. It has to end in order."""
    with tempfile.TemporaryDirectory(prefix="agentos-bench-") as data_dir:
        server = Serving(data_dir)
        try:
            yield server
        finally:
            code = server.stop()
        if code or server.errors:
            raise RuntimeError(f"the server ended with {code}, errors: {server.errors}")
