"""Connections of a control socket: whoever comes is served until he goes, or the server closes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from viaduct.vhost_user.socket_path import Listener

from .control_wire import LINE_MAX

Converse = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class LineServer:
    """Serves `listener`, which is closed with it: `converse` is called with each connection and returns at its end.
    Lines that a reader gives have at most `LINE_MAX` bytes."""

    def __init__(self, listener: Listener, converse: Converse) -> None:
        self.listener = listener
        self._converse = converse
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Begins to serve."""
        self._server = await asyncio.start_unix_server(self._connected, sock=self.listener.sock, limit=LINE_MAX)

    async def close(self) -> None:
        """Serves nobody any more: hangs up on who is connected, and removes the socket's file if it is still ours."""
        if self._server is not None:
            self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        self.listener.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            await self._converse(reader, writer)
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client left, or the server ends
        finally:
            self._connections.discard(task)
            writer.transport.abort() if writer.transport.is_closing() else writer.close()
