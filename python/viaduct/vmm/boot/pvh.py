"""Kernels by PVH: an ELF file with an entry point for virtual machines, which needs no unpacking.

Xen, docs/misc/pvh.pandoc (the state of the vCPU) and public/arch-x86/hvm/start_info.h (the structures). The entry is
the content of the note "Xen" of type 18, a physical address; it is entered in 32-bit protected mode with the address
of the start info in EBX. Linux has it with CONFIG_PVH, as distributions do; FreeBSD and several unikernels have it as
well.
"""

from __future__ import annotations

import struct

from viaduct.vmm.boot import e820, low_memory
from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.elf import Elf, read_elf
from viaduct.vmm.boot.entry_modes import protected_mode
from viaduct.vmm.boot.request import LINUX_COMMAND_LINE_MAX, BootRequest
from viaduct.vmm.memory_map import RAM_LOW_END

PHYS32_ENTRY = 18
"""XEN_ELFNOTE_PHYS32_ENTRY (public/elfnote.h)."""
MAGIC = 0x336E_C578
VERSION = 1
START_INFO = struct.Struct("<4I4Q2I")
MODULE = struct.Struct("<4Q")
MEMORY_MAP = struct.Struct("<2Q2I")


def pvh_entry(elf: Elf) -> int | None:
    """The entry point that PVH asks for; None if the kernel has none."""
    for name, kind, content in elf.notes():
        if name == b"Xen" and kind == PHYS32_ENTRY and len(content) in (4, 8):
            return int.from_bytes(content, "little")
    return None


def load_pvh(request: BootRequest) -> CpuState:
    """Put the kernel and all it needs into RAM. Raises BootError where that cannot be."""
    ram, elf = request.ram, read_elf(request.kernel)
    entry = pvh_entry(elf)
    if entry is None:
        raise request.kernel.error(
            "has no entry point for PVH (no ELF note Xen, type 18)",
            "take --boot linux for a vmlinux, or a kernel that was built with CONFIG_PVH",
        )
    end = elf.load(ram, entry)
    command_line = request.place_command_line(LINUX_COMMAND_LINE_MAX)
    address, size = request.place_initrd(above=end, below=RAM_LOW_END)
    modules = [MODULE.pack(address, size, 0, 0)] if size else []
    entries = [MEMORY_MAP.pack(*entry, 0) for entry in e820.memory_map(ram.ranges, request.platform)]
    first_module = low_memory.START_INFO + START_INFO.size
    first_entry = first_module + MODULE.size * len(modules)
    info = START_INFO.pack(
        MAGIC,
        VERSION,
        0,
        len(modules),
        first_module if modules else 0,
        command_line,
        request.rsdp,
        first_entry,
        len(entries),
        0,
    )
    ram.place(low_memory.START_INFO, b"".join((info, *modules, *entries)), "the start info of PVH")
    return protected_mode(ram, entry, rbx=low_memory.START_INFO)
