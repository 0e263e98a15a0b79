"""Linux as the ELF file `vmlinux`, entered where the bzImage's unpacker would enter it.

The segments go to their physical addresses; the entry is startup_64, in 64-bit mode, with the zero page's address in
RSI (Linux, Documentation/arch/x86/boot.rst, "64-bit Boot Protocol"). The file has no setup header, so one is made.
"""

from __future__ import annotations

import struct

from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.elf import X86_64, read_elf
from viaduct.vmm.boot.entry_modes import long_mode
from viaduct.vmm.boot.request import LINUX_COMMAND_LINE_MAX, BootRequest
from viaduct.vmm.boot.zero_page import SETUP_HEADER, place_zero_page
from viaduct.vmm.memory_map import RAM_LOW_END

KERNEL_ALIGNMENT = 0x20_0000


def load_linux_elf(request: BootRequest) -> CpuState:
    """Put the kernel and all it needs into RAM. Raises BootError where that cannot be."""
    elf = read_elf(request.kernel)
    if elf.machine != X86_64:
        raise request.kernel.error("is a 32-bit kernel", "use one for x86-64, or start it by PVH or multiboot (--boot)")
    end = elf.load(request.ram, elf.entry)
    command_line = request.place_command_line(LINUX_COMMAND_LINE_MAX)
    initrd = request.place_initrd(above=end, below=RAM_LOW_END)
    return long_mode(request.ram, elf.entry, rsi=place_zero_page(request, _setup_header(), command_line, initrd))


def _setup_header() -> bytes:
    header = bytearray(0x268 - SETUP_HEADER)
    for offset, layout, value in (
        (0x1FE, "<H", 0xAA55),
        (0x202, "<4s", b"HdrS"),
        (0x206, "<H", 0x20F),
        (0x211, "<B", 1),
        (0x230, "<I", KERNEL_ALIGNMENT),
        (0x238, "<I", LINUX_COMMAND_LINE_MAX),
    ):
        struct.pack_into(layout, header, offset - SETUP_HEADER, value)
    return bytes(header)
