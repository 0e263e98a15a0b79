"""The packet of a socket device (virtio 1.2, 5.10.6)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

_LAYOUT = struct.Struct("<QQIIIHHIII")

HEADER_SIZE = _LAYOUT.size
"""Bytes of the header: 44."""
STREAM = 1
"""`VsockHeader.type`: a stream of bytes (VIRTIO_VSOCK_TYPE_STREAM)."""
TRANSPORT_RESET = 0
"""The only event of the event queue: all connections are gone (virtio 1.2, 5.10.6.8)."""


class VsockOp(IntEnum):
    """What a packet is for (virtio 1.2, 5.10.6)."""

    INVALID = 0
    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class VsockShutdown(IntFlag):
    """`VsockHeader.flags` of a SHUTDOWN: what its sender will do no more (virtio 1.2, 5.10.6.5)."""

    RECEIVE = 1
    SEND = 2
    BOTH = 3


class VsockHeader(NamedTuple):
    """``struct virtio_vsock_hdr``."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    len: int = 0
    """Bytes of data behind the header."""
    type: int = STREAM
    op: int = VsockOp.INVALID
    flags: int = 0
    buf_alloc: int = 0
    """Bytes that the sender keeps for what it receives (virtio 1.2, 5.10.6.3)."""
    fwd_cnt: int = 0
    """How many of those it was sent it has passed on; counts modulo 2^32."""

    def pack(self) -> bytes:
        """The 44 bytes in front of the data."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, data: bytes) -> VsockHeader:
        """Reads exactly 44 bytes; whether they make sense is another question."""
        return cls(*_LAYOUT.unpack(data))
