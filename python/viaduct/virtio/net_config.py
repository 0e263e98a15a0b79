"""The configuration space of a network device (virtio 1.2, 5.1.4)."""

from __future__ import annotations

import struct
from typing import NamedTuple

_LAYOUT = struct.Struct("<6sHHHIB")

LINK_UP = 1
"""Bit of `NetConfig.status`: the link is up (VIRTIO_NET_S_LINK_UP)."""
ANNOUNCE = 2
"""Bit of `NetConfig.status`: the driver should announce itself (VIRTIO_NET_S_ANNOUNCE)."""


class NetConfig(NamedTuple):
    """``struct virtio_net_config`` up to `duplex`; each field counts only if its feature was negotiated."""

    mac: bytes = bytes(6)
    """Six bytes, with VIRTIO_NET_F_MAC."""
    status: int = LINK_UP
    """With VIRTIO_NET_F_STATUS."""
    max_queue_pairs: int = 1
    """With VIRTIO_NET_F_MQ or RSS: 1 to 32768."""
    mtu: int = 1500
    """With VIRTIO_NET_F_MTU: 68 to 65535 bytes."""
    speed: int = 0xFFFFFFFF
    """With VIRTIO_NET_F_SPEED_DUPLEX: Mbit/s, all ones if unknown."""
    duplex: int = 0xFF
    """With VIRTIO_NET_F_SPEED_DUPLEX: 0 half, 1 full, 0xff unknown."""

    @property
    def mac_text(self) -> str:
        """The address as people write it: ``52:54:00:12:34:56``."""
        return ":".join(f"{byte:02x}" for byte in self.mac)

    def pack(self) -> bytes:
        """The 17 bytes as they lie in configuration space."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> NetConfig:
        """Reads the fields that `data` covers; the others keep their defaults. Raises nothing: short data is legal,
        since a front-end may read only the fields it knows (virtio 1.2, 2.5)."""
        full = data[: _LAYOUT.size] + cls().pack()[min(len(data), _LAYOUT.size) :]
        return cls(*_LAYOUT.unpack(full))
