"""The configuration space of a socket device (virtio 1.2, 5.10.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<Q")

HOST_CID = 2
"""The host's address; 0, 1 and all ones are reserved too (virtio 1.2, 5.10.4)."""
FIRST_GUEST_CID = 3
LAST_GUEST_CID = 0xFFFF_FFFE
"""The upper 32 bits of an address are reserved, and zero."""


class VsockConfig(NamedTuple):
    """``struct virtio_vsock_config``."""

    guest_cid: int = FIRST_GUEST_CID
    """The guest's address."""

    def pack(self) -> bytes:
        """The 8 bytes as they lie in configuration space."""
        return _LAYOUT.pack(*self)
