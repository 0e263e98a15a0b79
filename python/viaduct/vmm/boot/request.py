"""What a machine is to be started with, as every way of booting takes it."""

from __future__ import annotations

from dataclasses import dataclass

from viaduct.vmm.boot import low_memory
from viaduct.vmm.boot.errors import BootError
from viaduct.vmm.boot.image import Image
from viaduct.vmm.boot.placement import Placement
from viaduct.vmm.boot.platform import Platform

LINUX_COMMAND_LINE_MAX = 2047
"""What Linux on x86 takes where no header says it: COMMAND_LINE_SIZE without the zero at its end."""


@dataclass(frozen=True, slots=True)
class BootRequest:
    """A kernel, what it is given, and the machine."""

    ram: Placement
    kernel: Image
    initrd: Image | None
    command_line: str
    platform: Platform
    rsdp: int
    """Where the RSDP of the ACPI tables is; 0 without them."""

    def place_command_line(self, limit: int) -> int:
        """Put the command line into RAM and return its address. Raises BootError above `limit` bytes."""
        line = self.command_line.encode("utf-8", "surrogateescape")
        limit = min(limit, low_memory.COMMAND_LINE_AREA - 1)
        if len(line) > limit:
            raise BootError(
                "--append",
                f"the command line has {len(line)} bytes, and {self.kernel.name} takes {limit}",
                "make it shorter, or put settings into the initrd",
            )
        if b"\0" in line:
            raise BootError("--append", "the command line has a zero byte inside", "remove it: there it would end")
        self.ram.place(low_memory.COMMAND_LINE, line + b"\0", "the command line")
        return low_memory.COMMAND_LINE

    def place_initrd(self, *, above: int, below: int) -> tuple[int, int]:
        """Put the initrd into RAM, as high as it may lie, and return address and size; twice 0 if there is none.

        Raises BootError where it does not fit.
        """
        if self.initrd is None:
            return 0, 0
        size = self.initrd.size
        below = min(below, self.ram.ranges[0][1])
        address = self.ram.highest(size, above=above, below=below)
        if address is None:
            raise self.initrd.error(
                f"has {size} bytes, and between the kernel's end at {above:#x} and {below:#x} there is no room for it",
                "give the machine more memory (--memory), or make the initrd smaller",
            )
        self.ram.claim(address, size, "the initrd", self.initrd.name)
        self.ram.copy(self.initrd, 0, size, address, "the initrd")
        return address, size
