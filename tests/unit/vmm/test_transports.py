"""An entropy device in a machine of this host's KVM, reached by each transport as its driver reaches it: found, set up,
rung, and interrupting when it has filled the buffer."""

from __future__ import annotations

import asyncio
import json
import struct
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from viaduct._core import PciRoot, VirtioMmio, VirtioPci, Vm
from viaduct.devices.entropy import Entropy
from viaduct.vmm import memory_map as at
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.ram import Ram
from viaduct.vmm.virtio_slot import VirtioSlot
from vmm.flat import PATIENCE, Registers
from vmm.register_program import (
    REPORT_PORT,
    VECTOR,
    Program,
    enable_interrupts,
    load,
    route_pin,
)

DESCRIPTOR, AVAILABLE, USED, BUFFER, SEEN = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000
LENGTH = 64
VERSION_1 = 1 << 32
MEMORY_BAR, MSIX_BAR = 0xC100_0000, 0xC200_0000
PORTS = 0xC000


class Guest:
    """A machine with an entropy device behind `slot`, and no transport yet."""

    def __init__(self) -> None:
        self.ram = Ram(1 << 20)
        self.done = Registers()
        self.reports: list[tuple[str, str]] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        on_event = lambda *event: self.events.append(event)  # noqa: E731
        self.vm = Vm("kvm", self.ram.memory, 1, interrupts="kernel", on_event=on_event)
        self.vm.add_pio(REPORT_PORT, 1, self.done)
        self.back_end = InProcessBackEnd(Entropy())
        report = lambda kind, text: self.reports.append((kind, text))  # noqa: E731
        self.slot = VirtioSlot("rng", self.back_end, asyncio.get_running_loop(), report)
        self.pci: PciRoot | None = None

    def mmio(self) -> tuple[int, int]:
        """Gives the device its registers; their address, and the interrupt."""
        address, gsi = at.virtio_mmio_slot(3)
        device = VirtioMmio(self.vm, self.slot, address=address, gsi=gsi, **self._what())
        self.vm.add_mmio(address, VirtioMmio.SIZE, device)
        self.slot.transport = device
        return address, gsi

    def function(self, *, transitional: bool = False) -> int:
        """Puts the device on a PCI bus; the address of its configuration space."""
        self.pci = PciRoot(
            self.vm,
            ports=(at.PCI_PORTS, at.PCI_PORTS_SIZE),
            memory32=(at.PCI_WINDOW_32, at.PCI_WINDOW_32_SIZE),
            memory64=(at.pci_window_64(self.ram.size), at.PCI_WINDOW_64_SIZE),
            gsis=at.PCI_INTX_GSIS,
        )
        self.vm.add_mmio(at.PCI_ECAM, at.PCI_ECAM_SIZE, self.pci.ecam())
        self.vm.add_pio(at.PCI_CONFIG_PORT, 8, self.pci.config_ports())
        device = VirtioPci(self.vm, self.slot, transitional=transitional, **self._what())
        self.slot.transport = device
        return at.PCI_ECAM + (self.pci.add(device) << 15)

    def _what(self) -> dict[str, Any]:
        back_end = self.back_end
        return {
            "name": "virtio-rng",
            "device_id": back_end.device_id,
            "features": back_end.features,
            "queue_sizes": back_end.queue_sizes,
        }

    def offer_buffer(self, program: Program) -> Program:
        """One buffer for the device in the ring at `DESCRIPTOR`, `AVAILABLE`, `USED`."""
        self.ram.memory.write(DESCRIPTOR, struct.pack("<QIHH", BUFFER, LENGTH, 2, 0))
        return program.store(AVAILABLE, 0, 2).store(AVAILABLE + 4, 0, 2).store(AVAILABLE + 2, 1, 2)

    async def run(self, program: Program) -> None:
        """Runs the program until it reports."""
        load(self.vm, self.ram, program.report())
        await self.back_end.open(self.ram)
        self.vm.start()
        deadline = time.monotonic() + PATIENCE
        while not self.done.writes:
            assert time.monotonic() < deadline, (self.events, self.reports, self.vm.exits(), self.seen(8))
            await asyncio.sleep(0.005)

    def seen(self, count: int) -> tuple[int, ...]:
        """What the program has copied to `SEEN`, a word each."""
        return struct.unpack(f"<{count}I", self.ram.memory.read(SEEN, 4 * count))

    def check_filled(self, used: int = USED) -> None:
        """The device has filled the buffer, and given it back."""
        assert struct.unpack("<HII", self.ram.memory.read(used + 2, 10)) == (1, 0, LENGTH)
        data = self.ram.memory.read(BUFFER, LENGTH + 8)
        assert any(data[:LENGTH])
        assert not any(data[LENGTH:])
        assert self.reports == []

    def exits_at(self, *addresses: int) -> int:
        """How many of the guest's accesses to these ports or addresses came to this process."""
        return sum(count for _, _, address, _, count, _ in self.vm.exits() if address in addresses)

    async def close(self) -> None:
        await asyncio.to_thread(self.vm.close)
        await self.slot.close()
        self.ram.close()


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    guest = Guest()
    try:
        yield guest
    finally:
        await guest.close()


async def test_a_driver_gets_entropy_over_mmio(guest: Guest) -> None:
    base, gsi = guest.mmio()
    program = route_pin(enable_interrupts(), gsi)
    for register, target in ((0x00, SEEN), (0x04, SEEN + 4), (0x08, SEEN + 8)):
        program.copy(base + register, target)
    for status in (0, 1, 3):
        program.store(base + 0x70, status)
    for window, features in ((0, 0), (1, 1)):
        program.store(base + 0x24, window).store(base + 0x20, features)
    program.store(base + 0x70, 11).copy(base + 0x70, SEEN + 12)
    program.store(base + 0x30, 0).copy(base + 0x34, SEEN + 16).store(base + 0x38, 8)
    for register, address in ((0x80, DESCRIPTOR), (0x90, AVAILABLE), (0xA0, USED)):
        program.store_wide(base + register, address)
    program.store(base + 0x44, 1).store(base + 0x70, 15).copy(base + 0x70, SEEN + 20)
    guest.offer_buffer(program).store(base + 0x50, 0).wait_for_interrupt()
    program.copy(base + 0x60, SEEN + 24).store(base + 0x64, 1)
    program.store(base + 0x70, 0).copy(base + 0x70, SEEN + 28)
    await guest.run(program)
    guest.check_filled()
    magic, version, device, negotiated, size, running, interrupt, reset = guest.seen(8)
    assert struct.pack("<I", magic) == b"virt"
    assert (version, device, negotiated, running, interrupt, reset) == (2, 4, 11, 15, 1, 0)
    assert size == guest.back_end.queue_sizes[0]
    assert guest.exits_at(base + 0x50) == 0, "the doorbell rings in the kernel"


def start_modern(program: Program, vector: int) -> Program:
    """Up to DRIVER_OK, by the common configuration structure."""
    common = MEMORY_BAR
    for status in (0, 1, 3):
        program.store(common + 0x14, status, 1)
    for window, features in ((0, 0), (1, 1)):
        program.store(common + 0x08, window).store(common + 0x0C, features)
    program.store(common + 0x14, 11, 1).copy(common + 0x14, SEEN + 4, 1)
    program.store(common + 0x16, 0, 2).store(common + 0x18, 8, 2).store(common + 0x1A, vector, 2)
    program.copy(common + 0x1A, SEEN + 8, 2)
    for register, address in ((0x20, DESCRIPTOR), (0x28, AVAILABLE), (0x30, USED)):
        program.store_wide(common + register, address)
    return program.store(common + 0x1C, 1, 2).store(common + 0x14, 15, 1)


def find_function(config: int) -> Program:
    """Gives the BARs addresses, and switches the function on."""
    program = enable_interrupts().copy(config, SEEN).store(config + 0x14, MSIX_BAR)
    program.store(config + 0x20, MEMORY_BAR).store(config + 0x24, 0)
    return program.store(config + 0x04, 0x06, 2)


async def test_a_driver_gets_entropy_over_pci_with_messages(guest: Guest) -> None:
    config = guest.function()
    program = find_function(config)
    capability = find_capability(guest, 0x11)
    program.store(config + capability + 2, 0x8000, 2)
    program.store_wide(MSIX_BAR + 16, 0xFEE0_0000).store(MSIX_BAR + 24, VECTOR).store(MSIX_BAR + 28, 0)
    start_modern(program, 1)
    guest.offer_buffer(program).store(MEMORY_BAR + 0x3000, 0, 2).wait_for_interrupt()
    program.store(MEMORY_BAR + 0x14, 0, 1).copy(MEMORY_BAR + 0x14, SEEN + 12, 1)
    await guest.run(program)
    guest.check_filled()
    assert guest.seen(4) == (0x1044_1AF4, 11, 1, 0)
    assert guest.exits_at(MEMORY_BAR + 0x3000) == 0, "the doorbell rings in the kernel"


async def test_a_driver_without_messages_is_interrupted_by_a_level(guest: Guest) -> None:
    config = guest.function()
    program = route_pin(find_function(config), at.pci_intx_gsi(1), level=True)
    start_modern(program, 0xFFFF)
    guest.offer_buffer(program).store(MEMORY_BAR + 0x3000, 0, 2).wait_for_interrupt()
    # The ISR status says why, once, and takes the level back.
    for place, register in enumerate((config + 0x04, MEMORY_BAR + 0x1000, MEMORY_BAR + 0x1000, config + 0x04)):
        program.copy(register, SEEN + 16 + 4 * place)
    await guest.run(program)
    guest.check_filled()
    asserted, first, second, released = guest.seen(8)[4:]
    assert (asserted >> 16 & 8, first, second, released >> 16 & 8) == (8, 1, 0, 0)


async def test_a_legacy_driver_gets_entropy_by_ports(guest: Guest) -> None:
    guest.function(transitional=True)
    program = route_pin(enable_interrupts(), at.pci_intx_gsi(1), level=True)
    # Configuration space by ports, as legacy drivers' operating systems know it.
    for register, value in ((0x10, PORTS), (0x04, 0x05)):
        program.out(0xCF8, 0x8000_0000 | 1 << 11 | register).out(0xCFC, value)
    program.out(0xCF8, 0x8000_0000 | 1 << 11).into(0xCFC, SEEN)
    for status in (0, 1, 3):
        program.out(PORTS + 18, status, 1)
    program.out(PORTS + 4, 0).out(PORTS + 14, 0, 2).into(PORTS + 12, SEEN + 4, 2)
    program.out(PORTS + 8, DESCRIPTOR >> 12).out(PORTS + 18, 7, 1)
    size = guest.back_end.queue_sizes[0]
    available = DESCRIPTOR + 16 * size
    used = -(-(available + 6 + 2 * size) // 4096) * 4096
    assert used + 4096 <= 1 << 17
    buffer = 0x30000
    guest.ram.memory.write(DESCRIPTOR, struct.pack("<QIHH", buffer, LENGTH, 2, 0))
    program.store(available + 4, 0, 2).store(available + 2, 1, 2).out(PORTS + 16, 0, 2).wait_for_interrupt()
    await guest.run(program.into(PORTS + 19, SEEN + 8, 1))
    assert (guest.seen(3)[0], guest.seen(3)[1], guest.seen(3)[2] & 1) == (0x1005_1AF4, size, 1)
    assert struct.unpack("<HII", guest.ram.memory.read(used + 2, 10)) == (1, 0, LENGTH)
    assert any(guest.ram.memory.read(buffer, LENGTH))
    assert guest.exits_at(PORTS + 16) == 0, "the doorbell rings in the kernel"


def find_capability(guest: Guest, wanted: int) -> int:
    """Where a capability of the function in slot 1 is."""
    assert guest.pci is not None
    config = bytes(json.loads(guest.pci.save())["slots"]["1"]["config"]["bytes"])
    offset = config[0x34]
    while config[offset] != wanted:
        offset = config[offset + 1]
        assert offset, f"no capability {wanted:#x}"
    return offset
