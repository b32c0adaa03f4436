"""One HTTP request through a preview link: passed on as it comes, answered as it is answered."""

from __future__ import annotations

import asyncio
import socket
from typing import Final

import h11

from agentos.network.waiting import send_all
from agentos.server.answers import Answer
from agentos.server.http import Disconnected, Receive, Request, Send
from agentos.server.preview_headers import View, to_client, to_vm

HEAD_SECONDS: Final = 120.0
"""For an answer to begin, from when the last of the request was passed on."""
_HEAD_BYTES: Final = 64 * 1024
_CHUNK_BYTES: Final = 256 * 1024


class NotHttp(Exception):
    """What answers is not HTTP."""


class Exchange:
    """Both directions at once: an answer may begin before the request has ended."""

    def __init__(self, view: View, request: Request, receive: Receive, send: Send) -> None:
        self._view = view
        self._request = request
        self._receive = receive
        self._send = send
        self._http = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_BYTES)
        self._patience: asyncio.Timeout | None = None
        self.answered = False
        """Whether the client has the beginning of an answer."""

    async def run(self, sock: socket.socket) -> None:
        """Pass it on over `sock`. Raises Disconnected, TimeoutError, OSError, NotHttp, or h11's LocalProtocolError."""
        head = self._http.send(self._head()) or b""
        await send_all(sock, head)
        loop = asyncio.get_running_loop()
        upload, download = loop.create_task(self._upload(sock)), loop.create_task(self._download(sock))
        try:
            await asyncio.wait({upload, download}, return_when=asyncio.FIRST_COMPLETED)
            if download.done():
                download.result()
            else:
                upload.result()
        finally:
            for task in (upload, download):
                task.cancel()
            await asyncio.wait({upload, download})

    def _head(self) -> h11.Request:
        headers = to_vm(self._request, self._view)
        if self._request.header(b"content-length") is None and self._request.header(b"transfer-encoding"):
            headers.append((b"transfer-encoding", b"chunked"))
        headers.append((b"connection", b"close"))
        return h11.Request(method=self._request.method, target=self._view.target, headers=headers)

    async def _upload(self, sock: socket.socket) -> None:
        """Pass the body on, then wait for the client to go: raises Disconnected when it has."""
        more = True
        while True:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise Disconnected
            if not more:
                continue
            body = message.get("body", b"")
            more = message.get("more_body", False)
            data = b"" if not body else self._http.send(h11.Data(body)) or b""
            if not more:
                data += self._http.send(h11.EndOfMessage()) or b""
            try:
                await send_all(sock, data)
            except OSError:
                # It reads no more, and may have said why: the answer tells. The rest of the body is for nobody.
                more = False
            if self._patience is not None:
                self._patience.reschedule(asyncio.get_running_loop().time() + HEAD_SECONDS)

    async def _download(self, sock: socket.socket) -> None:
        answer = Answer(self._http, sock, _CHUNK_BYTES)
        async with asyncio.timeout(HEAD_SECONDS) as self._patience:
            response = await self._response(answer)
            self._patience = None
        headers = to_client(list(response.headers), self._view)
        self.answered = True
        await self._send({"type": "http.response.start", "status": response.status_code, "headers": headers})
        while True:
            event = await self._event(answer)
            if isinstance(event, h11.Data):
                body = bytes(event.data)
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
            elif isinstance(event, h11.EndOfMessage):
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
                return

    async def _response(self, answer: Answer) -> h11.Response:
        while True:
            event = await self._event(answer)
            if isinstance(event, h11.Response):
                return event
            if not isinstance(event, h11.InformationalResponse):
                raise NotHttp("no answer in what it said")
            if event.status_code == 101:
                raise NotHttp("it switched to another protocol")

    async def _event(self, answer: Answer) -> object:
        try:
            return await answer.event()
        except h11.RemoteProtocolError as error:
            raise NotHttp(str(error)) from None
