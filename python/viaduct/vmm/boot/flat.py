"""Flat binaries: the file as it is, at one address, entered there in real mode, as a BIOS enters a boot sector.

Nothing else is in RAM: no tables, no command line.
"""

from __future__ import annotations

from viaduct.vmm.boot.cpu_state import CpuState
from viaduct.vmm.boot.entry_modes import real_mode
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.placement import Placement
from viaduct.vmm.memory_map import EXTENDED_START

BOOT_SECTOR = 0x7C00
"""Where a BIOS puts the first sector of a disk."""


def load_flat(ram: Placement, image: Image, address: int) -> CpuState:
    """Put the file at an address of the first MiB. Raises BootError where it does not fit."""
    if not 0 <= address < EXTENDED_START or (address >= 0x1_0000 and address % 16):
        raise BootError(
            f"--boot flat:{address:#x}",
            "the address cannot be reached in real mode",
            "take one below 0x100000, and a multiple of 16 above 0x10000",
        )
    ram.claim(address, image.size, "the flat binary", image.name)
    ram.copy(image, 0, image.size, address, "the flat binary")
    return real_mode(address)
