"""The state of a vCPU before its first instruction, as plain data.

Architecture: Intel SDM volume 3, chapters 2 (control registers), 3.4.5 (segment descriptors) and 7.2 (task state).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import NamedTuple

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE = 1 << 5
EFER_LME, EFER_LMA = 1 << 8, 1 << 10
RFLAGS_RESERVED = 1 << 1
"""Always set; without interrupts, tracing and virtual-8086 mode this is all of it."""


class Segment(NamedTuple):
    """A segment register with its hidden part. `limit` counts bytes, whatever `g` says."""

    selector: int
    base: int
    limit: int
    type: int
    dpl: int = 0
    present: int = 1
    l: int = 0  # noqa: E741 - the architecture's name for the bit
    db: int = 0
    s: int = 1
    g: int = 0

    def descriptor(self) -> int:
        """The 8 bytes in a descriptor table that this was loaded from (Intel SDM 3, 3.4.5)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        return (
            limit & 0xFFFF
            | (self.base & 0xFF_FFFF) << 16
            | access << 40
            | (limit >> 16 & 0xF) << 48
            | (self.l << 1 | self.db << 2 | self.g << 3) << 52
            | (self.base >> 24 & 0xFF) << 56
        )


class Table(NamedTuple):
    """A descriptor table register: address, and offset of the last byte."""

    base: int
    limit: int


EXECUTE_READ, READ_WRITE = 0xB, 0x3  # both accessed
TSS_BUSY, LDT = 0xB, 0x2  # of system segments

CODE_64 = Segment(0x10, 0, 0xFFFF_FFFF, EXECUTE_READ, l=1, g=1)
CODE_32 = Segment(0x10, 0, 0xFFFF_FFFF, EXECUTE_READ, db=1, g=1)
DATA_32 = Segment(0x18, 0, 0xFFFF_FFFF, READ_WRITE, db=1, g=1)
TASK = Segment(0x20, 0, 0x67, TSS_BUSY, s=0)
NO_LDT = Segment(0, 0, 0xFFFF, LDT, s=0)
NO_TABLE = Table(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuState:
    """All registers that starting a kernel has a say in."""

    rip: int
    cs: Segment
    data: Segment
    """What DS, ES, SS, FS and GS hold."""
    tr: Segment = TASK
    ldt: Segment = NO_LDT
    gdt: Table = NO_TABLE
    idt: Table = NO_TABLE
    rax: int = 0
    rbx: int = 0
    rcx: int = 0
    rdx: int = 0
    rsi: int = 0
    rdi: int = 0
    rsp: int = 0
    rbp: int = 0
    r8: int = 0
    r9: int = 0
    r10: int = 0
    r11: int = 0
    r12: int = 0
    r13: int = 0
    r14: int = 0
    r15: int = 0
    rflags: int = RFLAGS_RESERVED
    cr0: int = CR0_ET
    cr3: int = 0
    cr4: int = 0
    efer: int = 0

    def registers(self) -> dict[str, object]:
        """What `Vm.set_registers` takes: each register by its name, segments and tables as plain tuples."""
        values = asdict(self)
        data = values.pop("data")
        values.update(dict.fromkeys(("ds", "es", "ss", "fs", "gs"), data))
        return {name: tuple(value) if isinstance(value, tuple) else value for name, value in values.items()}
