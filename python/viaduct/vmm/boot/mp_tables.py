"""Vcpus and interrupts for kernels without ACPI (Intel MultiProcessor Specification 1.4, chapter 4).

A floating pointer structure, which kernels search for from 0xF0000 on, and behind it the configuration table: a
processor for each vCPU, an ISA bus and a PCI bus, the IOAPIC, and where each interrupt of the buses goes.
"""

from __future__ import annotations

import struct

from viaduct.vmm.boot.checksum import with_checksum
from viaduct.vmm.boot.platform import Platform
from viaduct.vmm.memory_map import IOAPIC, LOCAL_APIC, PCI_INTX_GSIS, TIMER_IRQ, TIMER_PIN, pci_intx_gsi

POINTER_SIZE = 16
PROCESSOR, BUS, IO_APIC, IO_INTERRUPT, LOCAL_INTERRUPT = range(5)
ENABLED, BOOT_PROCESSOR = 1 << 0, 1 << 1
APIC_VERSION, IOAPIC_VERSION = 0x14, 0x11
CPU_SIGNATURE, CPU_FEATURES = 0x600, 0x201
"""A processor of the sixth family with FPU and APIC: kernels read these from CPUID instead (table 4-5)."""
INT, NMI, EXTINT = 0, 1, 3
LEVEL_LOW = 0xF
"""Level-triggered and active low, as PCI has it (table 4-10)."""
PCI_DEVICES, PCI_PINS = 32, 4
APIC_ID_MAX = 254
"""The table has 8 bits for an id; 255 is everybody."""


def mp_tables(platform: Platform, address: int) -> bytes:
    """The tables as they belong at `address`, which is a multiple of 16."""
    pci, isa = (0, 1) if platform.pci else (None, 0)
    vcpus = min(platform.vcpus, APIC_ID_MAX)
    ioapic_id = vcpus
    entries = [
        struct.pack(
            "<4B2I8x",
            PROCESSOR,
            vcpu,
            APIC_VERSION,
            ENABLED | (BOOT_PROCESSOR if vcpu == 0 else 0),
            CPU_SIGNATURE,
            CPU_FEATURES,
        )
        for vcpu in range(vcpus)
    ]
    if pci is not None:
        entries.append(struct.pack("<2B6s", BUS, pci, b"PCI   "))
    entries.append(struct.pack("<2B6s", BUS, isa, b"ISA   "))
    entries.append(struct.pack("<4BI", IO_APIC, ioapic_id, IOAPIC_VERSION, ENABLED, IOAPIC))

    def interrupt(entry: int, kind: int, flags: int, bus: int, source: int, apic: int, pin: int) -> None:
        entries.append(struct.pack("<2BH4B", entry, kind, flags, bus, source, apic, pin))

    taken_by_pci = PCI_INTX_GSIS if pci is not None else ()
    for irq in range(16):
        # Interrupt 2 is what the second PIC has the first one for, and no device's.
        if irq not in taken_by_pci and irq != TIMER_PIN:
            interrupt(IO_INTERRUPT, INT, 0, isa, irq, ioapic_id, TIMER_PIN if irq == TIMER_IRQ else irq)
    if pci is not None:
        for device in range(PCI_DEVICES):
            for pin in range(PCI_PINS):
                interrupt(IO_INTERRUPT, INT, LEVEL_LOW, pci, device << 2 | pin, ioapic_id, pci_intx_gsi(device, pin))
    interrupt(LOCAL_INTERRUPT, EXTINT, 0, isa, 0, 0, 0)
    interrupt(LOCAL_INTERRUPT, NMI, 0, isa, 0, 0xFF, 1)
    body = b"".join(entries)
    table = struct.pack(
        "<4sHBB8s12sIHHIHBx",
        b"PCMP",
        44 + len(body),
        4,  # version 1.4
        0,
        b"VIADUCT ",
        b"VIADUCT     ",
        0,
        0,
        len(entries),
        LOCAL_APIC,
        0,
        0,
    )
    pointer = struct.pack("<4sI8B", b"_MP_", address + POINTER_SIZE, 1, 4, 0, 0, 0, 0, 0, 0)
    return with_checksum(pointer, 10) + with_checksum(table + body, 7)
