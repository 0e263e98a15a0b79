"""What a kernel is told about the machine that it wakes up in."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Platform:
    """The parts of a machine that tables describe. Addresses and GSIs are those of `viaduct.vmm.memory_map`.

    The local APIC of vCPU n has the id n.
    """

    vcpus: int = 1
    virtio_mmio: tuple[int, ...] = ()
    """The virtio-mmio slots in which there is a device."""
    pci: bool = True
    serial: bool = True
    rtc: bool = True
    i8042: bool = False
    """A keyboard controller that a driver is to find. Ours has none: its port only resets machines."""
    pvpanic: bool = True
    acpi: bool = True
    """Without ACPI tables a kernel finds vCPUs and interrupts by the MP tables, which are always there."""
