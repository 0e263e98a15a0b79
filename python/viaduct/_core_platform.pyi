"""The part of `viaduct._core` that is the devices of a PC. It is no module of its own: import from `viaduct._core`."""

from collections.abc import Callable
from typing import Literal, final

from viaduct._core_vmm import BusDevice, Vm

Request = Literal["reset", "power-off", "panicked", "crash-loaded", "exit"]
OnRequest = Callable[[str, Request, int], object]
"""Called on a thread of a vCPU with the device's name, what the guest wants, and for "exit" the value written. The
vCPU goes on when it returns."""

@final
class Serial(BusDevice):
    """A 16550A: eight ports, and the interrupt pin `gsi`. Of output that nobody takes, the last `output_limit` bytes
    are kept. Raises ValueError for a pin that does not exist."""

    def __new__(cls, vm: Vm, gsi: int, *, output_limit: int = ...) -> Serial: ...
    @property
    def event_fd(self) -> int:
        """An eventfd that is readable while there is output to take, and when `await_room` was answered; it stays the
        device's."""
    def take_output(self) -> tuple[bytes, int]:
        """What the guest has written, and how many bytes before that were lost since the last call."""
    def input(self, data: bytes) -> int:
        """Gives the guest bytes to read; returns how many there was room for."""
    def await_room(self) -> None:
        """Makes `event_fd` readable once when the guest has read so much that there is room for 32 KiB, or now."""
    @property
    def unread(self) -> int:
        """Bytes that the guest has not read yet, at most 65552."""
    def reset(self) -> None:
        """As after power on. Input that is not in the FIFO yet stays."""
    def save(self) -> bytes:
        """The state of the device, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state. Raises ValueError for one that cannot be."""

@final
class Rtc(BusDevice):
    """An MC146818 with 128 bytes, at two ports. It shows the host's time in UTC, until the guest sets it."""

    def __new__(cls) -> Rtc: ...
    def set_memory(self, below: int, above: int) -> None:
        """Leaves the bytes of memory below and above 4 GiB where the firmware of a PC does."""
    def save(self) -> bytes:
        """The state of the device, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state; time has passed meanwhile. Raises ValueError for one that cannot be."""

@final
class I8042(BusDevice):
    """A keyboard controller without a keyboard, at five ports: it can reset the machine."""

    def __new__(cls, on_request: OnRequest) -> I8042: ...
    def reset(self) -> None:
        """As after power on."""
    def save(self) -> bytes:
        """The state of the device, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state. Raises ValueError for one that cannot be."""

@final
class ResetControl(BusDevice):
    """The reset control register, one port: inside those of PCI configuration space, if there are any."""

    def __new__(cls, on_request: OnRequest) -> ResetControl: ...
    def reset(self) -> None:
        """As after power on."""
    def save(self) -> bytes:
        """The state of the device, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state. Raises ValueError for one that cannot be."""

@final
class SleepControl(BusDevice):
    """Sleep control and sleep status of hardware-reduced ACPI (ACPI 6.4, 4.8.3.7), two ports: SLP_TYP 5 is off."""

    def __new__(cls, on_request: OnRequest) -> SleepControl: ...
    def reset(self) -> None:
        """As after power on."""
    def save(self) -> bytes:
        """The state of the device, for `restore`."""
    def restore(self, state: bytes) -> None:
        """Goes on from a saved state. Raises ValueError for one that cannot be."""

@final
class Pvpanic(BusDevice):
    """A port by which a kernel says that it has panicked (QEMU, docs/specs/pvpanic)."""

    def __new__(cls, on_request: OnRequest) -> Pvpanic: ...

@final
class DebugExit(BusDevice):
    """Ports by which a small kernel ends the machine with a value, as QEMU's isa-debug-exit."""

    def __new__(cls, on_request: OnRequest) -> DebugExit: ...
