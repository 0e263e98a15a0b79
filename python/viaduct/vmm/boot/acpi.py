"""The ACPI tables (ACPI 6.5, 5.2): RSDP, XSDT, FADT, MADT, MCFG and DSDT, one behind the other.

The platform is hardware-reduced (4.1): no fixed hardware, no PM timer, no SCI; what a guest needs to power off and
reset are the sleep control and the reset register. Kernels need no driver and no calibration for the rest then.
"""

from __future__ import annotations

import struct

from viaduct.vmm.boot.checksum import with_checksum
from viaduct.vmm.boot.dsdt import dsdt
from viaduct.vmm.boot.platform import Platform
from viaduct.vmm.memory_map import (
    IOAPIC,
    LOCAL_APIC,
    PCI_BUSES,
    PCI_ECAM,
    RESET_PORT,
    RESET_VALUE,
    SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT,
    TIMER_IRQ,
    TIMER_PIN,
)

RSDP_SIZE = 36
HEADER_SIZE = 36
ALIGNMENT = 16
WBINVD, PROC_C1, PWR_BUTTON, SLP_BUTTON, RESET_REG_SUP, HW_REDUCED = (1 << bit for bit in (0, 2, 4, 5, 10, 20))
HAS_8042, NO_VGA, NO_CMOS_RTC = (1 << bit for bit in (1, 2, 5))
MADT_LOCAL_APIC, MADT_IOAPIC, MADT_OVERRIDE, MADT_LOCAL_NMI, MADT_X2APIC, MADT_X2APIC_NMI = 0, 1, 2, 4, 9, 10
XAPIC_ID_MAX = 254


def acpi_tables(platform: Platform, address: int, ram_size: int) -> bytes:
    """All tables as they belong at `address`, a multiple of 16, the RSDP first."""
    place = address + -(-RSDP_SIZE // ALIGNMENT) * ALIGNMENT
    placed: list[bytes] = []

    def add(table: bytes) -> int:
        nonlocal place
        start = place
        padded = table.ljust(-(-len(table) // ALIGNMENT) * ALIGNMENT, b"\0")
        placed.append(padded)
        place += len(padded)
        return start

    devices = add(_table(b"DSDT", 2, dsdt(platform, ram_size)))
    tables = [add(_fadt(platform, devices)), add(_madt(platform))]
    if platform.pci:
        tables.append(add(_mcfg()))
    xsdt = add(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    rsdp = struct.pack("<8sB6sBIIQB3x", b"RSD PTR ", 0, b"VIADCT", 2, 0, RSDP_SIZE, xsdt, 0)
    rsdp = with_checksum(rsdp[:20], 8) + rsdp[20:]
    return with_checksum(rsdp, 32).ljust(-(-RSDP_SIZE // ALIGNMENT) * ALIGNMENT, b"\0") + b"".join(placed)


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """A table with its header (5.2.6)."""
    header = struct.pack(
        "<4sIBB6s8sI4sI", signature, HEADER_SIZE + len(body), revision, 0, b"VIADCT", b"VIADUCT ", 1, b"VIAD", 1
    )
    return with_checksum(header + body, 9)


def _port(number: int) -> bytes:
    """A register of 8 bits at a port: Generic Address Structure (5.2.3.2)."""
    system_io, byte_access = 1, 1
    return struct.pack("<4BQ", system_io, 8, 0, byte_access, number)


def _fadt(platform: Platform, devices: int) -> bytes:
    """The fixed ACPI description table (5.2.9); `devices` is where the DSDT is."""
    table = bytearray(276 - HEADER_SIZE)
    no_devices = (0 if platform.rtc else NO_CMOS_RTC) | (HAS_8042 if platform.i8042 else 0) | NO_VGA
    for offset, content in (
        (109, struct.pack("<H", no_devices)),
        (112, struct.pack("<I", WBINVD | PROC_C1 | PWR_BUTTON | SLP_BUTTON | RESET_REG_SUP | HW_REDUCED)),
        (116, _port(RESET_PORT)),
        (128, bytes([RESET_VALUE])),
        (131, bytes([5])),  # minor version: this is ACPI 6.5
        (140, struct.pack("<Q", devices)),
        (244, _port(SLEEP_CONTROL_PORT)),
        (256, _port(SLEEP_STATUS_PORT)),
        (268, b"VIADUCT\0"),  # hypervisor vendor identity
    ):
        table[offset - HEADER_SIZE : offset - HEADER_SIZE + len(content)] = content
    return _table(b"FACP", 6, bytes(table))


def _madt(platform: Platform) -> bytes:
    """The multiple APIC description table (5.2.12). ISA interrupts have their own numbers, but for the interval timer's
    (5.2.12.5)."""
    enabled = 1 << 0
    entries = []
    for vcpu in range(platform.vcpus):
        if vcpu <= XAPIC_ID_MAX:
            entries.append(struct.pack("<4BI", MADT_LOCAL_APIC, 8, vcpu, vcpu, enabled))
        else:
            entries.append(struct.pack("<2B2x3I", MADT_X2APIC, 16, vcpu, enabled, vcpu))
    entries.append(struct.pack("<4B2I", MADT_IOAPIC, 12, 0, 0, IOAPIC, 0))
    entries.append(struct.pack("<4BIH", MADT_OVERRIDE, 10, 0, TIMER_IRQ, TIMER_PIN, 0))
    entries.append(struct.pack("<3BHB", MADT_LOCAL_NMI, 6, 0xFF, 0, 1))
    if platform.vcpus > XAPIC_ID_MAX + 1:
        entries.append(struct.pack("<2BHIB3x", MADT_X2APIC_NMI, 12, 0, 0xFFFF_FFFF, 1))
    return _table(b"APIC", 5, struct.pack("<2I", LOCAL_APIC, 0) + b"".join(entries))


def _mcfg() -> bytes:
    """Where the configuration space of PCI is (PCI Firmware Specification 3.3, 4.1.2)."""
    return _table(b"MCFG", 1, struct.pack("<8xQH2B4x", PCI_ECAM, 0, 0, PCI_BUSES - 1))
