"""Serves the counters over HTTP on the loop that the control side runs on.

A scrape reads copies of the counters: pollers are not stopped by it, nor by a client that is slow, which is hung up
on. Only `GET /metrics` is answered, and every connection carries one request (RFC 9112).
"""

from __future__ import annotations

import asyncio
import os
from contextlib import suppress

from viaduct.vhost_user.socket_path import Listener

from .metrics import CONTENT_TYPE, Measured, exposition
from .metrics_address import MetricsAddress

PATIENCE = 10.0
"""Seconds that a client may take to ask, and as many to read the answer."""

HEAD_MAX = 16384
"""Longest request, in bytes."""


class MetricsServer:
    """Serves one switch: `async with MetricsServer(switch, address):`.

    Raises:
        OSError: nothing can listen there.
        SocketPathError: the path cannot be had.
    """

    def __init__(self, switch: Measured, address: MetricsAddress) -> None:
        self.switch = switch
        self.address = address
        self._server: asyncio.Server | None = None
        self._listener: Listener | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> MetricsServer:
        if self.address.path is not None:
            mask = os.umask(0o117)
            try:
                self._listener = Listener(self.address.path)
            finally:
                os.umask(mask)
            self._server = await asyncio.start_unix_server(self._connected, sock=self._listener.sock, limit=HEAD_MAX)
        else:
            self._server = await asyncio.start_server(
                self._connected, self.address.host, self.address.port, limit=HEAD_MAX
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            async with asyncio.timeout(PATIENCE):
                head = await reader.readuntil(b"\r\n\r\n")
            writer.write(self._answer(head))
            async with asyncio.timeout(PATIENCE):
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError, asyncio.CancelledError):
            pass  # too long, too slow (TimeoutError is an OSError), gone, or the switch ends
        finally:
            self._connections.discard(task)
            with suppress(OSError):
                writer.close()

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"not an HTTP/1 request\n")
        if words[0] not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET is answered\n", "Allow: GET, HEAD\r\n")
        if words[1].split(b"?", 1)[0] != b"/metrics":
            return _response("404 Not Found", b"the counters are at /metrics\n")
        body = exposition(self.switch)
        return _response("200 OK", body, send_body=words[0] == b"GET", content_type=CONTENT_TYPE)


def _response(
    status: str, body: bytes, extra: str = "", send_body: bool = True, content_type: str = "text/plain"
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        f"Connection: close\r\n{extra}\r\n"
    )
    return head.encode() + (body if send_body else b"")
