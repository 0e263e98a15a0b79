"""The emulated card in a machine of this host's KVM, on a port of a switch: an ARP request leaves by a descriptor, the
answer of another guest comes into one, and the pin tells."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from viaduct import Guest
from viaduct._core import E1000, PciRoot, Vm
from viaduct.switch.config import SwitchConfig, VhostUserPort
from viaduct.switch.switch import Switch
from viaduct.vmm import memory_map as at
from viaduct.vmm.emulated_nic import EmulatedNic
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram
from vmm.flat import PATIENCE, Registers, until
from vmm.register_program import REPORT_PORT, Program, enable_interrupts, load, route_pin

MAC = bytes.fromhex("525400000001")
OURS, THEIRS = bytes([10, 0, 0, 9]), bytes([10, 0, 0, 2])
TX_RING, RX_RING, TX_BUFFER, RX_BUFFER, SEEN = 0x10000, 0x11000, 0x12000, 0x13000, 0x14000
BAR = 0xC100_0000

CTRL, ICR, IMS, RCTL, TCTL = 0x0000, 0x00C0, 0x00D0, 0x0100, 0x0400
RDBAL, RDLEN, RDT, TDBAL, TDLEN, TDT = 0x2800, 0x2808, 0x2818, 0x3800, 0x3808, 0x3818
RESET, ENABLE, BROADCAST, STRIP = 1 << 26, 1 << 1, 1 << 15, 1 << 26
RECEIVED = 1 << 7


def arp_request() -> bytes:
    """Who has THEIRS? Tell OURS (RFC 826)."""
    head = b"\xff" * 6 + MAC + b"\x08\x06"
    return head + struct.pack(">HHBBH", 1, 0x0800, 6, 4, 1) + MAC + OURS + bytes(6) + THEIRS


@pytest.fixture
async def switch(tmp_path: Path) -> AsyncIterator[Switch]:
    card, guest = (VhostUserPort(path=f"{tmp_path}/{name}.sock") for name in ("card", "guest"))
    async with Switch(SwitchConfig(ports={"card": card, "guest": guest})) as running:
        yield running


def driver(function: int, irq: int) -> Program:
    """Finds the card at `function`, sends one frame, waits until one has come, and reads why it was interrupted."""
    program = route_pin(enable_interrupts(), irq, level=True)
    program.copy(function, SEEN).store(function + 0x10, BAR).store(function + 4, 6, 2)
    registers = (
        (CTRL, RESET),
        (TDBAL, TX_RING),
        (TDLEN, 128),
        (TCTL, ENABLE | 8),
        (RDBAL, RX_RING),
        (RDLEN, 128),
        (RCTL, ENABLE | BROADCAST | STRIP),
        (RDT, 7),
        (IMS, RECEIVED),
        (TDT, 1),
    )
    for offset, value in registers:
        program.store(BAR + offset, value)
    return program.wait_for_interrupt().copy(BAR + ICR, SEEN + 4).copy(BAR + ICR, SEEN + 8).report()


async def test_a_question_leaves_and_its_answer_interrupts(switch: Switch, tmp_path: Path) -> None:
    ram = Ram(1 << 20)
    vm = Vm("kvm", ram.memory, 1, interrupts="kernel")
    done = Registers()
    vm.add_pio(REPORT_PORT, 1, done)
    root = PciRoot(
        vm,
        ports=(at.PCI_PORTS, at.PCI_PORTS_SIZE),
        memory32=(at.PCI_WINDOW_32, at.PCI_WINDOW_32_SIZE),
        memory64=(at.pci_window_64(ram.size), at.PCI_WINDOW_64_SIZE),
        gsis=at.PCI_INTX_GSIS,
    )
    vm.add_mmio(at.PCI_ECAM, at.PCI_ECAM_SIZE, root.ecam())
    reports: list[tuple[str, str]] = []
    card = EmulatedNic("net0", MAC, ram.memory, lambda kind, text: reports.append((kind, text)))
    slot = root.add(card.function)
    frame = arp_request()
    ram.memory.write(TX_BUFFER, frame)
    ram.memory.write(TX_RING, struct.pack("<QHBBI", TX_BUFFER, len(frame), 0, 0x0B, 0))
    ram.memory.write(RX_RING, struct.pack("<QQ", RX_BUFFER, 0) * 8)
    load(vm, ram, driver(at.PCI_ECAM + (slot << 15), at.pci_intx_gsi(slot)))
    try:
        async with Guest(f"{tmp_path}/guest.sock", ip="10.0.0.2/24") as guest:
            await card.plug_into_back_end(f"{tmp_path}/card.sock")
            vm.start()
            await asyncio.to_thread(until, lambda: bool(done.writes))
            identity, causes, again = struct.unpack("<III", ram.memory.read(SEEN, 12))
            assert identity == 0x100E_8086
            assert causes & RECEIVED
            assert again & causes == 0, "reading has cleared them"
            assert ram.memory.read(TX_RING + 12, 1) == b"\x01", "the descriptor came back"
            length, _, status, errors = struct.unpack("<HHBB", ram.memory.read(RX_RING + 8, 6))
            assert (length, status & 3, errors) == (60, 3, 0)
            answer = ram.memory.read(RX_BUFFER, length)
            assert answer[:14] == MAC + guest.mac + b"\x08\x06"
            assert answer[20:22] == b"\x00\x02"
            assert answer[28:32] == THEIRS
            assert card.function.take_complaint() is None
            assert not reports
            assert card.function.counters()["tx_frames"] == 1
    finally:
        vm.stop()
        await card.close()
        vm.close()
        ram.close()


async def test_states_are_kept_and_damaged_ones_refused() -> None:
    ram = Ram(1 << 20)
    card = E1000("net0", MAC, ram.memory)
    card.pause()
    other = E1000("net0", bytes(6), ram.memory)
    other.pause()
    other.restore(card.save())
    assert other.save().replace(b'"generation":2', b'"generation":1') == card.save()
    with pytest.raises(ValueError, match="e1000"):
        other.restore(b"{}")
    with pytest.raises(ValueError, match="6 bytes, not 5"):
        E1000("net0", MAC[:5], ram.memory)
    ram.close()


async def test_nobody_at_the_other_end_is_an_error(tmp_path: Path) -> None:
    ram = Ram(1 << 20)
    card = EmulatedNic("net0", MAC, ram.memory, lambda kind, text: None)
    with pytest.raises(MachineError, match=r"net0: .*nobody\.sock"):
        await card.plug_into_back_end(f"{tmp_path}/nobody.sock", within=0.1)
    await card.close()
    ram.close()


async def test_what_a_driver_does_wrong_is_an_event() -> None:
    ram = Ram(1 << 20)
    vm = Vm("kvm", ram.memory, 1, interrupts="kernel")
    done = Registers()
    vm.add_pio(REPORT_PORT, 1, done)
    root = PciRoot(
        vm,
        ports=(at.PCI_PORTS, at.PCI_PORTS_SIZE),
        memory32=(at.PCI_WINDOW_32, at.PCI_WINDOW_32_SIZE),
        memory64=(at.pci_window_64(ram.size), at.PCI_WINDOW_64_SIZE),
        gsis=at.PCI_INTX_GSIS,
    )
    vm.add_mmio(at.PCI_ECAM, at.PCI_ECAM_SIZE, root.ecam())
    reports: asyncio.Queue[tuple[str, str]] = asyncio.Queue()
    card = EmulatedNic("net0", MAC, ram.memory, lambda kind, text: reports.put_nowait((kind, text)))
    function = at.PCI_ECAM + (root.add(card.function) << 15)
    program = Program().store(function + 0x10, BAR).store(function + 4, 6, 2)
    for offset, value in ((TDBAL, 0x8000_0000), (TDLEN, 128), (TCTL, ENABLE), (TDT, 1)):
        program.store(BAR + offset, value)
    load(vm, ram, program.report())
    try:
        vm.start()
        kind, text = await asyncio.wait_for(reports.get(), PATIENCE)
        assert kind == "device-error"
        assert text.startswith("net0: transmit descriptor at 0x80000000 is outside the guest's memory")
    finally:
        vm.stop()
        await card.close()
        vm.close()
        ram.close()
