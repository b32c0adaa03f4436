"""A real browser, driven over its DevTools protocol: pages are opened in it, and scripts are run in them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from websockets.sync.client import ClientConnection, connect

PROGRAM: Final = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_SECONDS: Final = 60.0


class ScriptFailed(AssertionError):
    """A script in a page threw, or the page could not be opened."""


class Page:
    """A tab of its own: without cookies, storage or a cache that another has."""

    def __init__(self, devtools: ClientConnection, session: str) -> None:
        self._devtools = devtools
        self._session = session

    def open(self, url: str) -> None:
        """Go there as if the address had been typed; returns when the page has loaded."""
        went = self.call("Page.navigate", url=url)
        if "errorText" in went:
            raise ScriptFailed(f"{url}: {went['errorText']}")
        self.run(
            "new Promise(go => document.readyState === 'complete' ? go() : addEventListener('load', go))"
        )

    def run(self, script: str) -> Any:
        """The value of an expression in the page, or of the promise that it is; it has to be what JSON can hold."""
        done = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            details = done["exceptionDetails"]
            raise ScriptFailed(details.get("exception", {}).get("description", details["text"]))
        return done["result"].get("value")

    def function(self, body: str, *args: Any) -> Any:
        """What an async function with this body returns for `args`."""
        return self.run(f"(async (...args) => {{ {body} }})(...{json.dumps(args)})")

    def call(self, method: str, **params: Any) -> Any:
        """A command of the protocol, about this tab."""
        return call(self._devtools, method, self._session, params)


class Browser:
    """A running browser."""

    def __init__(self, devtools: ClientConnection) -> None:
        self._devtools = devtools

    @contextmanager
    def page(self) -> Iterator[Page]:
        """A new tab, closed afterwards."""
        own = call(self._devtools, "Target.createBrowserContext")["browserContextId"]
        target = call(
            self._devtools, "Target.createTarget", None, {"url": "about:blank", "browserContextId": own}
        )["targetId"]
        session = call(self._devtools, "Target.attachToTarget", None, {"targetId": target, "flatten": True})[
            "sessionId"
        ]
        try:
            yield Page(self._devtools, session)
        finally:
            call(self._devtools, "Target.disposeBrowserContext", None, {"browserContextId": own})


def call(
    devtools: ClientConnection, method: str, session: str | None = None, params: dict[str, Any] | None = None
) -> Any:
    """Send one command and wait for its answer; events in between are not looked at."""
    number = int(getattr(devtools, "last_number", 0)) + 1
    devtools.last_number = number  # type: ignore[attr-defined]
    asked = {"id": number, "method": method, "params": params or {}}
    devtools.send(json.dumps(asked | ({"sessionId": session} if session else {})))
    while True:
        answer = json.loads(devtools.recv(timeout=_SECONDS))
        if answer.get("id") == number:
            if "error" in answer:
                raise ScriptFailed(f"{method}: {answer['error']['message']}")
            return answer["result"]


@contextmanager
def browser(profile: Path, *options: str) -> Iterator[Browser]:
    """A browser with an empty profile in this directory, which talks to nobody of its own accord."""
    assert PROGRAM is not None
    quiet = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--remote-debugging-port=0",
    )  # fmt: skip
    command = [PROGRAM, *quiet, f"--user-data-dir={profile}", *options, "about:blank"]
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=env, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            said = b""
            for line in process.stderr:
                said += line
                if line.startswith(b"DevTools listening on "):
                    break
            else:
                raise AssertionError(f"the browser did not start: {said[-2000:]!r}")
            with connect(line.split()[-1].decode(), proxy=None, max_size=None, compression=None) as devtools:
                yield Browser(devtools)
                call(devtools, "Browser.close")
        finally:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
            process.stderr.read()
