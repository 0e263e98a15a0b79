"""A guest on a switch's port, down to the bytes of its rings, with an IOMMU in front of its network card or without.

It plays both sides of the socket: QEMU, which shares memory, starts rings and answers for the IOMMU, and the driver,
which fills two split rings of `SIZE` descriptors each. Knows nothing of the package's own wire and ring code.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import NamedTuple

from vhost_user.wire_client import ACK, HEADER, REPLY, VERSION, Wire, address, regions, state, u64

PAGE = 4096
PAGES = 256
USER = 0x7F00_0000_0000
IOVA = 0xFF00_0000
"""Where the driver's I/O virtual addresses begin; pages lie backwards in memory, so no address is right by luck."""
SIZE = 64
RECEIVE, TRANSMIT = 0, 1
READ, WRITE = 1, 2
MISS, UPDATE, INVALIDATE, ACCESS_FAIL = 1, 2, 3, 4
NET_HEADER = 12
_IOTLB = struct.Struct("=QQQBB6x")


class Asked(NamedTuple):
    """A message that came over the back-end channel."""

    iova: int
    permissions: int
    kind: int


async def until(condition: Callable[[], object]) -> None:
    """Waits for a condition, generously."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.002)


class PlatformGuest(Wire):
    """Connected and negotiated once `open` was awaited. `iommu`: it has one."""

    def __init__(self, path: str, iommu: bool = True) -> None:
        super().__init__(path)
        self.iommu = iommu
        self.domain: dict[int, tuple[int, int]] = {}
        """What the driver has mapped: page of I/O virtual addresses to page of memory and permissions."""
        self.asked: list[Asked] = []
        self.answers = True
        """The IOMMU answers misses: from the domain, or with a refusal."""
        self._turn = asyncio.Lock()
        self._fd = os.memfd_create("guest")
        os.ftruncate(self._fd, PAGES * PAGE)
        self.memory = mmap.mmap(self._fd, PAGES * PAGE)
        self._kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._next = [0, 0]
        self._server: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Negotiates, shares the memory and gives the back-end its channel."""
        self.send(3)
        self.send(16, u64((await self.ask(15)).u64))
        features = 1 << 30 | 1 << 32 | (1 << 33 if self.iommu else 0)
        assert await self.acknowledged(2, u64(features)) == ACK
        assert await self.acknowledged(5, regions((0, PAGES * PAGE, USER, 0)), [self._fd]) == ACK
        if self.iommu:
            assert await self.acknowledged(21, b"", [self._far.fileno()]) == ACK
        self._far.close()
        self._server = asyncio.create_task(self._answer())

    async def shut(self) -> None:
        """Disconnects and lets go of everything."""
        if self._server is not None:
            self._server.cancel()
            with suppress(asyncio.CancelledError):
                await self._server
        super().close()
        for each in (self._near, self._far):
            each.close()
        self.memory.close()
        for fd in (self._fd, *self._kicks):
            os.close(fd)

    async def acknowledged(self, request: int, payload: bytes, fds: list[int] | None = None) -> int:
        """A request with need_reply; one at a time."""
        async with self._turn:
            return await self.ack(request, payload, fds or [])

    # The IOMMU.

    def map(self, iova: int, page: int, permissions: int = READ | WRITE) -> int:
        """The driver maps a page of memory; returns its I/O virtual address."""
        self.domain[iova] = page, permissions
        return iova

    async def update(self, iova: int, size: int, user: int, permissions: int) -> int:
        """Sends a translation; returns the answer."""
        async with self._turn:
            return (await self.ask(22, _IOTLB.pack(iova, size, user, permissions, UPDATE))).u64

    async def message(self, kind: int) -> int:
        """An IOTLB message of any type; returns the answer."""
        async with self._turn:
            return (await self.ask(22, _IOTLB.pack(0, PAGE, USER, 3, kind))).u64

    async def invalidate(self, iova: int, size: int = PAGE) -> None:
        """The driver has unmapped a range: returns when the back-end has said that it does not use it any more."""
        for page in [page for page in self.domain if not size or iova <= page < iova + size]:
            del self.domain[page]
        async with self._turn:
            assert (await self.ask(22, _IOTLB.pack(iova, size, 0, 0, INVALIDATE))).u64 == ACK

    def missed(self, iova: int) -> int:
        """How often a page was asked for."""
        return sum(asked.iova == iova and asked.kind == MISS for asked in self.asked)

    async def _answer(self) -> None:
        loop = asyncio.get_running_loop()
        length = HEADER.size + _IOTLB.size
        data = b""
        while True:
            while len(data) < length:
                piece = await loop.sock_recv(self._near, 65536)
                if not piece:
                    return
                data += piece
            message, data = data[:length], data[length:]
            number, flags, size = HEADER.unpack_from(message)
            iova, _, _, permissions, kind = _IOTLB.unpack_from(message, HEADER.size)
            assert (number, size) == (1, _IOTLB.size)
            self.asked.append(Asked(iova, permissions, kind))
            if kind == MISS and self.answers:
                await self.resolve(iova)
                if flags & 8:
                    granted = ACK if iova in self.domain else 1
                    self._near.send(HEADER.pack(number, VERSION | REPLY, 8) + u64(granted))

    async def resolve(self, iova: int) -> None:
        """Answers for one page, if the domain has it."""
        if iova in self.domain:
            page, permissions = self.domain[iova]
            assert await self.update(iova, PAGE, USER + page * PAGE, permissions) == ACK

    # The driver. Ring n has pages 4n to 4n + 2: descriptors, available ring, used ring.

    def _address(self, page: int) -> int:
        return self.map(IOVA + page * PAGE, PAGES - 1 - page) if self.iommu else USER + (PAGES - 1 - page) * PAGE

    def _at(self, ring: int, part: int, offset: int) -> int:
        return (PAGES - 1 - (4 * ring + part)) * PAGE + offset

    def buffer(self, page: int, permissions: int = READ | WRITE) -> int:
        """Address, for a descriptor, of page number `page` of memory."""
        return self.map(IOVA + (64 + page) * PAGE, page, permissions) if self.iommu else page * PAGE

    async def start(self) -> None:
        """Starts and enables both rings."""
        for ring in (RECEIVE, TRANSMIT):
            descriptors, available, used = (self._address(4 * ring + part) for part in range(3))
            for request, payload, fds in (
                (8, state(ring, SIZE), []),
                (10, state(ring, 0), []),
                (9, address(ring, descriptors, used, available), []),
                (18, state(ring, 1), []),
                (12, u64(ring), [self._kicks[ring]]),
            ):
                assert await self.acknowledged(request, payload, fds) == ACK

    async def stop(self) -> None:
        """Stops both rings (GET_VRING_BASE)."""
        for ring in (RECEIVE, TRANSMIT):
            async with self._turn:
                await self.ask(11, state(ring, 0))

    def add(self, ring: int, addr: int, length: int) -> int:
        """Makes a buffer available; returns how many there are by now."""
        index = self._next[ring] % SIZE
        flags = 2 if ring == RECEIVE else 0
        struct.pack_into("=QIHH", self.memory, self._at(ring, 0, 16 * index), addr, length, flags, 0)
        struct.pack_into("=H", self.memory, self._at(ring, 1, 4 + 2 * index), index)
        self._next[ring] += 1
        struct.pack_into("=H", self.memory, self._at(ring, 1, 2), self._next[ring] & 0xFFFF)
        os.eventfd_write(self._kicks[ring], 1)
        return self._next[ring]

    def used(self, ring: int) -> int:
        """How many buffers came back."""
        (index,) = struct.unpack_from("=H", self.memory, self._at(ring, 2, 2))
        return int(index)

    def written(self, number: int) -> int:
        """Bytes written to the `number`th receive buffer that came back, counted from 0."""
        _, length = struct.unpack_from("=II", self.memory, self._at(RECEIVE, 2, 4 + 8 * (number % SIZE)))
        return int(length)

    def put(self, page: int, frame: bytes) -> int:
        """Writes a frame with an empty virtio-net header into a page; returns the length of both."""
        data = bytes(NET_HEADER) + frame
        self.memory[page * PAGE : page * PAGE + len(data)] = data
        return len(data)

    def frame(self, page: int, length: int) -> bytes:
        """What lies behind the virtio-net header in a page."""
        start = page * PAGE + NET_HEADER
        return self.memory[start : start + length]


@asynccontextmanager
async def guest(path: str, iommu: bool = True) -> AsyncIterator[PlatformGuest]:
    """A guest that has negotiated and not started its rings."""
    each = PlatformGuest(path, iommu)
    try:
        await each.open()
        yield each
    finally:
        await each.shut()
