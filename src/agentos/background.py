"""The event loop behind `agentos.sync`: one thread for the whole process, and calls into it that block.

Started at first use, ended with the process. It knows nothing of VMs: `sync` is generated around `run`,
`iterate` and `run_feeding`.
"""

from __future__ import annotations

import asyncio
import atexit
import contextvars
import os
import socket
import threading
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable, Iterator
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")
A = TypeVar("A")

THREAD_NAME = "agentos-sync"


class Twin(Generic[A]):
    """Base of the blocking twins: an async object, and equal to every other twin of the same one."""

    def __init__(self, asynchronous: A) -> None:
        self._async = asynchronous

    def __repr__(self) -> str:
        return repr(self._async)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and isinstance(other, Twin) and other._async is self._async

    def __hash__(self) -> int:
        return id(self._async)


class _Background:
    """The loop and its thread."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.loop = asyncio.new_event_loop()
        self.stopping = False
        self.thread = threading.Thread(target=self._serve, name=THREAD_NAME, daemon=True)
        self.thread.start()

    def _serve(self) -> None:
        asyncio.set_event_loop(self.loop)
        try:
            self.loop.run_forever()
            tasks = asyncio.all_tasks(self.loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self.loop.run_until_complete(asyncio.wait(tasks))
            self.loop.run_until_complete(self.loop.shutdown_asyncgens())
            self.loop.run_until_complete(self.loop.shutdown_default_executor())
        finally:
            self.loop.close()

    def stop(self) -> None:
        """End the thread, at the end of the process that started it."""
        if os.getpid() == self.pid and not self.loop.is_closed():
            self.stopping = True
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join()


_background: _Background | None = None
_starting = threading.Lock()


def _running() -> _Background:
    global _background
    with _starting:
        # A forked child has the parent's loop, but not the thread that runs it.
        if _background is None or _background.pid != os.getpid():
            _background = _Background()
            # Handlers run last in, first out: VMs, which come later, are ended while the loop still runs.
            atexit.register(_background.stop)
        return _background


class _Call(Generic[T]):
    """One coroutine on the loop, and a caller who waits until `done` is called."""

    def __init__(self, coroutine: Coroutine[Any, Any, T], done: Callable[[], object]) -> None:
        self._background = _running()
        self._coroutine = coroutine
        self._done = done
        self._task: asyncio.Task[T] | None = None
        inside = threading.current_thread() is self._background.thread
        if inside or self._background.stopping:
            coroutine.close()
            why = (
                "on the event loop of agentos.sync would wait for itself" if inside else "came after the end"
            )
            raise RuntimeError(f"a blocking call {why}")

    def begin(self) -> None:
        """Start it. `done` is called when it has ended."""
        self._background.loop.call_soon_threadsafe(self._begin, context=contextvars.copy_context())

    def _begin(self) -> None:
        self._task = self._background.loop.create_task(self._coroutine)
        self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[T]) -> None:
        # At the end of the process only daemon threads can still wait: they are left to end with it.
        if not self._background.stopping:
            self._done()

    def cancel(self) -> None:
        """Cancel the coroutine; `done` is called when it has ended, or if it has not been begun."""
        self._background.loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._coroutine.close()
            self._done()

    def result(self) -> T:
        """What the coroutine returned or raised. Only when it is done."""
        assert self._task is not None
        return self._task.result()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run `coroutine` on the background loop and return what it returns.

    An exception that reaches the waiting caller, such as KeyboardInterrupt, cancels it and is raised when it
    has ended.
    """
    done = threading.Event()
    call = _Call(coroutine, done.set)
    try:
        call.begin()
        done.wait()
    except BaseException:
        call.cancel()
        done.wait()
        raise
    return call.result()


_END = object()


def iterate(source: AsyncIterator[T]) -> Iterator[T]:
    """`source` as a plain iterator: each step runs on the background loop, none is taken ahead of need.

    Leaving the loop over it early closes `source`.
    """
    try:
        while (item := run(_next(source))) is not _END:
            yield cast(T, item)
    finally:
        _close(source)


async def _next(source: AsyncIterator[T]) -> object:
    return await anext(source, _END)


def _close(source: AsyncIterator[Any]) -> None:
    background = _running()
    if background.stopping:
        return
    if threading.current_thread() is background.thread:
        # The garbage collector may drop an iterator on any thread, this one included.
        background.loop.create_task(_end(source))
    else:
        run(_end(source))


async def _end(source: AsyncIterator[Any]) -> None:
    close = getattr(source, "aclose", None)
    if close is not None:
        await close()


class _Feed(AsyncIterable[bytes]):
    """Chunks that the caller's own thread makes, whenever the coroutine asks for the next one."""

    def __init__(self, chunks: Iterable[bytes]) -> None:
        self._chunks = iter(chunks)
        self.requests: SimpleQueue[asyncio.Future[Any] | None] = SimpleQueue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.requests.put(answer)
            chunk = await answer
            if chunk is _END:
                return
            yield chunk

    def answer(self, request: asyncio.Future[Any]) -> None:
        """Make the next chunk, in the caller's thread. What is raised here is raised in the coroutine too."""
        try:
            chunk = next(self._chunks, _END)
        except Exception as error:
            _settle(request, request.set_exception, error)
        else:
            _settle(request, request.set_result, chunk)


def _settle(request: asyncio.Future[Any], settle: Callable[[Any], None], value: object) -> None:
    with suppress(RuntimeError):  # the loop was closed: nobody waits any more
        request.get_loop().call_soon_threadsafe(lambda: None if request.done() else settle(value))


def run_feeding(call: Callable[[Any], Coroutine[Any, Any, T]], chunks: Iterable[bytes]) -> T:
    """As `run` of `call(chunks)`, but `chunks` is iterated in this thread, one chunk for each that is asked for."""
    if not isinstance(chunks, Iterable) or isinstance(chunks, str | bytes | bytearray | memoryview):
        return run(call(chunks))  # which says what is wrong with it
    feed = _Feed(chunks)
    started = _Call(call(feed), lambda: feed.requests.put(None))
    try:
        started.begin()
        while (request := feed.requests.get()) is not None:
            feed.answer(request)
    except BaseException:
        started.cancel()
        while feed.requests.get() is not None:
            pass
        raise
    return started.result()


def blocking(connected: socket.socket) -> socket.socket:
    """A socket of the event loop's as one for blocking use."""
    connected.setblocking(True)
    return connected
