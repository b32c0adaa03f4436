"""Gives the tests here a VM, and lets them import the module beside them in every import mode of pytest."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agentos import VM, Host

sys.path.insert(0, str(Path(__file__).parent))

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
                    return await body(vm)
            async with VM(**options) as vm:
                return await body(vm)

        return run(main, limit=limit)

    return run_in_vm
