"""The devices that every PC has, in their places: what a kernel expects without looking.

They are made in Rust, so that their exits never take the interpreter lock; what a guest wants of its machine - a reset,
power off, that somebody knows of its panic - comes here on a vCPU's thread, and goes on to the machine.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from viaduct._core import I8042, DebugExit, Pvpanic, ResetControl, Rtc, Serial, SleepControl, Vm
from viaduct.vmm import memory_map as at

if TYPE_CHECKING:
    from viaduct.devices.console_terminal import ConsoleTerminal

_MEANINGS = {
    "reset": ("reset", "the guest reset its machine"),
    "power-off": ("shutdown", "the guest switched its machine off"),
    "panicked": ("panic", "the guest's kernel has panicked"),
    "crash-loaded": ("panic", "the guest's kernel has panicked, and its crash kernel runs"),
    "exit": ("exit", "the guest wrote to the debug-exit port"),
}
SERIAL_ROOM = 1 << 16
"""Bytes that may wait in the serial port for the guest to read them."""


class Pc:
    """All of them in `vm`. `report` is told, from any thread, of an event: kind, text and exit code."""

    def __init__(self, vm: Vm, memory: int, report: Callable[[str, str, int], None]) -> None:
        # No method of this object: devices in Rust keep what they call, and no garbage collector looks there.
        request = functools.partial(_request, report)
        self.serial = Serial(vm, at.SERIAL_GSI)
        self.rtc = Rtc()
        self.rtc.set_memory(*_below_and_above(memory))
        self.i8042 = I8042(request)
        self.reset_control = ResetControl(request)
        """Lies inside the PCI configuration ports, if there are any."""
        self.sleep_control = SleepControl(request)
        vm.add_pio(at.SERIAL_PORT, 8, self.serial)
        vm.add_pio(at.RTC_PORT, 2, self.rtc)
        vm.add_pio(at.I8042_DATA, 5, self.i8042)
        vm.add_pio(at.SLEEP_CONTROL_PORT, 2, self.sleep_control)
        vm.add_pio(at.PVPANIC_PORT, 1, Pvpanic(request))
        vm.add_pio(at.DEBUG_EXIT_PORT, 4, DebugExit(request))

    @property
    def stateful(self) -> dict[str, Serial | Rtc | I8042 | ResetControl | SleepControl]:
        """Those that a snapshot keeps."""
        return {
            "serial": self.serial,
            "rtc": self.rtc,
            "i8042": self.i8042,
            "reset-control": self.reset_control,
            "sleep-control": self.sleep_control,
        }


def _request(report: Callable[[str, str, int], None], device: str, request: str, value: int) -> None:
    """What a guest wants, on a vCPU's thread."""
    kind, text = _MEANINGS[request]
    report(kind, f"{text} ({device})" if request != "exit" else f"{text}: {value}", value & 0xFF)


class SerialConsole:
    """Joins a serial port to a terminal, on the loop that runs."""

    def __init__(self, serial: Serial, terminal: ConsoleTerminal) -> None:
        self._serial = serial
        self._terminal = terminal
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(serial.event_fd, self._written)
        terminal.on_input = self._typed
        self._typed()

    def _written(self) -> None:
        self._show()
        self._typed()

    def _show(self) -> None:
        data, lost = self._serial.take_output()
        if lost:
            self._terminal.output(b"\r\n[%d bytes of output were lost]\r\n" % lost)
        self._terminal.output(data)

    def _typed(self) -> None:
        room = SERIAL_ROOM - self._serial.unread
        if room > 0 and (data := self._terminal.take_input(room)):
            self._serial.input(data)
        if self._terminal.input_waiting:
            self._serial.await_room()  # ... and `_written` comes here again.

    def close(self) -> None:
        """Takes what is left of the output, and lets go of both."""
        self._loop.remove_reader(self._serial.event_fd)
        self._show()
        self._terminal.on_input = lambda: None


def _below_and_above(memory: int) -> tuple[int, int]:
    """Bytes of RAM below and above 4 GiB."""
    sizes = dict(at.ram_regions(memory))
    return sizes[0], sizes.get(at.RAM_HIGH_START, 0)
