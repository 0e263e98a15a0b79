"""A driver of a block device: requests made as in virtio 1.2, 5.2.6, on a `devices.slot.Ring`."""

from __future__ import annotations

import asyncio
import struct
from dataclasses import dataclass

from devices.slot import Ring

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
UNMAP = 1
SECTOR = 512


def header(kind: int, sector: int = 0) -> bytes:
    """A request's header."""
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    """A segment of a discard or write zeroes request."""
    return struct.pack("<QII", sector, sectors, flags)


@dataclass
class Disk:
    """Asks for one thing after the other."""

    ring: Ring

    async def ask(self, kind: int, sector: int = 0, out: bytes = b"", room: int = 0) -> tuple[int, bytes]:
        """Status and data of a request."""
        answer = await self.ring.ask([header(kind, sector), out], [room, 1])
        return answer[-1], answer[:-1]

    async def read(self, sector: int, sectors: int = 1) -> bytes:
        """The content of sectors; the request must succeed."""
        status, data = await self.ask(IN, sector, room=sectors * SECTOR)
        assert status == OK
        assert len(data) == sectors * SECTOR
        return data

    async def write(self, sector: int, data: bytes) -> None:
        """Writes whole sectors; the request must succeed."""
        assert await self.ask(OUT, sector, data) == (OK, b"")

    async def read_all(self, sectors: list[int]) -> list[bytes]:
        """One sector each, all asked for at once."""
        tokens = [self.ring.add([header(IN, sector)], [SECTOR, 1], kick=False) for sector in sectors]
        self.ring.kick()
        came = dict([await self.ring.next_used() for _ in tokens])
        assert all(came[token][-1] == OK for token in tokens)
        await asyncio.sleep(0)
        return [came[token][:SECTOR] for token in tokens]
