"""The configuration space of a memory balloon (virtio 1.2, 5.5.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<IIII")


class BalloonConfig(NamedTuple):
    """``struct virtio_balloon_config``. Pages are of 4096 bytes, whatever the guest's are (virtio 1.2, 5.5.6)."""

    num_pages: int = 0
    """How large the device wants the balloon to be."""
    actual: int = 0
    """How large the driver says it is."""
    free_page_hint_cmd_id: int = 0
    """With VIRTIO_BALLOON_F_FREE_PAGE_HINT: 0 stop, 1 done, others the number of a round of hints."""
    poison_val: int = 0
    """With VIRTIO_BALLOON_F_PAGE_POISON: what the guest fills free pages with."""

    def pack(self) -> bytes:
        """The 16 bytes as they lie in configuration space."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> BalloonConfig:
        """Reads exactly 16 bytes."""
        return cls(*_LAYOUT.unpack(data))
