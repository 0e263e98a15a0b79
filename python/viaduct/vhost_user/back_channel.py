"""The channel for requests of the back-end (vhost-user, "Back-end communication").

Nobody waits here: a request is sent at once or, if the front-end is slow to read, when there is room; its answer, if
one was asked for, goes to a callback. A front-end that reads nothing loses requests, and one that answers what was not
asked loses the channel; the session goes on either way.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Callable
from typing import Any

from viaduct.vhost_user import payloads as p
from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.protocol import BACK_END_BY_NAME, NEED_REPLY, REPLY, VERSION
from viaduct.vhost_user.wire import HEADER

log = logging.getLogger("viaduct.vhost_user")

BACKLOG = 64 << 10
"""Bytes that may wait for a front-end that does not read."""
_ANSWER = HEADER.size + 8
_SECTION = 'vhost-user, "Back-end communication"'

Answered = Callable[[bool], None]
"""Told whether the front-end did what it was asked."""


class BackChannel:
    """One channel; owns its socket. Raises `RequestError` if `fd`, which is duplicated, is no socket of the right
    kind."""

    def __init__(self, fd: int) -> None:
        own = os.dup(fd)
        try:
            self._sock = socket.socket(fileno=own)
        except OSError as error:
            os.close(own)
            raise RequestError(
                f"a descriptor that is no socket ({error.strerror})", "a connected stream socket", _SECTION
            ) from error
        if self._sock.family != socket.AF_UNIX or self._sock.type != socket.SOCK_STREAM:
            found = f"a socket of family {self._sock.family!r} and type {self._sock.type!r}"
            self._sock.close()
            raise RequestError(found, "a connected AF_UNIX stream socket", _SECTION)
        self._sock.setblocking(False)
        self._loop = asyncio.get_running_loop()
        self.unsent = b""
        """Bytes that wait for a front-end that is slow to read."""
        self.received = b""
        """The beginning of an answer."""
        self._expected: deque[tuple[int, Answered]] = deque()
        self._open = True
        self._loop.add_reader(self._sock, self._read)

    def post(self, name: str, payload: Any = (), answered: Answered | None = None) -> bool:
        """Sends the request `name` of the protocol table, with need_reply if somebody is to be told the answer.

        Returns whether the front-end will get it if it reads on.
        """
        request = BACK_END_BY_NAME[name]
        data = request.payload.pack(payload)
        flags = VERSION | (NEED_REPLY if answered is not None else 0)
        message = HEADER.pack(request.number, flags, len(data)) + data
        if not self._open or len(self.unsent) + len(message) > BACKLOG:
            return False
        if self.unsent:
            self.unsent += message
        else:
            self.unsent = message
            self._write()
            if self.unsent and self._open:
                self._loop.add_writer(self._sock, self._write)
        if self._open and answered is not None:
            self._expected.append((request.number, answered))
        return self._open

    @property
    def expected(self) -> list[int]:
        """The requests that have still to be answered, by number."""
        return [number for number, _ in self._expected]

    def adopt(self, unsent: bytes, received: bytes, expected: list[int]) -> None:
        """Goes on where another process was with the channel; who wanted to know its answers is no more."""
        self.unsent, self.received = unsent, received
        self._expected.extend((number, lambda granted: None) for number in expected)

    def fileno(self) -> int:
        """The socket's descriptor."""
        return self._sock.fileno()

    def pause(self) -> None:
        """Leaves in the socket what comes, until `go_on`."""
        if self._open:
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)

    def go_on(self) -> None:
        """Ends what `pause` began."""
        if self._open:
            self._loop.add_reader(self._sock, self._read)
            if self.unsent:
                self._loop.add_writer(self._sock, self._write)

    def close(self) -> None:
        """Closes the channel; what was not answered will not be. May be called twice."""
        if self._open:
            self._open = False
            self._loop.remove_reader(self._sock)
            self._loop.remove_writer(self._sock)
            self._sock.close()
            self._expected.clear()

    def _write(self) -> None:
        try:
            sent = self._sock.send(self.unsent, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        self.unsent = self.unsent[sent:]
        if not self.unsent:
            self._loop.remove_writer(self._sock)

    def _read(self) -> None:
        try:
            data = self._sock.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        self.received += data
        while self._open and len(self.received) >= _ANSWER:
            answer, self.received = self.received[:_ANSWER], self.received[_ANSWER:]
            number, flags, size = HEADER.unpack_from(answer)
            if not self._expected or (number, flags, size) != (self._expected[0][0], VERSION | REPLY, 8):
                log.error("a front-end sent what was not asked for over the back-end channel; the channel is closed")
                self.close()
                return
            with contextlib.suppress(RequestError):
                self._expected.popleft()[1](p.U64_PAYLOAD.parse(answer[HEADER.size :]).value == 0)
