"""The buffer that tracks requests in flight, so that a restarted back-end goes on without losing or repeating one.

A device that completes requests out of order cannot tell from the ring alone which of them it still owed when it died.
It therefore notes them in a buffer that the front-end keeps for it (vhost-user, "Inflight I/O tracking"): the
front-end asks for it with GET_INFLIGHT_FD and gives it back to the next back-end with SET_INFLIGHT_FD. The buffer has
one region for each queue: a header, then a state for each descriptor.

`allocate` makes a buffer and `InflightBuffer` maps one. `SplitRegion` follows the document step by step for split
rings: `take` when a chain is fetched; `give_back` for the chains of a batch *before* the used ring's index moves and
`published` after it; `recover` after a restart. A crash between any two of these steps leaves a buffer from which
`recover` finds the truth, which the tests try for every step.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Iterable
from types import TracebackType

from viaduct.vhost_user.device import Inflight
from viaduct.vhost_user.errors import RequestError

SECTION = 'vhost-user, "Inflight I/O tracking"'
VERSION = 1
REGION_ALIGNMENT = 64
"""Regions start on cache lines, as in libvhost-user."""

_SPLIT_HEAD = struct.Struct("=QHHHH")
_SPLIT_STATE = struct.Struct("=B5xHQ")
_PACKED_HEAD = struct.Struct("=QHHHHHHBB7x")
_PACKED_STATE = struct.Struct("=BxHHHQHHIQ")

# Offsets in the split region's header and states.
_VERSION, _LAST_BATCH_HEAD, _USED_INDEX = 8, 12, 14
_INFLIGHT, _NEXT, _COUNTER = 0, 6, 8


def region_size(queue_size: int, *, packed: bool) -> int:
    """Bytes of one queue's region, rounded up to its alignment."""
    # The compiler pads the packed header from 31 to 32 bytes, so that the states are aligned.
    head, state = (-(-_PACKED_HEAD.size // 8) * 8, _PACKED_STATE) if packed else (_SPLIT_HEAD.size, _SPLIT_STATE)
    size = head + queue_size * state.size
    return -(-size // REGION_ALIGNMENT) * REGION_ALIGNMENT


def allocate(queue_count: int, queue_size: int, *, packed: bool) -> tuple[int, int, int]:
    """A new zeroed buffer, as `Device.get_inflight` returns it: descriptor (the caller closes it), size and offset."""
    size = queue_count * region_size(queue_size, packed=packed)
    fd = os.memfd_create("viaduct inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    return fd, size, 0


class InflightBuffer:
    """A mapped buffer for split rings. Usable as a context manager, which unmaps it."""

    def __init__(self, inflight: Inflight) -> None:
        """Maps what SET_INFLIGHT_FD or `allocate` gave; the descriptor may be closed afterwards. Raises
        `RequestError`."""
        stride = region_size(inflight.queue_size, packed=False)
        needed = inflight.queue_count * stride
        if inflight.mmap_size < needed:
            raise RequestError(
                f"a buffer of {inflight.mmap_size} bytes for {inflight.queue_count} queues of {inflight.queue_size}",
                f"{needed} bytes or more",
                SECTION,
            )
        # mmap wants a multiple of the page size; the buffer may start anywhere.
        before = inflight.mmap_offset % mmap.ALLOCATIONGRANULARITY
        self._map = mmap.mmap(inflight.fd, before + needed, offset=inflight.mmap_offset - before)
        self.regions = tuple(
            SplitRegion(self._map, before + index * stride, inflight.queue_size)
            for index in range(inflight.queue_count)
        )

    def __enter__(self) -> InflightBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unmaps the buffer."""
        self._map.close()


class SplitRegion:
    """The region of one split queue. What it holds comes from outside and is checked before use."""

    def __init__(self, memory: mmap.mmap, start: int, size: int) -> None:
        """`size` is the number of descriptors. A region that was never used is prepared; raises `RequestError` for one
        that belongs to another size or version."""
        self._memory = memory
        self._start = start
        self.size = size
        version, count = self._get("=HH", _VERSION)
        if version == 0:
            self._put("=QHHHH", 0, 0, VERSION, size, 0, 0)
        elif (version, count) != (VERSION, size):
            raise RequestError(
                f"a region of version {version} with {count} descriptors", f"version {VERSION} with {size}", SECTION
            )
        self._counter = 1 + max((counter for _, counter in self._in_flight()), default=0)

    def take(self, head: int) -> None:
        """The chain that starts at descriptor `head` was fetched from the available ring."""
        self._put_state(head, "=Q", _COUNTER, self._counter)
        self._counter += 1
        self._put_state(head, "=B", _INFLIGHT, 1)

    def give_back(self, heads: Iterable[int]) -> None:
        """These chains are in the used ring's elements; its index has not moved yet."""
        for head in heads:
            (last,) = self._get("=H", _LAST_BATCH_HEAD)
            self._put_state(head, "=H", _NEXT, last)
            self._put("=H", _LAST_BATCH_HEAD, head)

    def published(self, heads: Iterable[int], used_index: int) -> None:
        """The used ring's index has moved to `used_index` and covers these chains."""
        for head in heads:
            self._put_state(head, "=B", _INFLIGHT, 0)
        self._put("=H", _USED_INDEX, used_index)

    def recover(self, used_index: int) -> list[int]:
        """After a restart: the heads of the chains still owed, in the order in which they were fetched.

        `used_index` is that of the used ring in guest memory. What was published but not noted as such is noted now.
        Raises `RequestError` if the region contradicts itself.
        """
        (noted,) = self._get("=H", _USED_INDEX)
        batch = (used_index - noted) & 0xFFFF
        if batch > self.size:
            raise RequestError(f"a last batch of {batch} chains", f"up to {self.size}", SECTION)
        (head,) = self._get("=H", _LAST_BATCH_HEAD)
        for _ in range(batch):
            self._put_state(head, "=B", _INFLIGHT, 0)
            (head,) = self._get_state(head, "=H", _NEXT)
        self._put("=H", _USED_INDEX, used_index)
        return [head for head, _ in sorted(self._in_flight(), key=lambda each: each[1])]

    def _in_flight(self) -> list[tuple[int, int]]:
        """Head and counter of each chain that is marked."""
        found = []
        for head in range(self.size):
            inflight, _, counter = _SPLIT_STATE.unpack_from(self._memory, self._state(head))
            if inflight:
                found.append((head, counter))
        return found

    def _state(self, head: int) -> int:
        if head >= self.size:
            raise RequestError(f"descriptor {head}", f"0 to {self.size - 1}", SECTION)
        return self._start + _SPLIT_HEAD.size + head * _SPLIT_STATE.size

    def _get(self, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self._memory, self._start + offset)

    def _put(self, form: str, offset: int, *values: int) -> None:
        struct.pack_into(form, self._memory, self._start + offset, *values)

    def _get_state(self, head: int, form: str, offset: int) -> tuple[int, ...]:
        return struct.unpack_from(form, self._memory, self._state(head) + offset)

    def _put_state(self, head: int, form: str, offset: int, *values: int) -> None:
        struct.pack_into(form, self._memory, self._state(head) + offset, *values)
