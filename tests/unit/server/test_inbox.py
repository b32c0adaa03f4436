"""What waits for the application of a WebSocket."""

from __future__ import annotations

import asyncio

from agentos.server.protocol import _Inbox


def test_order_and_waiting() -> None:
    """First in, first out; who asks too early waits, and one who gave up takes nothing away."""

    async def main() -> None:
        inbox = _Inbox(asyncio.get_running_loop())
        for number in (1, 2):
            inbox.put_nowait(number)
        assert not inbox.empty()
        assert [await inbox.get(), await inbox.get()] == [1, 2]
        assert inbox.empty()
        early = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        early.cancel()
        for number in (3, 4, 5):
            inbox.put_nowait(number)
        await asyncio.wait({early})
        assert early.cancelled()
        assert await inbox.get() == 3
        assert [await inbox.get(), await inbox.get()] == [4, 5]
        late = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        assert not late.done()
        inbox.put_nowait(6)
        assert await late == 6

    asyncio.run(main())


def test_given_up_at_the_moment_of_the_message() -> None:
    """The message that woke who is cancelled at once goes to the next who asks."""

    async def main() -> None:
        inbox = _Inbox(asyncio.get_running_loop())
        early = asyncio.create_task(inbox.get())
        await asyncio.sleep(0)
        inbox.put_nowait("kept")
        early.cancel()
        await asyncio.wait({early})
        assert await inbox.get() == "kept"

    asyncio.run(main())
