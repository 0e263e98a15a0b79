"""Where a front-end puts rings in its memory.

All rings lie at the beginning, each part on a cache line of its own so that what the driver writes and what the device
writes never share one; the rest of the memory is for buffers. Addresses are guest-physical, which here equal offsets
in the file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.payloads import VringAddr
from viaduct.vhost_user.ring import check_size, ring_parts

CACHE_LINE = 64
PAGE = 4096


class RingPlace(NamedTuple):
    """Guest-physical addresses of one ring's parts."""

    size: int
    descriptor: int
    driver: int
    device: int


def place_rings(sizes: Sequence[int], features: int, memory_size: int) -> tuple[tuple[RingPlace, ...], int]:
    """Lays out rings of `sizes` descriptors; the layout, split or packed, follows `features`.

    Returns their places and the first address that is free, on a page boundary. Raises `VhostUserError` if the memory
    is too small and `RequestError` for a size that the layout does not take.
    """
    places = []
    free = 0
    for size in sizes:
        check_size(size, features)
        addrs = []
        for part in ring_parts(VringAddr(0, 0, 0, 0, 0, 0), size, features):
            addrs.append(free)
            free += -(-part.size // CACHE_LINE) * CACHE_LINE
        places.append(RingPlace(size, *addrs))
    free = -(-free // PAGE) * PAGE
    if free >= memory_size:
        raise VhostUserError(
            f"{len(sizes)} rings take {free} bytes, which leaves no room for buffers in {memory_size} bytes of memory; "
            "give more memory or choose smaller queues"
        )
    return tuple(places), free
