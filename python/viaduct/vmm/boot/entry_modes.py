"""The modes of the processor that kernels are entered in, and the tables in memory that belong to them."""

from __future__ import annotations

import struct

from viaduct.vmm.boot import low_memory
from viaduct.vmm.boot.cpu_state import (
    CODE_32,
    CODE_64,
    CR0_ET,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    DATA_32,
    EFER_LMA,
    EFER_LME,
    EXECUTE_READ,
    READ_WRITE,
    TASK,
    CpuState,
    Segment,
    Table,
)
from viaduct.vmm.boot.placement import Placement
from viaduct.vmm.memory_map import GIB, MIB, PAGE

PRESENT, WRITABLE, LARGE = 1 << 0, 1 << 1, 1 << 7
FIRST_DISK = 0x80
INTERRUPT_VECTORS = Table(0, 0x3FF)


def long_mode(ram: Placement, rip: int, *, rsi: int) -> CpuState:
    """64-bit mode with the first 4 GiB mapped to themselves: how boot.rst, "64-bit Boot Protocol", enters Linux."""
    return CpuState(
        rip=rip,
        rsi=rsi,
        cs=CODE_64,
        data=DATA_32,
        gdt=_gdt(ram, CODE_64),
        cr0=CR0_PE | CR0_ET | CR0_PG,
        cr3=_identity_map(ram),
        cr4=CR4_PAE,
        efer=EFER_LME | EFER_LMA,
    )


def protected_mode(ram: Placement, rip: int, *, rax: int = 0, rbx: int) -> CpuState:
    """32-bit mode without paging: how PVH and multiboot enter kernels."""
    return CpuState(rip=rip, rax=rax, rbx=rbx, cs=CODE_32, data=DATA_32, gdt=_gdt(ram, CODE_32), cr0=CR0_PE | CR0_ET)


def real_mode(address: int) -> CpuState:
    """16-bit mode as a BIOS enters a boot sector, the stack below the code and the first disk in DL.

    An address above 64 KiB is reached through the code segment, with the other segments the same.
    """
    base = 0 if address < 0x1_0000 else address
    code = Segment(base >> 4, base, 0xFFFF, EXECUTE_READ)
    data = Segment(base >> 4, base, 0xFFFF, READ_WRITE)
    return CpuState(rip=address - base, rsp=address - base or 0xFFF0, rdx=0x80, cs=code, data=data, idt=Table(0, 0x3FF))


def _gdt(ram: Placement, code: Segment) -> Table:
    """Descriptors at their selectors: code at 0x10, data at 0x18 (boot.rst asks for these), the task's at 0x20."""
    table = struct.pack("<6Q", 0, 0, code.descriptor(), DATA_32.descriptor(), TASK.descriptor(), 0)
    ram.place(low_memory.GDT, table, "the GDT")
    return Table(low_memory.GDT, len(table) - 1)


def _identity_map(ram: Placement) -> int:
    """Page tables of 2 MiB pages for the first 4 GiB; their address for CR3 (Intel SDM 3, 4.5)."""
    directories = 4
    pointers = low_memory.PAGE_TABLES + PAGE
    first = pointers + PAGE
    level_4 = struct.pack("<Q", pointers | PRESENT | WRITABLE)
    level_3 = struct.pack(f"<{directories}Q", *(first + n * PAGE | PRESENT | WRITABLE for n in range(directories)))
    level_2 = struct.pack(
        f"<{512 * directories}Q",
        *(address | PRESENT | WRITABLE | LARGE for address in range(0, directories * GIB, 2 * MIB)),
    )
    ram.place(low_memory.PAGE_TABLES, level_4.ljust(PAGE, b"\0") + level_3.ljust(PAGE, b"\0") + level_2, "page tables")
    return low_memory.PAGE_TABLES
