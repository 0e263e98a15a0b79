"""The memory of a hostile guest, and the rings in it: started as the protocol wants, then written at will.

Split and packed rings lie at the same places (virtio 1.2, 2.7 and 2.8). Descriptors are mostly possible ones: what is
all wrong is refused at the first look, and never gets to where frames are.
"""

from __future__ import annotations

import mmap
import os
import random
import struct

from soak import hostile_files

SIZE = 1 << 20
USER = 0x7F00_0000_0000
"""Front-end-virtual address of guest-physical 0."""
RING = 0x10000
"""From one ring to the next."""
DRIVER, DEVICE = 0x8000, 0xC000
"""Of a ring's available and used part, from its descriptors."""
BUFFERS = 0x80000
NEXT, WRITE, INDIRECT, AVAILABLE, USED = 1, 2, 4, 1 << 7, 1 << 15

_DESCRIPTOR = struct.Struct("<QIHH")


class HostileMemory:
    """A memory file, mapped here as long as the object lives; closed by `close`."""

    def __init__(self, chance: random.Random, queues: int) -> None:
        self.chance = chance
        self.queues = queues
        self.fd = hostile_files.memory(SIZE)
        self._map = mmap.mmap(self.fd, SIZE)
        self._index = [0] * queues
        self.size = chance.choice((1, 2, 64, 256, 256, 256, 1024))
        """Descriptors of each ring."""

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    def place(self, queue: int) -> tuple[int, int, int]:
        """Front-end-virtual addresses of descriptors, used and available part."""
        start = USER + queue * RING
        return start, start + DEVICE, start + DRIVER

    def _write(self, at: int, data: bytes) -> None:
        self._map[at : at + len(data)] = data

    def _descriptor(self, packed: bool, receive: bool, slot: int) -> bytes:
        chance = self.chance
        addr = BUFFERS + chance.randrange(0x70000)
        length = chance.choice((12, 26, 72, 76, 1526, 2048, 65562))
        flags = WRITE if receive else 0
        if chance.random() < 0.1:
            flags |= chance.choice((NEXT, INDIRECT, WRITE, NEXT | WRITE, INDIRECT | NEXT, 0xFF7F))
        if flags & INDIRECT:
            length = 16 * chance.randint(0, 300)
        if chance.random() < 0.03:
            addr = chance.choice((0, SIZE - 1, SIZE, SIZE - 8, 1 << 63, (1 << 64) - 1, chance.getrandbits(64)))
        if chance.random() < 0.03:
            length = chance.choice((0, 1, 0xFFFFFFFF, 0x80000000, chance.getrandbits(32)))
        if packed:
            return _DESCRIPTOR.pack(addr, length, slot, flags | AVAILABLE)
        following = chance.randrange(self.size) if chance.random() < 0.9 else chance.getrandbits(16)
        return _DESCRIPTOR.pack(addr, length, flags, following)

    def fill(self, queue: int, packed: bool) -> None:
        """Makes some buffers available: to receive into on even queues, frames on odd ones."""
        chance = self.chance
        receive = queue % 2 == 0
        start = queue * RING
        count = chance.randint(1, min(self.size, 64))
        for step in range(count):
            slot = (self._index[queue] + step) % self.size
            self._write(start + 16 * slot, self._descriptor(packed, receive, slot))
            if not packed:
                head = slot if chance.random() < 0.98 else chance.getrandbits(16)
                self._write(start + DRIVER + 4 + 2 * slot, struct.pack("<H", head))
        self._index[queue] += count
        if not packed:
            jump = 0 if chance.random() < 0.98 else chance.getrandbits(16)
            self._write(start + DRIVER + 2, struct.pack("<H", (self._index[queue] + jump) & 0xFFFF))

    def frames(self) -> None:
        """Writes frames over the buffers: broadcasts, strangers, tags, offloads that are not true."""
        chance = self.chance
        for _ in range(16):
            header = bytes(12) if chance.random() < 0.5 else chance.randbytes(12)
            to = chance.choice((b"\xff" * 6, b"\x02\x66\0\0\0\x01", chance.randbytes(6)))
            source = b"\x02\x66" + chance.randbytes(4)
            kind = chance.choice(
                (b"\x08\x00\x45", b"\x86\xdd\x60", b"\x81\x00\x00\x07\x08\x00\x45", chance.randbytes(2))
            )
            frame = header + to + source + kind + chance.randbytes(chance.randrange(200))
            self._write(BUFFERS + chance.randrange(0x70000 - len(frame)), frame)

    def scribble(self) -> None:
        """Writes anything anywhere into the rings, as a guest can at any moment."""
        chance = self.chance
        start = chance.randrange(self.queues) * RING
        at = start + chance.choice((0, DRIVER, DEVICE)) + chance.randrange(64)
        self._write(at, chance.randbytes(chance.choice((1, 2, 4, 8, 16))))
