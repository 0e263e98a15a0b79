"""The zero page (struct boot_params) with which Linux is told about its machine.

Linux, Documentation/arch/x86/zero-page.rst and boot.rst. Beside what the protocol asks for, the kernel is given a
seed for its random numbers (SETUP_RNG_SEED), so that it need not wait for entropy: as setup_data, which older kernels
pass over.
"""

from __future__ import annotations

import os
import struct

from viaduct.vmm.boot import e820, low_memory
from viaduct.vmm.boot.request import BootRequest

SIZE = 4096
ACPI_RSDP = 0x070
E820_ENTRIES = 0x1E8
SETUP_HEADER = 0x1F1
E820_TABLE = 0x2D0
TYPE_OF_LOADER, RAMDISK_IMAGE, RAMDISK_SIZE = 0x210, 0x218, 0x21C
COMMAND_LINE, SETUP_DATA = 0x228, 0x250
UNKNOWN_LOADER = 0xFF
RNG_SEED, RNG_SEED_SIZE = 9, 32


def place_zero_page(request: BootRequest, header: bytes, command_line: int, initrd: tuple[int, int]) -> int:
    """Put the zero page into RAM and return its address.

    `header` is the setup header, which begins at 0x1F1; `command_line` the address, `initrd` address and size.
    """
    page = bytearray(SIZE)
    page[SETUP_HEADER : SETUP_HEADER + len(header)] = header
    page[TYPE_OF_LOADER] = UNKNOWN_LOADER
    struct.pack_into("<I", page, COMMAND_LINE, command_line)
    struct.pack_into("<2I", page, RAMDISK_IMAGE, *initrd)
    struct.pack_into("<Q", page, ACPI_RSDP, request.rsdp)
    seed = struct.pack("<QII", 0, RNG_SEED, RNG_SEED_SIZE) + os.urandom(RNG_SEED_SIZE)
    request.ram.place(low_memory.SETUP_DATA, seed, "setup_data")
    struct.pack_into("<Q", page, SETUP_DATA, low_memory.SETUP_DATA)
    entries = e820.memory_map(request.ram.ranges, request.platform)
    page[E820_ENTRIES] = len(entries)
    for index, entry in enumerate(entries):
        struct.pack_into("<QQI", page, E820_TABLE + 20 * index, *entry)
    request.ram.place(low_memory.ZERO_PAGE, bytes(page), "the zero page")
    return low_memory.ZERO_PAGE
