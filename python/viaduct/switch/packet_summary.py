"""A packet in one line, and its virtio-net header, for people who look for a fault."""

from __future__ import annotations

import ipaddress
import struct

_ETHERTYPES = {0x0806: "ARP", 0x86DD: "IPv6", 0x0800: "IPv4", 0x8100: "VLAN", 0x88CC: "LLDP", 0x8035: "RARP"}
_PROTOCOLS = {1: "ICMP", 2: "IGMP", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_TCP_FLAGS = "FSRPAUEC"
_GSO = {0: "", 1: "TCPv4", 3: "UDP", 4: "TCPv6", 5: "UDP_L4"}

NEEDS_CSUM, DATA_VALID = 1, 2
GSO_ECN = 0x80


def describe_header(header: bytes) -> str:
    """The fields of a virtio-net header that say something (virtio 1.2, 5.1.6)."""
    if len(header) < 10:
        return f"cut off after {len(header)} bytes"
    flags, gso_type, hdr_len, gso_size, csum_start, csum_offset = struct.unpack_from("<BBHHHH", header)
    parts = []
    if flags & NEEDS_CSUM:
        parts.append(f"checksum to be written at {csum_start}+{csum_offset}")
    if flags & DATA_VALID:
        parts.append("checksum verified")
    if flags & ~(NEEDS_CSUM | DATA_VALID):
        parts.append(f"flags {flags:#x}")
    if gso_type:
        kind = _GSO.get(gso_type & ~GSO_ECN, f"type {gso_type & ~GSO_ECN}")
        ecn = " with ECN" if gso_type & GSO_ECN else ""
        parts.append(f"segments of {gso_size} bytes ({kind}{ecn}), headers {hdr_len} bytes")
    if len(header) >= 12:
        (buffers,) = struct.unpack_from("<H", header, 10)
        if buffers > 1:
            parts.append(f"in {buffers} buffers")
    return ", ".join(parts) or "no offload"


def describe_frame(frame: bytes) -> str:
    """Addresses and protocols of an Ethernet frame, of which the first bytes are enough."""
    if len(frame) < 14:
        return f"{len(frame)} bytes, too few for Ethernet"
    to, sender, ethertype = frame[:6].hex(":"), frame[6:12].hex(":"), int.from_bytes(frame[12:14], "big")
    line, at = f"{sender} > {to}", 14
    while ethertype in (0x8100, 0x88A8) and len(frame) >= at + 4:
        tag, ethertype = struct.unpack_from(">HH", frame, at)
        line += f", vlan {tag & 0xFFF}"
        at += 4
    rest = frame[at:]
    if ethertype == 0x0800:
        return f"{line}, {_ipv4(rest)}"
    if ethertype == 0x86DD:
        return f"{line}, {_ipv6(rest)}"
    if ethertype == 0x0806:
        return f"{line}, {_arp(rest)}"
    return f"{line}, {_ETHERTYPES.get(ethertype, f'ethertype {ethertype:#06x}')}"


def _ipv4(packet: bytes) -> str:
    if len(packet) < 20:
        return "IPv4, cut off"
    length, protocol = (packet[0] & 15) * 4, packet[9]
    sender, to = ipaddress.IPv4Address(packet[12:16]), ipaddress.IPv4Address(packet[16:20])
    if int.from_bytes(packet[6:8], "big") & 0x1FFF:
        return f"IPv4 {sender} > {to}, a later fragment"
    return _transport("IPv4", str(sender), str(to), protocol, packet[length:])


def _ipv6(packet: bytes) -> str:
    if len(packet) < 40:
        return "IPv6, cut off"
    sender, to = ipaddress.IPv6Address(packet[8:24]), ipaddress.IPv6Address(packet[24:40])
    return _transport("IPv6", str(sender), str(to), packet[6], packet[40:])


def _transport(version: str, sender: str, to: str, protocol: int, rest: bytes) -> str:
    name = _PROTOCOLS.get(protocol, f"protocol {protocol}")
    line = f"{version} {sender} > {to}, {name}"
    if protocol in (6, 17) and len(rest) >= 4:
        source, destination = struct.unpack_from(">HH", rest)
        line += f" {source} > {destination}"
        if protocol == 6 and len(rest) >= 14:
            flags = "".join(letter for bit, letter in enumerate(_TCP_FLAGS) if rest[13] >> bit & 1)
            line += f" [{flags}]"
    elif protocol in (1, 58) and rest:
        kinds = {(1, 8): "echo request", (1, 0): "echo reply", (58, 128): "echo request", (58, 129): "echo reply"}
        line += f" {kinds.get((protocol, rest[0]), f'type {rest[0]}')}"
    return line


def _arp(packet: bytes) -> str:
    if len(packet) < 28 or packet[:6] != b"\x00\x01\x08\x00\x06\x04":
        return "ARP"
    operation = int.from_bytes(packet[6:8], "big")
    sender, target = ipaddress.IPv4Address(packet[14:18]), ipaddress.IPv4Address(packet[24:28])
    if operation == 1:
        return f"ARP who has {target}? tell {sender}"
    return f"ARP {sender} is at {packet[8:14].hex(':')}" if operation == 2 else f"ARP operation {operation}"
