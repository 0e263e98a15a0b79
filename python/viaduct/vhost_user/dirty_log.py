"""The log of written pages, as SET_LOG_BASE and SET_LOG_FD describe it (vhost-user, "Migration").

The front-end shares a bitmap, one bit for each 4096 bytes of guest-physical memory, and says with two switches what is
to be logged: VHOST_F_LOG_ALL in SET_FEATURES what is written through descriptors, VHOST_VRING_F_LOG in SET_VRING_ADDR
what is written into that ring's used part, and under which address. All may change while rings run.

To a device the log is a property of the memory that it is given (`viaduct._core.GuestMemory.with_log`): whoever writes
through that memory, or through a queue in it, logs. A log that does not have a bit for everything that will be logged
is refused before it is in force, and so is a memory table or a ring that outgrows it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from viaduct.vhost_user.errors import RequestError
from viaduct.vhost_user.memory_table import MemoryTable
from viaduct.vhost_user.ring import Ring, ring_parts
from viaduct.virtio.features import DeviceFeature

if TYPE_CHECKING:
    from viaduct import _core

PAGE = 4096
"""Bytes of guest memory for one bit (VHOST_LOG_PAGE)."""
_SECTION = 'vhost-user, "Migration"'
_LOG = 'vhost-user, "Log description"'


class DirtyLog:
    """One log. Owns its descriptor, which whoever goes on with the connection in another process needs."""

    def __init__(self, fd: int, size: int, offset: int, event_fd: int | None = None) -> None:
        """`size` and `offset` are in bytes of the file; `event_fd` is told of marks. Both descriptors stay the
        caller's. Raises `RequestError`."""
        length = os.fstat(fd).st_size
        if offset + size > length:
            raise RequestError(
                f"a log of {size:#x} bytes at offset {offset:#x}", f"a part of the file's {length:#x} bytes", _LOG
            )
        from viaduct._core import DirtyLog as Mapped

        try:
            self.mapped: _core.DirtyLog = Mapped(fd, size, offset, event_fd)
        except (OSError, ValueError, OverflowError) as error:
            raise RequestError(f"a log that cannot be mapped: {error}", "a mappable file", _LOG) from error
        self.size, self.offset = size, offset
        self.fd = os.dup(fd)

    def check(self, table: MemoryTable, rings: Iterable[Ring], features: int) -> None:
        """Raises `RequestError` unless everything that may be logged has a bit."""
        for region in table.regions:
            if not self.mapped.covers(region.guest_addr, region.size):
                raise RequestError(
                    f"a log of {self.size:#x} bytes, with bits up to {self.size * 8 * PAGE:#x}, for region [{region}]",
                    "a log that covers all regions",
                    _SECTION,
                )
        for ring in rings:
            self.check_ring(ring, features)

    def check_ring(self, ring: Ring, features: int) -> None:
        """Raises `RequestError` unless the used part of a ring, if it is logged, has its bits."""
        if ring.size is None or ring.addr is None or ring.log_addr is None:
            return
        if features & DeviceFeature.ACCESS_PLATFORM:
            return  # An I/O virtual address like that of the ring: it is logged where it leads to.
        used = ring_parts(ring.addr, ring.size, features)[2]
        if ring.log_addr + used.size > 1 << 64 or not self.mapped.covers(ring.log_addr, used.size):
            raise RequestError(
                f"ring {ring.index}: {used.name} of {used.size:#x} bytes to be logged at {ring.log_addr:#x}",
                f"an end of at most {self.size * 8 * PAGE:#x}, up to where the log has bits",
                _SECTION,
            )

    def close(self) -> None:
        """Closes the descriptor; what is mapped stays as long as a memory has the log."""
        os.close(self.fd)


def in_force(log: DirtyLog | None, features: int | None) -> DirtyLog | None:
    """The log, if the front-end wants its memory logged."""
    return log if (features or 0) & DeviceFeature.LOG_ALL else None
