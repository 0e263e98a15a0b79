"""Kernels made for the tests, with each field in the hand of the test; and memory to load them into."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field

from viaduct._core import GuestMemory
from viaduct.vmm.memory_map import MIB, ram_regions

CODE = bytes(range(256)) * 8


def guest_memory(size: int = 16 * MIB) -> GuestMemory:
    """Memory of zeroes, laid out as a machine's."""
    fd = os.memfd_create("test")
    try:
        os.ftruncate(fd, size)
        memory, offset = GuestMemory(), 0
        for start, length in ram_regions(size):
            memory = memory.with_region(start, length, start, offset, fd)
            offset += length
        return memory
    finally:
        os.close(fd)


@dataclass
class BzImage:
    """A bzImage: real-mode part, header, code. The field names are those of boot.rst."""

    code: bytes = CODE
    setup_sects: int = 2
    boot_flag: int = 0xAA55
    magic: bytes = b"HdrS"
    version: int = 0x20F
    loadflags: int = 1
    initrd_addr_max: int = 0x7FFF_FFFF
    kernel_alignment: int = 0x20_0000
    relocatable_kernel: int = 1
    min_alignment: int = 21
    xloadflags: int = 0x7F
    cmdline_size: int = 2047
    pref_address: int = 0x20_0000
    init_size: int = 0x10_0000
    payload: bytes = b""
    payload_length: int | None = None
    syssize: int | None = None

    def bytes(self) -> bytes:
        """The file."""
        code = self.code + self.payload
        code = code.ljust(-(-len(code) // 16) * 16, b"\0")
        head = bytearray(((self.setup_sects or 4) + 1) * 512)
        head[0x201] = 0x268 + 4 - 0x202
        for offset, layout, value in (
            (0x1F1, "<B", self.setup_sects),
            (0x1F4, "<I", len(code) // 16 if self.syssize is None else self.syssize),
            (0x1FE, "<H", self.boot_flag),
            (0x202, "<4s", self.magic),
            (0x206, "<H", self.version),
            (0x211, "<B", self.loadflags),
            (0x22C, "<I", self.initrd_addr_max),
            (0x230, "<I", self.kernel_alignment),
            (0x234, "<B", self.relocatable_kernel),
            (0x235, "<B", self.min_alignment),
            (0x236, "<H", self.xloadflags),
            (0x238, "<I", self.cmdline_size),
            (0x248, "<I", len(self.code)),
            (0x24C, "<I", len(self.payload) if self.payload_length is None else self.payload_length),
            (0x258, "<Q", self.pref_address),
            (0x260, "<I", self.init_size),
        ):
            struct.pack_into(layout, head, offset, value)
        return bytes(head) + code


@dataclass
class ElfSegment:
    """What a program header says, and the bytes in the file."""

    address: int
    content: bytes
    type: int = 1
    memory_size: int | None = None
    file_size: int | None = None
    offset: int | None = None


def note(name: bytes, kind: int, content: bytes) -> bytes:
    """An ELF note."""
    padded = content.ljust(-(-len(content) // 4) * 4, b"\0")
    return struct.pack("<3I", len(name), len(content), kind) + name.ljust(-(-len(name) // 4) * 4, b"\0") + padded


def pvh_note(entry: int) -> ElfSegment:
    """A segment with the note that PVH looks for."""
    return ElfSegment(0, note(b"GNU\0", 3, b"abcdef") + note(b"Xen\0", 18, struct.pack("<I", entry)), type=4)


@dataclass
class Elf:
    """An ELF file for x86."""

    segments: list[ElfSegment] = field(default_factory=lambda: [ElfSegment(0x20_0000, CODE)])
    entry: int = 0x20_0000
    bits: int = 64
    machine: int = 62
    type: int = 2
    order: int = 1
    count: int | None = None
    header_size: int | None = None

    def bytes(self) -> bytes:
        """The file: headers, then the segments' bytes from 4 KiB on."""
        size = 56 if self.bits == 64 else 32
        ident = struct.pack("<4s3B9x", b"\x7fELF", 2 if self.bits == 64 else 1, self.order, 1)
        layout = "<HHIQQQI6H" if self.bits == 64 else "<HHIIIII6H"
        head = struct.calcsize(layout) + len(ident)
        count = len(self.segments) if self.count is None else self.count
        entry_size = size if self.header_size is None else self.header_size
        header = ident + struct.pack(
            layout, self.type, self.machine, 1, self.entry, head, 0, 0, head, entry_size, count, 0, 0, 0
        )
        table, body = b"", b""
        for segment in self.segments:
            offset = 4096 + len(body) if segment.offset is None else segment.offset
            file_size = len(segment.content) if segment.file_size is None else segment.file_size
            memory_size = len(segment.content) if segment.memory_size is None else segment.memory_size
            virtual = 0xFFFF_FFFF_8000_0000 + segment.address if self.bits == 64 else segment.address
            if self.bits == 64:
                table += struct.pack(
                    "<IIQQQQQQ",
                    segment.type,
                    7,
                    offset,
                    virtual & (1 << 64) - 1,
                    segment.address,
                    file_size,
                    memory_size,
                    4096,
                )
            else:
                table += struct.pack(
                    "<8I", segment.type, offset, virtual, segment.address, file_size, memory_size, 7, 4096
                )
            body += segment.content
        return (header + table).ljust(4096, b"\0") + body


def multiboot(flags: int, addresses: Iterable[int] = (), *, checksum: int | None = None) -> bytes:
    """A multiboot header."""
    magic = 0x1BAD_B002
    checksum = -(magic + flags) & 0xFFFF_FFFF if checksum is None else checksum
    return struct.pack("<3I", magic, flags, checksum) + b"".join(struct.pack("<I", value) for value in addresses)


def text(memory: GuestMemory, address: int) -> bytes:
    """The bytes up to a zero."""
    return memory.read(address, 4096).split(b"\0")[0]
