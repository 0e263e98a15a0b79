"""The memory map that a kernel is given, in the terms of the BIOS call E820 (ACPI 6.5, 15)."""

from __future__ import annotations

from typing import NamedTuple

from viaduct.vmm.boot.platform import Platform
from viaduct.vmm.memory_map import CONVENTIONAL_END, EXTENDED_START, PCI_ECAM, PCI_ECAM_SIZE

USABLE, RESERVED = 1, 2


class Entry(NamedTuple):
    """A range of addresses and what it may be used for."""

    start: int
    size: int
    type: int


def memory_map(ranges: list[tuple[int, int]], platform: Platform) -> list[Entry]:
    """What a kernel may use of RAM at `ranges` (start and end of each), by address.

    The configuration space of PCI is reserved: Linux uses it only then.
    """
    entries = []
    for start, end in ranges:
        for low, high, kind in (
            (0, CONVENTIONAL_END, USABLE),
            (CONVENTIONAL_END, EXTENDED_START, RESERVED),
            (EXTENDED_START, end, USABLE),
        ):
            low, high = max(low, start), min(high, end)
            if low < high:
                entries.append(Entry(low, high - low, kind))
    if platform.pci:
        entries.append(Entry(PCI_ECAM, PCI_ECAM_SIZE, RESERVED))
    return sorted(entries)
