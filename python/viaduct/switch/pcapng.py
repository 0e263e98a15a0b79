"""Captured frames as a pcapng file (the IETF draft "PCAP Now Generic Capture File Format"), piece by piece.

A file is a Section Header Block, one Interface Description Block for each port before its first frame, and an Enhanced
Packet Block for each frame. Nothing is written back, so a pipe into Wireshark works as well as a file.
"""

from __future__ import annotations

import struct

from .status import Frame

_SECTION = 0x0A0D0D0A
_INTERFACE = 1
_PACKET = 6
_BYTE_ORDER = 0x1A2B3C4D
_LENGTH_UNKNOWN = -1
_ETHERNET = 1
"""LINKTYPE_ETHERNET."""
_IF_NAME, _IF_TSRESOL = 2, 9
_USER_APPLICATION = 4
_PACKET_FLAGS = 2
_NANOSECONDS = b"\x09"
"""if_tsresol: negative power of ten."""
_INBOUND, _OUTBOUND = 1, 2
"""epb_flags, bits 0 and 1. Seen from the switch: received from the port is inbound."""

_PACKET_HEAD = struct.Struct("<IIIIIII")
_PACKET_TAILS = {
    direction: struct.pack("<HHII", _PACKET_FLAGS, 4, flags, 0)
    for direction, flags in (("received", _INBOUND), ("sent", _OUTBOUND))
}


class PcapngEncoder:
    """Turns frames into the bytes of one section. Interfaces are numbered as their ports first appear."""

    def __init__(self) -> None:
        self._interfaces: dict[str, int] = {}

    def header(self) -> bytes:
        """What comes before everything else."""
        body = struct.pack("<IHHq", _BYTE_ORDER, 1, 0, _LENGTH_UNKNOWN)
        return _block(_SECTION, body + _option(_USER_APPLICATION, b"viaduct") + _option(0, b""))

    def frame(self, frame: Frame) -> bytes:
        """One frame, preceded by the description of its port if that is new."""
        described = b""
        interface = self._interfaces.get(frame.port)
        if interface is None:
            interface = self._interfaces[frame.port] = len(self._interfaces)
            options = _option(_IF_NAME, frame.port.encode()) + _option(_IF_TSRESOL, _NANOSECONDS) + _option(0, b"")
            described = _block(_INTERFACE, struct.pack("<HHI", _ETHERNET, 0, 0) + options)
        kept = len(frame.data)
        tail = _PACKET_TAILS[frame.direction]
        size = _PACKET_HEAD.size + kept + (-kept & 3) + len(tail) + 4
        head = _PACKET_HEAD.pack(
            _PACKET, size, interface, frame.time_ns >> 32, frame.time_ns & 0xFFFFFFFF, kept, frame.length
        )
        return b"".join((described, head, frame.data, bytes(-kept & 3), tail, size.to_bytes(4, "little")))


def _block(kind: int, body: bytes) -> bytes:
    size = len(body) + 12
    return struct.pack("<II", kind, size) + body + struct.pack("<I", size)


def _option(code: int, value: bytes) -> bytes:
    return struct.pack("<HH", code, len(value)) + value + bytes(-len(value) & 3)
