"""Small kernels by Multiboot (The Multiboot Specification 0.6.96).

The header is in the file's first 8 KiB. It says the addresses itself (flag 16), or the file is an ELF file for i386.
The kernel is entered in 32-bit protected mode, with a magic number in EAX and the address of the multiboot
information in EBX; an initrd becomes its only module.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from viaduct.vmm.boot import e820, low_memory
from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.elf import I386, MAGIC, read_elf
from viaduct.vmm.boot.entry_modes import protected_mode
from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.request import BootRequest
from viaduct.vmm.memory_map import CONVENTIONAL_END, EXTENDED_START, KIB, RAM_LOW_END

SEARCHED = 8192
HEADER_MAGIC, ENTRY_MAGIC = 0x1BAD_B002, 0x2BAD_B002
PAGE_ALIGNED_MODULES, MEMORY_INFORMATION, ADDRESSES = 1 << 0, 1 << 1, 1 << 16
MUST_UNDERSTAND = 0xFFFF
"""Flags 0 to 15: a loader that does not understand one has to refuse the kernel (3.1.2)."""
INFO_MEMORY, INFO_COMMAND_LINE, INFO_MODULES, INFO_MEMORY_MAP, INFO_LOADER = 1 << 0, 1 << 2, 1 << 3, 1 << 6, 1 << 9
INFO_SIZE = 120
LOADER_NAME = b"viaduct\0"


@dataclass(frozen=True, slots=True)
class MultibootHeader:
    """The header, and where in the file it is."""

    offset: int
    flags: int
    addresses: tuple[int, int, int, int, int]
    """header_addr, load_addr, load_end_addr, bss_end_addr, entry_addr; of meaning with flag 16 only (3.1.3)."""


def find_header(start: bytes) -> MultibootHeader | None:
    """The header in a file's first 8 KiB, a multiple of four bytes from its beginning; None if there is none."""
    start = start[:SEARCHED].ljust(SEARCHED + 32, b"\0")
    for offset in range(0, SEARCHED, 4):
        magic, flags, checksum, *addresses = struct.unpack_from("<8I", start, offset)
        if magic == HEADER_MAGIC and (magic + flags + checksum) & 0xFFFF_FFFF == 0:
            first, second, third, fourth, fifth = addresses
            return MultibootHeader(offset, flags, (first, second, third, fourth, fifth))
    return None


def load_multiboot(request: BootRequest) -> CpuState:
    """Put the kernel and all it needs into RAM. Raises BootError where that cannot be."""
    image = request.kernel
    start = image.start(SEARCHED)
    header = find_header(start)
    if header is None:
        raise image.error("has no multiboot header in its first 8 KiB", "take --boot auto, or another kernel")
    unknown = header.flags & MUST_UNDERSTAND & ~(PAGE_ALIGNED_MODULES | MEMORY_INFORMATION)
    if unknown:
        raise image.error(
            f"asks for features {unknown:#x} of multiboot", "allowed are 0x3: there is no video mode to be set"
        )
    if header.flags & ADDRESSES:
        entry, end = _load_by_addresses(request, header)
    elif start.startswith(MAGIC):
        elf = read_elf(image)
        if elf.machine != I386:
            raise image.error("is a multiboot kernel for x86-64", "link it for i386: multiboot enters 32-bit mode")
        entry, end = elf.entry, elf.load(request.ram, elf.entry)
    else:
        raise image.error("its multiboot header has no addresses, and it is no ELF file", "set flag 16, or use ELF")
    command_line = request.place_command_line(low_memory.COMMAND_LINE_AREA - 1)
    module = request.place_initrd(above=max(end, EXTENDED_START), below=RAM_LOW_END)
    information = _information(request, command_line, module)
    request.ram.place(low_memory.START_INFO, information, "the multiboot information")
    return protected_mode(request.ram, entry, rax=ENTRY_MAGIC, rbx=low_memory.START_INFO)


def _load_by_addresses(request: BootRequest, header: MultibootHeader) -> tuple[int, int]:
    """Load what the header's addresses say (3.1.3). Returns the entry point and the end of the kernel."""
    image, ram = request.kernel, request.ram
    header_address, load, load_end, bss_end, entry = header.addresses
    offset = header.offset - (header_address - load)
    size = load_end - load if load_end else image.size - offset
    end = max(load + size, bss_end)
    if not (load <= header_address and offset >= 0 and size > 0 and load <= entry < load + size):
        raise image.error(
            f"its multiboot header at {header.offset} has addresses that do not go together: "
            f"header {header_address:#x}, load {load:#x} to {load_end:#x}, entry {entry:#x}",
            "load <= header, load <= entry < load end (Multiboot 3.1.3)",
        )
    check_size(image, offset, size)
    ram.claim(load, end - load, "the kernel", image.name)
    ram.copy(image, offset, size, load, "the kernel")
    return entry, end


def check_size(image: Image, offset: int, size: int) -> None:
    """Raises BootError if the file ends before `size` bytes from `offset` on."""
    if offset + size > image.size:
        raise image.error(
            f"ends at {image.size} bytes, but its header speaks of {offset + size}",
            "it is truncated or damaged: copy it again",
        )


def _information(request: BootRequest, command_line: int, module: tuple[int, int]) -> bytes:
    """The multiboot information structure and what it points to (3.3)."""
    low_end = request.ram.ranges[0][1]
    entries = [struct.pack("<I2QI", 20, *entry) for entry in e820.memory_map(request.ram.ranges, request.platform)]
    address, size = module
    modules = struct.pack("<4I", address, address + size, 0, 0) if size else b""
    name = low_memory.START_INFO + INFO_SIZE
    first_module = name + len(LOADER_NAME)
    first_entry = first_module + len(modules)
    flags = INFO_MEMORY | INFO_COMMAND_LINE | INFO_MEMORY_MAP | INFO_LOADER | (INFO_MODULES if modules else 0)
    information = bytearray(INFO_SIZE)
    lower, upper = CONVENTIONAL_END // KIB, max(low_end - EXTENDED_START, 0) // KIB
    struct.pack_into("<7I", information, 0, flags, lower, upper, 0, command_line, len(modules) // 16, first_module)
    struct.pack_into("<2I", information, 44, 24 * len(entries), first_entry)
    struct.pack_into("<I", information, 64, name)
    return b"".join((information, LOADER_NAME, modules, *entries))
