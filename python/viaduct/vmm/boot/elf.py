"""Kernels as ELF files: what the loader reads of the header, the program headers and the notes.

System V ABI, chapters 4 and 5. Everything is read from a file that nobody vouches for: counts and sizes are compared
with the file's size or a fixed limit before they are used.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.placement import Placement

MAGIC = b"\x7fELF"
I386, X86_64 = 3, 62
MACHINES = {2: "SPARC", 8: "MIPS", 20: "PowerPC", 21: "PowerPC", 22: "S390", 40: "ARM", 183: "ARM64", 243: "RISC-V"}
MACHINES |= {I386: "i386", X86_64: "x86-64"}
EXECUTABLE, SHARED = 2, 3
LOAD, INTERPRETER, NOTE = 1, 3, 4
PROGRAM_HEADERS_MAX = 128
NOTES_MAX = 1 << 16


@dataclass(frozen=True, slots=True)
class Segment:
    """A program header: what goes from where in the file to where in memory."""

    type: int
    offset: int
    address: int
    """Physical."""
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class Elf:
    """An executable for x86."""

    image: Image
    bits: int
    machine: int
    entry: int
    segments: tuple[Segment, ...]

    @property
    def loaded(self) -> tuple[Segment, ...]:
        """The segments that belong into memory."""
        return tuple(segment for segment in self.segments if segment.type == LOAD and segment.memory_size)

    def notes(self) -> Iterator[tuple[bytes, int, bytes]]:
        """Name, type and content of each note (System V ABI, 5, "Note Section"); none where they are damaged."""
        for segment in self.segments:
            if segment.type != NOTE:
                continue
            data = self.image.read(segment.offset, min(segment.file_size, NOTES_MAX), "the notes")
            place = 0
            while place + 12 <= len(data):
                name_size, size, kind = struct.unpack_from("<3I", data, place)
                name = place + 12
                content = name + -(-name_size // 4) * 4
                place = content + -(-size // 4) * 4
                if content + size > len(data):
                    break
                yield data[name : name + name_size].rstrip(b"\0"), kind, data[content : content + size]

    def load(self, ram: Placement, entry: int) -> int:
        """Put all segments into RAM and return the end of the highest.

        Raises BootError where one does not fit, or `entry` is in none.
        """
        image = self.image
        if not self.loaded:
            raise image.error("has no segment to load", "name a kernel: a program's object file is none")
        for segment in self.loaded:
            ram.claim(segment.address, segment.memory_size, "a segment of the kernel", image.name)
        if not any(segment.address <= entry < segment.address + segment.file_size for segment in self.loaded):
            raise image.error(f"its entry point {entry:#x} is in none of its segments", "it is damaged, or no kernel")
        for segment in self.loaded:
            ram.copy(image, segment.offset, segment.file_size, segment.address, "a segment of the kernel")
        return max(segment.address + segment.memory_size for segment in self.loaded)


def read_elf(image: Image) -> Elf:
    """The headers of an ELF file. Raises BootError if it is damaged, or no executable for x86."""
    ident = image.read(0, 20, "the ELF header")
    bits = {1: 32, 2: 64}.get(ident[4], 0)
    if not bits or ident[5] != 1:
        raise image.error(
            f"is an ELF file of class {ident[4]} and byte order {ident[5]}", "use one for x86: class 1 or 2, order 1"
        )
    kind, machine = struct.unpack_from("<2H", ident, 16)
    if machine not in (I386, X86_64):
        raise image.error(f"is a program for {MACHINES.get(machine, f'machine {machine}')}", "use a kernel for x86-64")
    if kind not in (EXECUTABLE, SHARED):
        raise image.error(f"is an ELF file of type {kind}, no executable", "use the linked kernel (vmlinux)")
    if bits == 64:
        header = image.read(0, 64, "the ELF header")
        entry, table, entry_size, count = struct.unpack_from("<24xQQ14xHH", header)
    else:
        header = image.read(0, 52, "the ELF header")
        entry, table, entry_size, count = struct.unpack_from("<24xII10xHH", header)
    layout = struct.Struct("<I4xQ8xQQQ" if bits == 64 else "<II4xIII")
    if count and entry_size != (56 if bits == 64 else 32):
        raise image.error(f"has program headers of {entry_size} bytes", "it is damaged: copy it again")
    if count > PROGRAM_HEADERS_MAX:
        raise image.error(f"has {count} program headers", f"it is damaged: allowed are {PROGRAM_HEADERS_MAX}")
    headers = image.read(table, count * entry_size, "the program headers") if count else b""
    segments = []
    for index in range(count):
        type_, offset, address, file_size, memory_size = layout.unpack_from(headers, index * entry_size)
        if type_ == INTERPRETER:
            raise image.error("is a program for an operating system, no kernel", "name a kernel (vmlinuz, vmlinux)")
        segment = Segment(type_, offset, address, file_size, memory_size)
        if type_ == LOAD and file_size > memory_size:
            raise image.error(
                f"program header {index} has {file_size} bytes in the file and {memory_size} in memory",
                "it is damaged: a segment cannot shrink (System V ABI, 5)",
            )
        if type_ in (LOAD, NOTE) and offset + file_size > image.size:
            raise image.error(
                f"ends at {image.size} bytes, inside the segment of program header {index} "
                f"(bytes {offset} to {offset + file_size})",
                "it is truncated or damaged: copy or download it again",
            )
        segments.append(segment)
    return Elf(image, bits, machine, entry, tuple(segments))
