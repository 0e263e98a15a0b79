"""What a virtqueue's memory shows to somebody who only looks: where it stands, which buffers the device may take."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viaduct.vhost_user import Queue

_DESCRIPTOR = struct.Struct("<QIHH")
_AVAIL, _USED = 1 << 7, 1 << 15


def used_index(memory_fd: int, queue: Queue) -> int:
    """`idx` of a split ring's used ring (virtio 1.2, 2.7.8)."""
    return _u16(memory_fd, queue.device_addr + 2)


def available(memory_fd: int, queue: Queue, *, packed: bool) -> Iterator[int]:
    """The buffers that the driver has made available and that are not used, by head index (split) or id (packed)."""
    if packed:
        ring = os.pread(memory_fd, queue.size * _DESCRIPTOR.size, queue.descriptor_addr)
        for _, _, buffer, flags in _DESCRIPTOR.iter_unpack(ring):
            if bool(flags & _AVAIL) != bool(flags & _USED):
                yield buffer
        return
    index, end = used_index(memory_fd, queue), _u16(memory_fd, queue.driver_addr + 2)
    while index != end:
        yield _u16(memory_fd, queue.driver_addr + 4 + 2 * (index % queue.size))
        index = (index + 1) & 0xFFFF


def _u16(memory_fd: int, place: int) -> int:
    return int.from_bytes(os.pread(memory_fd, 2, place), "little")
