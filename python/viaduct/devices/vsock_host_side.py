"""Where programs of the host ask for a socket of the guest: a UNIX socket and the line ``CONNECT PORT``."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from typing import TYPE_CHECKING

from viaduct.vhost_user.socket_path import Listener

if TYPE_CHECKING:
    from viaduct.devices.vsock import Vsock

log = logging.getLogger("viaduct.devices")

PORT_MAX = 0xFFFF_FFFE
"""All ones mean "any port"."""
LINE_MAX = 32
"""Bytes of the line, its end included."""
PATIENCE = 20.0
"""Seconds that a program may take to send its line, and the guest to answer."""
_CONNECT = re.compile(rb"(?i:connect) (\d{1,10})\r?\n")
_EXPECTED = b"ERROR: CONNECT and a port from 0 to 4294967294 expected, for example: CONNECT 1024\n"


class HostSide:
    """Listens at `path` from the beginning, and serves who comes while it is started."""

    def __init__(self, device: Vsock, path: str) -> None:
        """Raises `viaduct.vhost_user.SocketPathError`."""
        self._device = device
        self._listener: Listener | None = Listener(path)
        self._accepting: asyncio.Task[None] | None = None
        self._newcomers: dict[socket.socket, asyncio.Task[None]] = {}

    @property
    def waiting(self) -> int:
        """Programs that have connected and not said where to."""
        return len(self._newcomers)

    def start(self) -> None:
        """Begins to serve; nothing if it does."""
        if self._accepting is None and self._listener is not None:
            self._accepting = asyncio.get_running_loop().create_task(self._accept(self._listener), name="vsock")

    def stop(self) -> None:
        """Serves nobody until the next start; who comes meanwhile waits."""
        if self._accepting is not None:
            self._accepting.cancel()
            self._accepting = None
        for task in list(self._newcomers.values()):
            task.cancel()

    def close(self) -> None:
        """Stops and removes the socket. May be called twice."""
        self.stop()
        if self._listener is not None:
            self._listener.close()
            self._listener = None

    async def _accept(self, listener: Listener) -> None:
        while True:
            try:
                sock = await listener.accept()
            except OSError as error:  # No descriptor left, for example.
                log.error("vsock: cannot accept a connection at %s: %s", self._device.path, error)
                await asyncio.sleep(1)
                continue
            sock.setblocking(False)
            if self._device.full:
                log.warning(
                    "vsock: %s: %d connections are open, and no more may be",
                    self._device.path,
                    self._device.connections_max,
                )
                sock.close()
                continue
            task = asyncio.create_task(self._welcome(sock))
            self._newcomers[sock] = task
            task.add_done_callback(lambda _, sock=sock: self._newcomers.pop(sock, None))  # type: ignore[misc]

    async def _welcome(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        said = b""
        try:
            async with asyncio.timeout(PATIENCE):
                while b"\n" not in said and len(said) < LINE_MAX:
                    part = await loop.sock_recv(sock, 4096)
                    if not part:
                        raise ConnectionError
                    said += part
            line, _, early = said.partition(b"\n")
            match = _CONNECT.fullmatch(line + b"\n")
            if match is None or int(match[1]) > PORT_MAX:
                await loop.sock_sendall(sock, _EXPECTED)
                raise ConnectionError
        except (OSError, TimeoutError):
            sock.close()
            return
        except BaseException:
            sock.close()
            raise
        connection = self._device.connect(sock, int(match[1]), early)
        loop.call_later(PATIENCE, self._device.give_up, connection)
