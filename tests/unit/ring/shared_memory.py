"""Memory that a model and the engine share, and its little-endian fields (virtio 1.2, 1.4)."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from viaduct._core import GuestMemory

BYTES = 1 << 20
RING = 0
BUFFERS = 1 << 18
TABLES = 3 << 18
BUFFER_BYTES = 64
TABLE_BYTES = 256

Layout = Literal["split", "packed"]


class Element(NamedTuple):
    """A part of a buffer: guest-physical address and length in bytes."""

    addr: int
    length: int


@dataclass(frozen=True)
class Queue:
    """What both sides know of a queue before they start."""

    layout: Layout
    size: int
    base: int
    event_idx: bool
    indirect: bool
    in_order: bool

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Descriptor, driver and device part: written down from 2.7 and 2.8.10.1, not asked from the engine."""
        if self.layout == "packed":
            return RING, RING + 16 * self.size, RING + 16 * self.size + 4
        available = RING + 16 * self.size
        used = -(-(available + 6 + 2 * self.size) // 4) * 4
        return RING, available, used

    def at(self, base: int) -> Queue:
        """The same queue, started from elsewhere."""
        return replace(self, base=base)


class SharedMemory:
    """One region at address 0 of both address spaces."""

    def __init__(self) -> None:
        fd = os.memfd_create("ring-model")
        try:
            os.ftruncate(fd, BYTES)
            self.table = GuestMemory().with_region(0, BYTES, 0, 0, fd)
        finally:
            os.close(fd)

    def read(self, addr: int, length: int) -> bytes:
        return self.table.read(addr, length)

    def write(self, addr: int, data: bytes) -> None:
        self.table.write(addr, data)

    def get(self, addr: int, width: int) -> int:
        return int.from_bytes(self.read(addr, width), "little")

    def put(self, addr: int, width: int, value: int) -> None:
        self.write(addr, value.to_bytes(width, "little"))

    def gather(self, elements: list[Element]) -> bytes:
        return b"".join(self.read(*element) for element in elements)

    def scatter(self, elements: list[Element], data: bytes) -> None:
        for addr, length in elements:
            self.write(addr, data[:length])
            data = data[length:]
