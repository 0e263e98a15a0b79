"""What a virtqueue's memory shows to somebody who only looks: where it stands, which buffers are the device's."""

from __future__ import annotations

import itertools
import os
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from viaduct.vhost_user import Queue

_DESCRIPTOR = struct.Struct("<QIHH")
_AVAIL, _USED = 1 << 7, 1 << 15


def used_index(memory_fd: int, queue: Queue) -> int:
    """`idx` of a split ring's used ring (virtio 1.2, 2.7.8)."""
    return _u16(memory_fd, queue.device_addr + 2)


def held(memory_fd: int, queue: Queue, *, packed: bool) -> list[int]:
    """The buffers that are the device's: the driver has made them available and was not told that they are used.

    By head index (split) or id (packed), in order; a packed ring whose driver is in the middle of its work
    shows none. The driver of a packed ring is told in order (virtio 1.2, 2.8.6): used descriptors behind one
    that is not used are no news to it. A device that is killed in the middle of a batch leaves such, and the
    next one makes them known.
    """
    if packed:
        ring = os.pread(memory_fd, queue.size * _DESCRIPTOR.size, queue.descriptor_addr)
        marks = [
            (bool(flags & _AVAIL), bool(flags & _USED), buffer) for *_, buffer, flags in _DESCRIPTOR.iter_unpack(ring)
        ]
        # The lap changes where the driver stands, and with each lap AVAIL.
        turns = [i for i in range(queue.size) if (marks[i][0] != marks[i - 1][0]) == (i != 0)]
        if len(turns) != 1:
            return []
        oldest_first = marks[turns[0] :] + marks[: turns[0]]
        return [buffer for *_, buffer in itertools.dropwhile(lambda mark: mark[0] == mark[1], oldest_first)]
    index, end = used_index(memory_fd, queue), _u16(memory_fd, queue.driver_addr + 2)
    places = (queue.driver_addr + 4 + 2 * ((index + i) % queue.size) for i in range((end - index) & 0xFFFF))
    return [_u16(memory_fd, place) for place in places]


def _u16(memory_fd: int, place: int) -> int:
    return int.from_bytes(os.pread(memory_fd, 2, place), "little")
