"""The connection between an old and a new switch process: messages with file descriptors.

A message is a header of two 32-bit numbers, the bytes of JSON and the descriptors, then the JSON. The kernel passes at
most 253 descriptors (SCM_MAX_FD) with one write, and a port with 128 queue pairs has more; so they come in groups, each
with at least one byte of the message. JSON that names a descriptor is longer than one byte for each group.
"""

from __future__ import annotations

import asyncio
import socket
import struct

import msgspec

from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.wire import ready

from .handover_format import Failed, HandoverMessage, decode, encode

_HEADER = struct.Struct("=II")
_GROUP = 250
_ROOM = socket.CMSG_SPACE(253 * 4)
_SIZE_MAX = 256 << 20
"""Bytes of a message: no memory is taken for what is plainly no length."""


class HandoverError(Exception):
    """The hand-over failed; the text says why, and that or what to do."""


class HandoverChannel:
    """One end. Owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock

    async def send(self, message: HandoverMessage, fds: Fds | None = None) -> None:
        """Sends a message; the descriptors stay open here. Raises `HandoverError` if nobody is there any more."""
        payload = encode(message)
        passed = fds.fds if fds is not None else []
        groups = [passed[at : at + _GROUP] for at in range(0, len(passed), _GROUP)]
        data = memoryview(_HEADER.pack(len(payload), len(passed)) + payload)
        try:
            for group in groups[:-1]:
                data = data[await self._write(data[:1], group) :]
            last = groups[-1] if groups else []
            while data:
                data = data[await self._write(data, last) :]
                last = []
        except OSError as error:
            raise HandoverError(f"the other process has gone ({error.strerror})") from None

    async def _write(self, data: memoryview, fds: list[int]) -> int:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"={len(fds)}i", *fds))] if fds else []
        while True:
            try:
                return self.sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                await ready(self.sock.fileno(), write=True)

    async def receive(self, within: float) -> tuple[HandoverMessage, Fds]:
        """The next message and its descriptors, which are the caller's to close.

        Raises `HandoverError` if the other process gives up, is gone, says nothing for `within` seconds, or says what
        is no message.
        """
        fds = Fds()
        try:
            async with asyncio.timeout(within):
                size, count = _HEADER.unpack(await self._read(_HEADER.size, fds))
                if size > _SIZE_MAX:
                    raise HandoverError(f"the other process announced a message of {size} bytes")
                payload = await self._read(size, fds)
            if len(fds.fds) != count:
                raise HandoverError(f"{len(fds.fds)} file descriptors came instead of {count}")
            message = decode(payload)
            if isinstance(message, Failed):
                raise HandoverError(message.reason)
            return message, fds
        except TimeoutError:
            fds.close()
            raise HandoverError(f"the other process said nothing for {within:g} s") from None
        except msgspec.MsgspecError as error:
            fds.close()
            raise HandoverError(f"the other process said what is no message: {error}") from None
        except OSError as error:
            fds.close()
            raise HandoverError(f"the other process has gone ({error.strerror})") from None
        except BaseException:
            fds.close()
            raise

    async def _read(self, size: int, fds: Fds) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece, ancillary, flags, _ = self.sock.recvmsg(
                    min(size - len(data), 1 << 16), _ROOM, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await ready(self.sock.fileno())
                continue
            for level, kind, content in ancillary:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.fds.extend(struct.unpack_from(f"={len(content) // 4}i", content))
            if flags & socket.MSG_CTRUNC:
                raise HandoverError(
                    "this process may not open so many files; raise its limit (ulimit -n, LimitNOFILE= of systemd)"
                )
            if not piece:
                raise HandoverError("the other process has gone")
            data += piece
        return data

    def close(self) -> None:
        """Closes the socket."""
        self.sock.close()
