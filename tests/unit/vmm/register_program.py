"""A driver for tests, assembled here: 32-bit protected mode without paging, so that every register has its address.

It does not decide anything: it writes, copies, waits for its interrupt, once, and reports. What follows the wait is the
interrupt's handler, which never returns, as not every KVM can emulate an IRET in protected mode.
"""

from __future__ import annotations

import struct

from viaduct._core import Vm
from viaduct.vmm.memory_map import IOAPIC, LOCAL_APIC
from viaduct.vmm.ram import Ram

GDT, IDT, CODE, HANDLER, STACK = 0x1000, 0x1800, 0x2000, 0x4000, 0x6000
VECTOR = 0x40
REPORT_PORT = 0x10
CODE_32 = (8, 0, 0xFFFF_FFFF, 0xB, 0, 1, 0, 1, 1, 1)
DATA_32 = (16, 0, 0xFFFF_FFFF, 0x3, 0, 1, 0, 1, 1, 1)
GDT_ENTRIES = struct.pack("<QQQ", 0, 0x00CF_9A00_0000_FFFF, 0x00CF_9200_0000_FFFF)


class Program:
    """Instructions, one after the other."""

    def __init__(self) -> None:
        self.code = b""
        self.handler: bytes | None = None
        """What follows the interrupt."""

    def store(self, address: int, value: int, width: int = 4) -> Program:
        """Writes a value to an address."""
        prefix, opcode, form = {1: (b"", 0xC6, "<B"), 2: (b"\x66", 0xC7, "<H"), 4: (b"", 0xC7, "<I")}[width]
        return self._add(prefix + bytes([opcode, 0x05]) + struct.pack("<I", address) + struct.pack(form, value))

    def store_wide(self, address: int, value: int) -> Program:
        """Writes 64 bits in two halves."""
        return self.store(address, value & 0xFFFF_FFFF).store(address + 4, value >> 32)

    def copy(self, source: int, target: int, width: int = 4) -> Program:
        """Reads from one address, in this width, and writes to another."""
        prefix, load, save = {1: (b"", 0xA0, 0xA2), 2: (b"\x66", 0xA1, 0xA3), 4: (b"", 0xA1, 0xA3)}[width]
        for opcode, address in ((load, source), (save, target)):
            self._add(prefix + bytes([opcode]) + struct.pack("<I", address))
        return self

    def out(self, port: int, value: int, width: int = 4) -> Program:
        """Writes a value to a port."""
        self._add(b"\xba" + struct.pack("<I", port) + b"\xb8" + struct.pack("<I", value))
        return self._add({1: b"\xee", 2: b"\x66\xef", 4: b"\xef"}[width])

    def into(self, port: int, target: int, width: int = 4) -> Program:
        """Reads from a port into memory."""
        self._add(b"\xba" + struct.pack("<I", port) + {1: b"\xec", 2: b"\x66\xed", 4: b"\xed"}[width])
        save = {1: b"\xa2", 2: b"\x66\xa3", 4: b"\xa3"}[width]
        return self._add(save + struct.pack("<I", target))

    def wait_for_interrupt(self) -> Program:
        """Halts with interrupts on; one that waits already comes behind the HLT."""
        self._add(b"\xfb\xf4\xeb\xfd")
        self.handler = b""
        return self.store(LOCAL_APIC + 0xB0, 0)

    def report(self) -> Program:
        """Tells the test, and stops."""
        return self.out(REPORT_PORT, 1, 1)._add(b"\xf4\xeb\xfd")

    def _add(self, code: bytes) -> Program:
        if self.handler is None:
            self.code += code
        else:
            self.handler += code
        return self


def enable_interrupts() -> Program:
    """The local APIC takes what is sent to it."""
    return Program().store(LOCAL_APIC + 0xF0, 0x1FF)


def route_pin(program: Program, pin: int, level: bool = False) -> Program:
    """A pin of the IOAPIC is this program's interrupt, by its edge or by its level; the PICs say nothing."""
    for mask in (0x21, 0xA1):
        program.out(mask, 0xFF, 1)
    for register, value in ((0x10 + 2 * pin + 1, 0), (0x10 + 2 * pin, VECTOR | (1 << 15 if level else 0))):
        program.store(IOAPIC, register).store(IOAPIC + 0x10, value)
    return program


def load(vm: Vm, ram: Ram, program: Program) -> None:
    """Puts a program where the first vCPU begins."""
    assert len(program.code) <= HANDLER - CODE
    ram.memory.write(CODE, program.code)
    ram.memory.write(HANDLER, program.handler or b"\xf4\xeb\xfd")
    ram.memory.write(GDT, GDT_ENTRIES)
    gate = struct.pack("<HHBBH", HANDLER & 0xFFFF, 8, 0, 0x8E, HANDLER >> 16)
    ram.memory.write(IDT + 8 * VECTOR, gate)
    segments: dict[str, object] = {name: DATA_32 for name in ("ds", "es", "ss", "fs", "gs")}
    vm.set_registers(
        0,
        segments
        | {
            "cs": CODE_32,
            "cr0": 0x11,
            "rip": CODE,
            "rsp": STACK,
            "rflags": 2,
            "gdt": (GDT, len(GDT_ENTRIES) - 1),
            "idt": (IDT, 8 * VECTOR + 7),
        },
    )
