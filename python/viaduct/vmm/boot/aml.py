"""ACPI machine language, as much of it as describes our devices (ACPI 6.5, chapter 20), and resource descriptors (6.4).

Each function returns the bytes of one term; terms are put together by giving them as arguments.
"""

from __future__ import annotations

import struct

Term = bytes

ZERO, ONE = b"\x00", b"\x01"


def arg(number: int) -> Term:
    """An argument of the method (20.2.6.1)."""
    return bytes([0x68 + number])


def local(number: int) -> Term:
    """A local variable of the method (20.2.6.2)."""
    return bytes([0x60 + number])


def path(name: str) -> Term:
    r"""A name such as ``\_SB.PCI0`` (20.2.2)."""
    root = b"\\" if name.startswith("\\") else b""
    segments = [segment.ljust(4, "_").encode() for segment in name.removeprefix("\\").split(".") if segment]
    prefix = {0: b"\0", 1: b"", 2: b"\x2e"}.get(len(segments), bytes([0x2F, len(segments)]))
    return root + prefix + b"".join(segments)


def integer(value: int) -> Term:
    """A constant (20.2.3), as short as possible."""
    if value < 2:
        return bytes([value])
    for code, layout in ((0x0A, "<B"), (0x0B, "<H"), (0x0C, "<I")):
        if value < 1 << 8 * struct.calcsize(layout):
            return bytes([code]) + struct.pack(layout, value)
    return b"\x0e" + struct.pack("<Q", value)


def string(value: str) -> Term:
    """Text in ASCII (20.2.3)."""
    return b"\x0d" + value.encode("ascii") + b"\0"


def eisa_id(identifier: str) -> Term:
    """A compressed identifier such as PNP0A08 (19.3.4, EISAID)."""
    first, second, third = (ord(letter) - 0x40 for letter in identifier[:3])
    packed = first << 26 | second << 21 | third << 16 | int(identifier[3:], 16)
    return b"\x0c" + struct.pack(">I", packed)


def buffer(data: bytes) -> Term:
    """Bytes (20.2.5.4, DefBuffer)."""
    return _sized(b"\x11", integer(len(data)) + data)


def to_uuid(value: str) -> Term:
    """A UUID as a buffer (19.6.142, ToUUID)."""
    *fields, fourth, fifth = map(bytes.fromhex, value.split("-"))
    # The first three with their lowest byte first.
    return buffer(b"".join(field[::-1] for field in fields) + fourth + fifth)


def package(*elements: Term) -> Term:
    """Up to 255 elements (20.2.5.4, DefPackage)."""
    return _sized(b"\x12", bytes([len(elements)]) + b"".join(elements))


def name(what: str, value: Term) -> Term:
    """A named object (20.2.5.1, DefName)."""
    return b"\x08" + path(what) + value


def scope(what: str, *terms: Term) -> Term:
    """Terms below an object that is there already (20.2.5.1, DefScope)."""
    return _sized(b"\x10", path(what) + b"".join(terms))


def device(what: str, *terms: Term) -> Term:
    """A device and its objects (20.2.5.2, DefDevice)."""
    return _sized(b"\x5b\x82", path(what) + b"".join(terms))


def method(what: str, arguments: int, *terms: Term) -> Term:
    """A method that one thread at a time executes (20.2.5.2, DefMethod)."""
    serialized = 1 << 3
    return _sized(b"\x14", path(what) + bytes([arguments | serialized]) + b"".join(terms))


def if_(condition: Term, *terms: Term) -> Term:
    """Terms for a condition that holds (20.2.5.3, DefIfElse)."""
    return _sized(b"\xa0", condition + b"".join(terms))


def else_(*terms: Term) -> Term:
    """Terms for the condition just before that does not hold."""
    return _sized(b"\xa1", b"".join(terms))


def equal(left: Term, right: Term) -> Term:
    """Whether two operands are equal (20.2.5.4, DefLEqual)."""
    return b"\x93" + left + right


def not_(operand: Term) -> Term:
    """Whether an operand is zero (20.2.5.4, DefLNot)."""
    return b"\x92" + operand


def store(value: Term, target: Term) -> Term:
    """An assignment (20.2.5.4, DefStore)."""
    return b"\x70" + value + target


def and_(left: Term, right: Term, target: Term) -> Term:
    """Bits that both operands have, into a target (20.2.5.4, DefAnd)."""
    return b"\x7b" + left + right + target


def or_(left: Term, right: Term, target: Term) -> Term:
    """Bits that one of the operands has, into a target (20.2.5.4, DefOr)."""
    return b"\x7d" + left + right + target


def dword_field(source: Term, offset: int, what: str) -> Term:
    """A name for four bytes of a buffer (20.2.5.2, DefCreateDWordField)."""
    return b"\x8a" + source + integer(offset) + path(what)


def notify(what: Term, value: int) -> Term:
    """Tells the operating system of something that happened to a device (19.6.95)."""
    return b"\x86" + what + integer(value)


def return_(value: Term) -> Term:
    """The end of a method (20.2.5.3, DefReturn)."""
    return b"\xa4" + value


def resources(*descriptors: bytes) -> Term:
    """A resource template: the descriptors and an end tag, whose checksum of 0 means that there is none (6.4.2.9)."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def ports(base: int, size: int) -> bytes:
    """Ports that the device answers to (6.4.2.5)."""
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def memory(base: int, size: int) -> bytes:
    """Memory that the device answers to (6.4.3.4)."""
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def edge_interrupt(gsi: int) -> bytes:
    """An interrupt that is the device's alone, edge-triggered and active high (6.4.3.6)."""
    consumer, edge = 1 << 0, 1 << 1
    return struct.pack("<BHBBI", 0x89, 6, consumer | edge, 1, gsi)


_MEMORY, _PORTS, _BUSES = range(3)
_FIXED = 1 << 2 | 1 << 3  # both ends; the device produces the range


def bus_window(first: int, count: int) -> bytes:
    """Bus numbers below a bridge (6.4.3.5.3)."""
    return struct.pack("<BHBBB5H", 0x88, 13, _BUSES, _FIXED, 0, 0, first, first + count - 1, 0, count)


def port_window(base: int, size: int) -> bytes:
    """Ports below a bridge, of ISA and other cards (6.4.3.5.3)."""
    return struct.pack("<BHBBB5H", 0x88, 13, _PORTS, _FIXED, 3, 0, base, base + size - 1, 0, size)


def memory_window(base: int, size: int) -> bytes:
    """Memory below a bridge, in the first 4 GiB, read-write and not cacheable (6.4.3.5.2)."""
    return struct.pack("<BHBBB5I", 0x87, 23, _MEMORY, _FIXED, 1, 0, base, base + size - 1, 0, size)


def memory_window_64(base: int, size: int) -> bytes:
    """The same anywhere (6.4.3.5.1)."""
    return struct.pack("<BHBBB5Q", 0x8A, 43, _MEMORY, _FIXED, 1, 0, base, base + size - 1, 0, size)


def _sized(opcode: bytes, content: bytes) -> Term:
    """An opcode, the length of what follows, and that (20.2.4): the length counts its own bytes."""
    length = len(content) + 1
    if length < 1 << 6:
        return opcode + bytes([length]) + content
    for more in (1, 2, 3):
        length = len(content) + 1 + more
        if length < 1 << 4 + 8 * more:
            return opcode + bytes([more << 6 | length & 0xF]) + (length >> 4).to_bytes(more, "little") + content
    raise ValueError(f"{len(content)} bytes are too many for an AML object")
