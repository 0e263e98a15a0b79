"""Devices of the user's own in a machine: each is made of its class, and one of registers is put into its place.

A place that is taken is refused, by whoever has it: not only other devices on our buses, but also memory, the windows
from which PCI functions get their addresses, and what the engine answers by itself, where no device would be asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import msgspec

from viaduct.devices.register_device import Place, RegisterDevice
from viaduct.devices.user_class import DeviceClassError, load_device
from viaduct.switch.config_error import ConfigError
from viaduct.vhost_user.device import Device
from viaduct.vmm import memory_map as at
from viaduct.vmm.config import DeviceConfig, MachineConfig, parse_range
from viaduct.vmm.errors import MachineError

if TYPE_CHECKING:
    from viaduct._core import GuestMemory, Vm

log = logging.getLogger("viaduct.vmm")

UserDevices = list[tuple[str, DeviceConfig, Device | RegisterDevice]]
Named = tuple[str, int, int]
"""Whose, first address, size."""
_ENGINE_PORTS: tuple[Named, ...] = (
    ("the interrupt controller", 0x20, 2),
    ("the interval timer", 0x40, 4),
    ("the interval timer's gate", 0x61, 1),
    ("the interrupt controller", 0xA0, 2),
    ("the interrupt controller", 0x4D0, 2),
)


def make_devices(config: MachineConfig, stack: AsyncExitStack) -> UserDevices:
    """Name, configuration and new object of each; `stack` closes them, those that never got a place as well.

    Raises `MachineError`.
    """
    devices: UserDevices = []
    for index, part in enumerate(config.devices):
        try:
            device = load_device(part.name, part.options)
        except DeviceClassError as error:
            raise MachineError(f"--device {part.name}: {error}") from error
        stack.callback(_close, part.name, device)
        if isinstance(device, Device) and (part.pio or part.mmio or part.irq is not None):
            raise MachineError(
                f"--device {part.name} is a virtio device: its driver finds it by itself, without pio, mmio and irq"
            )
        devices.append((f"{part.class_name.lower()}{index}", part, device))
    return devices


def _close(name: str, device: Device | RegisterDevice) -> None:
    """The machine has ended, or was never one."""
    try:
        if (close := getattr(device, "close", None)) is not None:
            close()
    except (Exception, SystemExit):
        log.exception("--device %s did not close", name)


class RegisterSlot:
    """The device of registers `name` in its place, from here on. `lines` has who drives each interrupt line already,
    and then this one too. Raises `MachineError`."""

    def __init__(
        self,
        name: str,
        part: DeviceConfig,
        device: RegisterDevice,
        config: MachineConfig,
        vm: Vm,
        memory: GuestMemory,
        lines: dict[int, str],
    ) -> None:
        self.name = name
        self._who = f"--device {part.name}"
        self._device = device
        kind, base, size = self._range(part)
        irq = part.irq if part.irq is not None else getattr(device, "irq", None)
        if irq is not None:
            self._take_line(irq, config, lines)
        for other, other_base, other_size in _taken(kind, config):
            if base < other_base + other_size and other_base < base + size:
                raise MachineError(
                    f"{self._who}: {kind}={base:#x}+{size:#x} is taken: {other} is at {other_base:#x} to "
                    f"{other_base + other_size - 1:#x}; free are for example {_FREE[kind]} (docs/devices.md)"
                )
        try:
            (vm.add_pio if kind == "pio" else vm.add_mmio)(base, size, device, name)
        except (ValueError, TypeError, OverflowError) as error:
            raise MachineError(
                f"{self._who}: {kind}={base:#x}+{size:#x}: {error}; free are for example {_FREE[kind]} "
                "(docs/devices.md)"
            ) from error
        self._call("plugged", Place(memory, irq, vm.set_line))
        self.place = f"{'ports' if kind == 'pio' else 'addresses'} {base:#x} to {base + size - 1:#x}"
        if irq is not None:
            self.place += f", interrupt {irq}"

    def save(self) -> Any:
        """What the device has to remember. Raises `MachineError`."""
        if not (hasattr(self._device, "save") and hasattr(self._device, "restore")):
            raise MachineError(
                f"{self._who} has no save() and restore(data), so a machine with it cannot be kept (docs/devices.md)"
            )
        data = self._call("save")
        try:
            kept = msgspec.json.decode(msgspec.json.encode(data))
        except (TypeError, ValueError, RecursionError) as error:
            raise MachineError(f"{self._who}: its save() returned what is no plain data: {error}") from error
        if kept != data:
            raise MachineError(
                f"{self._who}: its save() returned what a snapshot gives back as something else (bytes, tuples, "
                "keys that are no str): have it return dict with str keys, list, str, int, float, bool and None"
            )
        return data

    def restore(self, data: Any) -> None:
        """Goes on with that. Raises `MachineError`."""
        self._call("restore", data)

    def _call(self, method: str, *arguments: Any) -> Any:
        """A method that the device need not have."""
        if (called := getattr(self._device, method, None)) is None:
            return None
        try:
            return called(*arguments)
        except (Exception, SystemExit) as error:
            raise MachineError(f"{self._who}: its {method} failed: {type(error).__name__}: {error}") from error

    def _range(self, part: DeviceConfig) -> tuple[str, int, int]:
        """Which bus, first address, size."""
        found: dict[str, Any] = {kind: getattr(part, kind) for kind in ("pio", "mmio")}
        if not any(found.values()):
            found = {kind: getattr(self._device, kind, None) for kind in found}
        found = {kind: place for kind, place in found.items() if place is not None}
        if len(found) != 1:
            count = "in two places" if found else "nowhere yet"
            raise MachineError(
                f"{self._who} is {count}: say pio=BASE+SIZE or mmio=BASE+SIZE, or have the class say pio = (BASE, SIZE)"
            )
        [(kind, place)] = found.items()
        try:
            base, size = parse_range(place) if isinstance(place, str) else place
            if not (isinstance(base, int) and isinstance(size, int) and base >= 0 and size > 0):
                raise ValueError
        except (ConfigError, TypeError, ValueError):
            raise MachineError(
                f"{self._who}: {kind} = {place!r} of its class is no range: (first, size), as in (0x700, 8)"
                if not isinstance(place, str)
                else f"{self._who}: {kind}={place} is no range: it has to have a size, as in 0x700+8"
            ) from None
        return kind, base, size

    def _take_line(self, irq: Any, config: MachineConfig, lines: dict[int, str]) -> None:
        has = _machine_lines(config) | lines
        if not isinstance(irq, int) or irq not in range(at.IOAPIC_PINS) or irq in has:
            free = ", ".join(str(line) for line in range(at.IOAPIC_PINS) if line not in has)
            whose = f"is that of {has[irq]}" if irq in has else f"there is none: 0 to {at.IOAPIC_PINS - 1}"
            raise MachineError(f"{self._who}: irq={irq} {whose} (free: {free})")
        lines[irq] = self.name


_FREE = {"pio": "0x700 to 0xbff", "mmio": "0xf0000000 to 0xfeafffff"}


def _taken(kind: str, config: MachineConfig) -> Iterator[Named]:
    """What is there besides the devices on our buses."""
    if kind == "pio":
        yield from _ENGINE_PORTS
        if config.transport == "pci":
            yield "the PCI bus's window", at.PCI_PORTS, at.PCI_PORTS_SIZE
        return
    for start, size in at.ram_regions(config.memory):
        yield "memory", start, size
    if config.transport == "pci":
        yield "the PCI bus's window", at.PCI_WINDOW_32, at.PCI_WINDOW_32_SIZE
        yield "the PCI bus's window", at.pci_window_64(config.memory), at.PCI_WINDOW_64_SIZE
    else:
        yield "virtio-mmio", at.VIRTIO_MMIO, at.VIRTIO_MMIO_SLOTS * at.VIRTIO_MMIO_STRIDE
    yield "the interrupt controller", at.IOAPIC, at.PAGE
    yield "the interrupt controller", at.LOCAL_APIC, at.MIB
    yield "the engine", at.KVM_IDENTITY_MAP, 5 * at.PAGE


def _machine_lines(config: MachineConfig) -> dict[int, str]:
    """Who drives the interrupt lines that are not free."""
    lines = {0: "the interval timer", 2: "the interrupt controller", 13: "the processor"}
    lines |= {at.I8042_GSI: "the keyboard controller", at.SERIAL_GSI: "the serial port", at.RTC_GSI: "the clock"}
    lines[at.POWER_BUTTON_GSI] = "the power button"
    if config.transport == "pci":
        return lines | dict.fromkeys(at.PCI_INTX_GSIS, "the PCI bus")
    return lines | {at.VIRTIO_MMIO_GSI + slot: "virtio-mmio" for slot in range(at.VIRTIO_MMIO_SLOTS)}
