"""Messages on a UNIX stream socket, with file descriptors.

# Theory of operation

A message is a header of twelve bytes and a payload whose length the header gives (vhost-user, "Header"). On a stream
socket a message may arrive in pieces and several may arrive at once, so exactly the bytes of one message are asked of
the kernel: first the header, then the payload. File descriptors travel with the first byte of the `sendmsg` they were
given to (vhost-user, "Communication"), and the kernel never lets a `recvmsg` run past the end of bytes that carry
descriptors, so those that arrive while a message is being read belong to that message. What has arrived of a message
stays in the channel, so that a `receive` that was cancelled can be begun again, by another process even.

The room for descriptors is what the kernel allows in one message (SCM_MAX_FD, 253): then none is cut off silently, and
MSG_CTRUNC can only mean that this process may open no more. A descriptor that has been received is owned by a
`Descriptors` from then on; whatever is not taken out of it is closed when the message has been dealt with, on every
path.

Sockets are non-blocking and wait on the loop; a peer that does not read its answers stops nobody but itself.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Iterable
from types import TracebackType
from typing import NamedTuple

from viaduct.vhost_user.errors import StreamError
from viaduct.vhost_user.protocol import NEED_REPLY, REPLY, VERSION

HEADER = struct.Struct("=III")
MAX_PAYLOAD = 4096
"""Bytes. The longest payload of the document is 2056 (GET_SHMEM_CONFIG's answer)."""

_VERSION_MASK = 3
_ANCILLARY_ROOM = socket.CMSG_SPACE(253 * 4)
_HEADER_SECTION = '(vhost-user, "Header")'


async def ready(fd: int, *, write: bool = False) -> None:
    """Returns when `fd` can be read, or written."""
    loop = asyncio.get_running_loop()
    woken = asyncio.Event()
    if write:
        loop.add_writer(fd, woken.set)
    else:
        loop.add_reader(fd, woken.set)
    try:
        await woken.wait()
    finally:
        if write:
            loop.remove_writer(fd)
        else:
            loop.remove_reader(fd)


class Descriptors:
    """Received file descriptors: closed when the ``with`` block ends, unless taken out before."""

    def __init__(self, fds: Iterable[int] = ()) -> None:
        self._fds = list(fds)

    def __len__(self) -> int:
        return len(self._fds)

    def __enter__(self) -> Descriptors:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def extend(self, fds: Iterable[int]) -> None:
        """Takes over `fds`."""
        self._fds.extend(fds)

    def peek(self) -> tuple[int, ...]:
        """The descriptors, still owned by this object."""
        return tuple(self._fds)

    def take(self) -> int | None:
        """Hands the first descriptor to the caller, who closes it; None if there is none."""
        return self._fds.pop(0) if self._fds else None

    def close(self) -> None:
        """Closes what has not been taken."""
        while self._fds:
            os.close(self._fds.pop())


class Message(NamedTuple):
    """One message as it came, not yet judged beyond its header."""

    request: int
    flags: int
    payload: bytes
    fds: Descriptors

    @property
    def need_reply(self) -> bool:
        """The sender set need_reply."""
        return bool(self.flags & NEED_REPLY)

    @property
    def is_reply(self) -> bool:
        """The sender marked it as a reply."""
        return bool(self.flags & REPLY)


class Channel:
    """A connected socket that carries messages. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.data = b""
        """What has arrived of the message that is being received."""
        self.fds = Descriptors()
        """Likewise."""
        self._fd = sock.fileno()

    @property
    def hung_up(self) -> bool:
        """Whether the peer has closed its end, even if bytes from before that are still to be read."""
        poll = select.poll()
        poll.register(self._fd, select.POLLRDHUP)
        return bool(poll.poll(0))

    async def receive(self) -> Message | None:
        """The next message, or None if the peer closed the connection between two messages.

        The caller closes `Message.fds`. Raises `StreamError` if what comes is no message or ends in the middle of one,
        and `ConnectionError` if the peer is gone.
        """
        if not await self._fill(HEADER.size, at_start=True):
            return None
        request, flags, size = HEADER.unpack_from(self.data)
        if flags & _VERSION_MASK != VERSION:
            found = f"request {request} has protocol version {flags & _VERSION_MASK}"
            raise StreamError(f"{found}; allowed: {VERSION} {_HEADER_SECTION}")
        if size > MAX_PAYLOAD:
            found = f"request {request} announces a payload of {size} bytes"
            raise StreamError(f"{found}; allowed: up to {MAX_PAYLOAD} {_HEADER_SECTION}")
        await self._fill(HEADER.size + size)
        message = Message(request, flags, self.data[HEADER.size :], self.fds)
        self.data, self.fds = b"", Descriptors()
        return message

    async def send(self, request: int, flags: int, payload: bytes, fds: Iterable[int] = ()) -> None:
        """Sends one message. `fds` stay open here. Raises `ConnectionError` if the peer is gone."""
        data = memoryview(HEADER.pack(request, flags | VERSION, len(payload)) + payload)
        fd_list = list(fds)
        ancillary = (
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fd_list)}i", *fd_list))] if fd_list else []
        )
        while data:
            try:
                sent = self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await ready(self._fd, write=True)
                continue
            data = data[sent:]
            ancillary = []  # The descriptors went with the first byte.

    def close(self) -> None:
        """Closes the socket, and the descriptors of a message that has not arrived whole."""
        self.fds.close()
        self.sock.close()

    async def _fill(self, size: int, *, at_start: bool = False) -> bool:
        """Reads until `size` bytes of the message are there, and no further. False at a clean end of the stream."""
        while len(self.data) < size:
            try:
                piece, ancillary, flags, _ = self.sock.recvmsg(
                    size - len(self.data), _ANCILLARY_ROOM, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await ready(self._fd)
                continue
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    count = len(content) // 4
                    self.fds.extend(struct.unpack_from(f"={count}i", content))
            if flags & socket.MSG_CTRUNC:
                raise StreamError(
                    "file descriptors of a message were lost because this process may open no more; "
                    "raise its limit (ulimit -n, LimitNOFILE= of systemd)"
                )
            if not piece:
                if at_start and not self.data and not len(self.fds):
                    return False
                raise StreamError(f"the connection ended inside a message, {len(self.data)} of {size} bytes had come")
            self.data += piece
        return True
