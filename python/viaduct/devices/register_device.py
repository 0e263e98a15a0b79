"""What a device of registers is, for whoever writes one: two methods, and a few more if it needs them.

    class Dice:
        def read(self, offset: int, size: int) -> bytes | int:
            return random.randint(1, 6)

        def write(self, offset: int, data: bytes) -> None: ...

`read` and `write` are called on threads of vCPUs, in the middle of the guest's instruction: they answer at once, and
where a machine has several vCPUs, locks are their own affair. What they raise is logged, and the guest reads ones.

Besides, a class may have any of these:

| | |
|---|---|
| `pio = (0x700, 8)` or `mmio = (0xF000_0000, 0x1000)` | where it is, unless the machine's configuration says so |
| `irq = 7` | its interrupt line, likewise |
| `plugged(place)` | called before the guest runs: `place` has the guest's memory, and drives the line |
| `save()`, `restore(data)` | for snapshots: plain data (dict, list, str, int, ...). Without them, there are none |
| `close()` | the machine was switched off; after a reset there is a new object |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from viaduct._core import GuestMemory


class RegisterDevice(Protocol):
    """The two methods that there must be."""

    def read(self, offset: int, size: int, /) -> bytes | int:
        """What `size` (1, 2, 4 or 8) bytes at `offset` from the range's first address are; an int is little-endian."""

    def write(self, offset: int, data: bytes, /) -> None:
        """The guest has written `data` at `offset`."""


class Place:
    """Where a device of registers is, and what it has there. `irq` is its interrupt line, if it has one."""

    def __init__(self, memory: GuestMemory, irq: int | None, set_line: Callable[[int, bool], None]) -> None:
        self.memory = memory
        """The guest's; what is in it may change at any time: read once, check, use."""
        self.irq = irq
        self._set_line = set_line

    def set_irq(self, level: bool) -> None:
        """Drives the interrupt line; any thread may. Lines below 16 interrupt when they rise, as on an ISA bus.

        Raises ValueError for a device without a line.
        """
        if self.irq is None:
            raise ValueError("this device has no interrupt line: give it one, with irq=N")
        self._set_line(self.irq, level)
