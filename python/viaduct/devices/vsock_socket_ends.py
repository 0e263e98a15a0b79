"""Sockets of which nothing is left to know but whether their other end has been closed.

A socket that has come to its end of file stays readable for ever, so the loop cannot wait for it any longer. But
between "sends no more" and "has gone" there is a difference: the first still reads. epoll(7) reports the second
(EPOLLHUP) without being asked for anything else, and an epoll descriptor is itself something a loop can wait for.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable


class SocketEnds:
    """Waits for the ends of any number of sockets."""

    def __init__(self) -> None:
        self._epoll: select.epoll | None = None
        self._calls: dict[int, Callable[[], None]] = {}

    def watch(self, sock: socket.socket, call: Callable[[], None]) -> None:
        """Calls `call` once when the other end of `sock` has been closed altogether."""
        if self._epoll is None:
            self._epoll = select.epoll()
            asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._ended)
        if sock.fileno() not in self._calls:
            self._epoll.register(sock, 0)
        self._calls[sock.fileno()] = call

    def forget(self, sock: socket.socket) -> None:
        """Waits no more for a socket, if it does; before it is closed."""
        self._forget(sock.fileno())

    def _forget(self, fd: int) -> None:
        if self._epoll is None or self._calls.pop(fd, None) is None:
            return
        self._epoll.unregister(fd)
        if not self._calls:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            self._epoll = None

    def _ended(self) -> None:
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0):
            # The call before may have ended this one too.
            if call := self._calls.get(fd):
                self._forget(fd)
                call()
