"""A front-end that says whatever a test wants, byte by byte; knows nothing of the package's own wire code."""

from __future__ import annotations

import array
import asyncio
import os
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

HEADER = struct.Struct("=III")
VERSION, REPLY, NEED_REPLY = 1, 4, 8
NO_FD = 0x100
ACK, NACK = 0, 1


class Reply(NamedTuple):
    request: int
    flags: int
    payload: bytes
    fds: list[int]

    @property
    def u64(self) -> int:
        assert len(self.payload) == 8
        return int(struct.unpack("=Q", self.payload)[0])


class Wire:
    """One connection to a back-end."""

    def __init__(self, path: str) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self.sock.connect(path)
        except OSError:
            self.sock.close()
            raise
        self.sock.setblocking(False)

    def close(self) -> None:
        self.sock.close()

    def raw(self, data: bytes, fds: Iterable[int] = ()) -> None:
        """Sends bytes as they are."""
        rights = array.array("i", fds)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        assert self.sock.sendmsg([data], ancillary) == len(data)

    def takes(self, data: bytes) -> bool:
        """Sends bytes as they are; False if the socket is full."""
        try:
            self.raw(data)
        except BlockingIOError:
            return False
        return True

    def send(self, request: int, payload: bytes = b"", fds: Iterable[int] = (), flags: int = VERSION) -> None:
        """Sends one message and waits for nothing."""
        self.raw(HEADER.pack(request, flags, len(payload)) + payload, fds)

    async def receive(self) -> Reply:
        """The next message. Raises EOFError if the back-end has closed the connection."""
        fds: list[int] = []
        header = await self._exactly(HEADER.size, fds)
        request, flags, size = HEADER.unpack(header)
        return Reply(request, flags, await self._exactly(size, fds), fds)

    async def ask(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> Reply:
        """Sends a request that has an answer of its own, and returns the answer."""
        self.send(request, payload, fds)
        reply = await self.receive()
        assert (reply.request, reply.flags) == (request, VERSION | REPLY)
        return reply

    async def ack(self, request: int, payload: bytes = b"", fds: Iterable[int] = ()) -> int:
        """Sends a request with need_reply and returns the acknowledgement: `ACK` or `NACK`."""
        self.send(request, payload, fds, VERSION | NEED_REPLY)
        reply = await self.receive()
        assert (reply.request, reply.flags, reply.fds) == (request, VERSION | REPLY, [])
        return reply.u64

    async def closed(self) -> bool:
        """Waits until the back-end says something; whether it has closed the connection instead."""
        try:
            await self.receive()
        except (EOFError, ConnectionResetError):
            return True
        return False

    async def _exactly(self, size: int, fds: list[int]) -> bytes:
        data = b""
        while len(data) < size:
            try:
                piece, ancillary, _, _ = self.sock.recvmsg(size - len(data), socket.CMSG_SPACE(64))
            except BlockingIOError:
                await asyncio.sleep(0.001)
                continue
            for _, _, content in ancillary:
                fds.extend(struct.unpack(f"={len(content) // 4}i", content))
            if not piece:
                raise EOFError
            data += piece
        return data


def u64(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, num: int) -> bytes:
    return struct.pack("=II", index, num)


def address(index: int, descriptor: int, used: int, available: int, flags: int = 0, log: int = 0) -> bytes:
    return struct.pack("=IIQQQQ", index, flags, descriptor, used, available, log)


def regions(*each: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=II", len(each), 0) + b"".join(struct.pack("=QQQQ", *region) for region in each)


def single(region: tuple[int, int, int, int]) -> bytes:
    return struct.pack("=QQQQQ", 0, *region)


def memfd(size: int) -> int:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, size)
    return fd


MEMORY_SIZE = 1 << 20
USER_BASE = 0x7F00_0000_0000
RING_STEP = 0x10000
FEATURES = 1 << 30 | 1 << 32


class Guest(Wire):
    """A front-end that knows the usual way to a running ring, for tests that only care about what comes after."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.fds: list[int] = []

    def close(self) -> None:
        super().close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def own(self, fd: int) -> int:
        """Closes `fd` together with the connection."""
        self.fds.append(fd)
        return fd

    def event(self) -> int:
        return self.own(os.eventfd(0, os.EFD_NONBLOCK))

    def memory(self, size: int = MEMORY_SIZE) -> int:
        return self.own(memfd(size))

    async def negotiate(self, features: int = FEATURES) -> None:
        """Acknowledges `features` and all protocol features that are offered."""
        self.send(3)
        protocol = (await self.ask(15)).u64
        self.send(16, u64(protocol))
        assert await self.ack(2, u64(features)) == ACK

    async def share(self) -> None:
        """One region: guest-physical 0, user `USER_BASE`."""
        table = regions((0, MEMORY_SIZE, USER_BASE, 0))
        assert await self.ack(5, table, [self.memory()]) == ACK

    def place(self, index: int) -> bytes:
        """SET_VRING_ADDR of a split ring of up to 256 descriptors."""
        start = USER_BASE + index * RING_STEP
        return address(index, descriptor=start, used=start + 0x3000, available=start + 0x2000)

    async def start(self, index: int = 0, size: int = 256, base: int = 0) -> None:
        """Starts ring `index`; features and memory are there."""
        assert await self.ack(8, state(index, size)) == ACK
        assert await self.ack(10, state(index, base)) == ACK
        assert await self.ack(9, self.place(index)) == ACK
        assert await self.ack(12, u64(index), [self.event()]) == ACK
