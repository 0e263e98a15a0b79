"""What is inside a machine while it is switched on: RAM, an engine's virtual machine, and every device in its place.

Nothing here knows how a guest's instructions are executed: the engine does, and is asked for buses, interrupts and
vCPUs. What a configuration names is opened in one order - memory, devices and their back-ends, and then either the
kernel is loaded or a snapshot's states are taken over - and given up in the other, however far it came.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from viaduct._core import PciRoot, VirtioMmio, VirtioPci, Vm
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.vhost_user.device import Device
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vmm import memory_map as at
from viaduct.vmm import snapshot as snapshots
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.boot import BootError, Platform, load
from viaduct.vmm.config import MachineConfig, NicConfig
from viaduct.vmm.engines import EngineName, EngineUnavailableError, choose
from viaduct.vmm.errors import MachineError
from viaduct.vmm.pc import Pc, SerialConsole
from viaduct.vmm.ram import Ram
from viaduct.vmm.snapshot import SlotState, Snapshot
from viaduct.vmm.virtio_devices import back_ends
from viaduct.vmm.virtio_slot import VirtioSlot

if TYPE_CHECKING:
    from viaduct.vmm.boot import CpuState
    from viaduct.vmm.emulated_nic import EmulatedNic
    from viaduct.vmm.user_devices import RegisterSlot, UserDevices


class Report(Protocol):
    """Tells the machine that something happened, on its loop: see `Machine._from_board`."""

    def __call__(self, kind: str, text: str, code: int = 0) -> None: ...


class Board:
    """Made by `build`; `start` lets the guest run; `close` ends it."""

    def __init__(self, config: MachineConfig, report: Report, memory: Path | None) -> None:
        self.config = config
        self.report = report
        self.engine = _engine(config)
        self.ram = Ram(config.memory, content=memory, shared=config.shares_memory)
        self.slots: list[VirtioSlot] = []
        self.cards: list[EmulatedNic] = []
        self.registers: list[RegisterSlot] = []
        self.devices: list[str] = []
        """What is where, for people."""
        self._loop = asyncio.get_running_loop()
        self._told: set[str] = set()
        """Kinds of events that are on their way to the loop: a guest may cause them faster than they are read."""
        self._stack = AsyncExitStack()
        self._stack.callback(self.ram.close)
        try:
            self.vm = Vm(self.engine, self.ram.memory, config.cpus, interrupts=config.interrupts, on_event=self._event)
        except (OSError, ValueError, RuntimeError) as error:
            self.ram.close()
            raise MachineError(str(error)) from error
        self._stack.callback(self.vm.close)
        try:
            self.pc = Pc(self.vm, config.memory, self.call)
            self.pci = self._make_pci() if config.transport == "pci" else None
            if self.pci is None:
                self.vm.add_pio(at.RESET_PORT, 1, self.pc.reset_control)
        except (OSError, ValueError, RuntimeError) as error:
            self.vm.close()
            self.ram.close()
            raise MachineError(str(error)) from error

    @classmethod
    async def build(
        cls,
        config: MachineConfig,
        name: str,
        console: ConsoleTerminal,
        report: Report,
        restore: tuple[Path, Snapshot] | None = None,
    ) -> Board:
        """A machine switched on, its first vCPU at the kernel's first instruction; or where a snapshot in a directory
        has it. Raises `MachineError`."""
        board = cls(config, report, None if restore is None else restore[0] / snapshots.MEMORY)
        try:
            await board._fit(name, console)
            if restore is None:
                await board._load_kernel()
            else:
                await board._take_over(restore[1])
        except (MachineError, BootError, VhostUserError, OSError, ValueError, RuntimeError) as error:
            await board.close()
            raise error if isinstance(error, MachineError) else MachineError(str(error)) from error
        except BaseException:
            await board.close()
            raise
        return board

    # What goes where.

    def _make_pci(self) -> PciRoot:
        root = PciRoot(
            self.vm,
            ports=(at.PCI_PORTS, at.PCI_PORTS_SIZE),
            memory32=(at.PCI_WINDOW_32, at.PCI_WINDOW_32_SIZE),
            memory64=(at.pci_window_64(self.config.memory), at.PCI_WINDOW_64_SIZE),
            gsis=at.PCI_INTX_GSIS,
        )
        self.vm.add_mmio(at.PCI_ECAM, at.PCI_ECAM_SIZE, root.ecam())
        self.vm.add_pio(at.PCI_CONFIG_PORT, 8, root.config_ports(self.pc.reset_control))
        return root

    async def _fit(self, name: str, console: ConsoleTerminal) -> None:
        """Puts every device into its place."""
        if self.config.console_device == "serial":
            joined = SerialConsole(self.pc.serial, console)
            self._stack.callback(joined.close)
        own = self._own_devices()
        virtio = [(device_name, device) for device_name, _, device in own if isinstance(device, Device)]
        async for device_name, back_end in back_ends(self.config, name, console, self._stack, virtio):
            await self._add_virtio(device_name, back_end)
        for index, nic in enumerate(self.config.nics):
            if nic.path == "emulated":
                await self._add_card(index, nic, name)
        self._place_registers(own)

    def _own_devices(self) -> UserDevices:
        if not self.config.devices:
            return []
        from viaduct.vmm.user_devices import make_devices

        return make_devices(self.config, self._stack)

    def _place_registers(self, own: UserDevices) -> None:
        """Those of the user's own devices that are registers."""
        lines: dict[int, str] = {}
        for name, part, device in own:
            if not isinstance(device, Device):
                from viaduct.vmm.user_devices import RegisterSlot

                placed = RegisterSlot(name, part, device, self.config, self.vm, self.ram.memory, lines)
                self.registers.append(placed)
                self.devices.append(f"{name}: {placed.place}")

    async def _add_virtio(self, name: str, back_end: BackEnd) -> None:
        """A device where its driver looks for it: a function of the PCI bus, or the next virtio-mmio slot."""
        await back_end.open(self.ram)
        slot = VirtioSlot(name, back_end, self._loop, self.report)
        self._stack.push_async_callback(slot.close)
        features, sizes, config = back_end.features, list(back_end.queue_sizes), back_end.config
        kind = back_end.device_id
        if self.pci is not None:
            function = VirtioPci(
                self.vm,
                slot,
                name=name,
                device_id=kind,
                features=features,
                queue_sizes=sizes,
                config=config,
                transitional=self.config.transitional and VirtioPci.has_transitional_id(kind),
                port_notify=self.config.port_notify,
            )
            place = f"PCI 00:{self.pci.add(function):02x}.0"
            slot.transport = function
        else:
            address, gsi = at.virtio_mmio_slot(len(self.slots))
            registers = VirtioMmio(
                self.vm,
                slot,
                name=name,
                device_id=kind,
                features=features,
                queue_sizes=sizes,
                config=config,
                address=address,
                gsi=gsi,
            )
            self.vm.add_mmio(address, VirtioMmio.SIZE, registers)
            place = f"virtio-mmio at {address:#x}, interrupt {gsi}"
            slot.transport = registers
        self.slots.append(slot)
        self.devices.append(f"{name}: {place}")

    async def _add_card(self, index: int, nic: NicConfig, machine: str) -> None:
        """A card of registers, which only PCI has a place for."""
        from viaduct.vmm.emulated_nic import EmulatedNic
        from viaduct.vmm.nic import mac_of, socket_of

        name = f"net{index}"
        if self.pci is None:
            raise MachineError(f"{name}: an emulated card needs transport=pci, where its driver looks for it")
        card = EmulatedNic(name, mac_of(nic, machine, index), self.ram.memory, self.report)
        self._stack.push_async_callback(card.close)
        slot = self.pci.add(card.function)
        if nic.kind == "tap":
            card.plug_into_tap(nic.target)
        else:
            await card.plug_into_back_end(await socket_of(nic, machine))
        self.devices.append(f"{name}: e1000 at PCI 00:{slot:02x}.0")
        self.cards.append(card)

    async def _load_kernel(self) -> None:
        mmio = () if self.pci is not None else tuple(range(len(self.slots)))
        platform = Platform(vcpus=self.config.cpus, virtio_mmio=mmio, pci=self.pci is not None)
        state = await asyncio.to_thread(self._load, platform)
        self.vm.set_registers(0, state.registers())

    def _load(self, platform: Platform) -> CpuState:
        config = self.config
        return load(
            self.ram.memory,
            config.kernel,
            initrd=config.initrd,
            command_line=config.append,
            boot=config.boot,
            platform=platform,
        )

    # Life.

    async def start(self, *, paused: bool) -> None:
        """Lets the vCPUs run, or stand ready to."""
        try:
            self.vm.start(paused=paused)
        except (OSError, RuntimeError) as error:
            raise MachineError(f"the vCPUs cannot run: {error}") from error

    def serve_gdb(self, port: int) -> int:
        """Lets gdb attach on a port of the loopback interface, 0 for any; returns it. The guest stands still until it
        has. Raises `MachineError`."""
        try:
            return self.vm.serve_gdb(port, wait=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise MachineError(f"--gdb {port}: {error}; choose another port, or 0 for a free one") from error

    def press_power_button(self) -> None:
        """A pulse of its interrupt. The guest does with it what it likes."""
        for level in (True, False):
            self.vm.set_line(at.POWER_BUTTON_GSI, level)

    async def pause(self) -> None:
        """Returns when no vCPU runs. Raises `MachineError` if one does not come back from its device."""
        self.vm.request_pause()
        try:
            if not await asyncio.to_thread(self.vm.wait_paused, 30.0):
                raise MachineError("a vCPU is still in a device after 30 s; the others run again")
        except BaseException:
            self.vm.resume()
            raise

    async def resume(self) -> None:
        """Lets the vCPUs run again."""
        self.vm.resume()

    async def close(self) -> None:
        """Ends the guest and lets go of everything. May be called twice."""
        for slot in self.slots:
            slot.closing = True
        await asyncio.to_thread(self.vm.stop)
        await self._stack.aclose()
        # Devices in Rust keep the callbacks that lead back here, where no garbage collector looks.
        self.__dict__.pop("pc", None)
        self.slots.clear()
        self.cards.clear()
        self.registers.clear()

    # Snapshots. The vCPUs stand still.

    async def save(self, directory: Path, name: str) -> None:
        """Keeps the machine in an empty directory. Its queues run again afterwards. Raises `MachineError`."""
        from viaduct.vmm.nic import with_macs

        if self.config.shares:
            raise MachineError(
                f"{name} has a directory of the host ({self.config.shares[0].directory}): virtiofsd cannot say which "
                "of its files are open, so such a machine cannot be kept; run it without --share"
            )
        self._check_no_gdb(name)
        stopped: list[tuple[VirtioSlot, dict[int, int]]] = []
        for card in self.cards:
            card.function.pause()
        try:
            for slot in self.slots:
                stopped.append((slot, await slot.suspend()))
            snapshot = Snapshot(
                version=snapshots.VERSION,
                name=name,
                config=with_macs(self.config, name),
                engine=self.vm.save(),
                platform={part: device.save() for part, device in self.pc.stateful.items()},
                pci=None if self.pci is None else self.pci.save(),
                slots=tuple(_slot_state(slot, bases) for slot, bases in stopped),
                cards={card.function.name: card.function.save() for card in self.cards},
                registers={device.name: device.save() for device in self.registers},
                disks=snapshots.disk_states(self.config),
            )
            await asyncio.to_thread(self.ram.save, directory / snapshots.UNFINISHED_MEMORY)
            self._check_no_gdb(name)
            await asyncio.to_thread(snapshots.write, directory, snapshot)
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            # TypeError: what a user's virtio device keeps is no plain data.
            raise MachineError(f"{directory}: {error}") from error
        finally:
            for slot, bases in stopped:
                await slot.resume_suspended(bases)
            for card in self.cards:
                card.function.resume()
            snapshots.forget_unfinished(directory)

    def _check_no_gdb(self, name: str) -> None:
        if self.vm.gdb in ("stopped", "running"):
            raise MachineError(
                f"gdb is attached to {name}, and its breakpoints are in the guest's memory: no snapshot is taken; "
                "leave the guest (in gdb: detach), and try again"
            )

    async def _take_over(self, snapshot: Snapshot) -> None:
        """Goes on where a snapshot has the machine; its memory is there already."""
        parts = {part for part in self.pc.stateful if part not in snapshot.platform}
        parts |= {card.function.name for card in self.cards if card.function.name not in snapshot.cards}
        parts |= {device.name for device in self.registers if device.name not in snapshot.registers}
        if parts:
            raise MachineError(f"the snapshot has no state of {', '.join(sorted(parts))}; it is damaged")
        self.vm.restore(snapshot.engine)
        for part, device in self.pc.stateful.items():
            device.restore(snapshot.platform[part])
        if self.pci is not None and snapshot.pci is not None:
            self.pci.restore(snapshot.pci)
        for card in self.cards:
            card.function.restore(snapshot.cards[card.function.name])
        for registers in self.registers:
            registers.restore(snapshot.registers[registers.name])
        states = {state.name: state for state in snapshot.slots}
        for slot in self.slots:
            if (state := states.get(slot.name)) is None:
                raise MachineError(f"the snapshot has no device {slot.name}")
            await _go_on(slot, state)

    # What happens.

    def _event(self, kind: str, detail: dict[str, Any]) -> None:
        """What the engine reports, on a vCPU's thread."""
        if kind == "paused":
            return
        if kind == "device-error":  # It begins with the device's name.
            self.call(kind, f"{detail['error']} (failure {detail['failures']} of this device)")
            return
        if kind == "system-event":
            self.call(*_SYSTEM_EVENTS.get(detail["type"], ("failed", f"an event that means nothing here: {detail}", 1)))
            return
        text = ", ".join(f"{key} {value}" for key, value in detail.items() if key not in ("registers", "code"))
        if kind in ("triple-fault", "failed"):
            text += f" at {detail['address']:#x}: {detail['code'].hex(' ')}"
        # Without an interrupt controller nothing ends a halt: the guest has nothing more to do.
        self.call("shutdown" if kind == "halted" else kind, text, 0 if kind == "halted" else 1)

    def call(self, kind: str, text: str, code: int = 0) -> None:
        """Reports from any thread. Of events of one kind that come faster than they are read, the first is told."""
        if kind in self._told:
            return
        self._told.add(kind)
        with suppress(RuntimeError):  # the loop has ended, and the machine with it
            self._loop.call_soon_threadsafe(self._tell, kind, text, code)

    def _tell(self, kind: str, text: str, code: int) -> None:
        self._told.discard(kind)
        self.report(kind, text, code)


_SYSTEM_EVENTS = {
    1: ("shutdown", "the guest asked its hypervisor to switch the machine off", 0),
    2: ("reset", "the guest asked its hypervisor for a reset", 0),
    3: ("failed", "the guest told its hypervisor that it has crashed", 1),
}
"""By `KVM_SYSTEM_EVENT_*` (linux/kvm.h): how the machine ends. Its vCPUs are paused already."""


def _engine(config: MachineConfig) -> EngineName:
    try:
        return choose(config.engine)
    except EngineUnavailableError as error:
        raise MachineError(str(error)) from error


def _slot_state(slot: VirtioSlot, bases: dict[int, int]) -> SlotState:
    assert slot.transport is not None
    return SlotState(slot.name, slot.transport.save(), bases, slot.back_end.save())


async def _go_on(slot: VirtioSlot, state: SlotState) -> None:
    transport = slot.transport
    assert transport is not None
    transport.restore(state.transport)
    slot.back_end.restore(state.device)
    slot.show_config()
    features, queues = transport.running_queues()
    if not queues:
        return
    await slot.resume(features, queues, state.bases)
    for queue in queues:
        # What was signalled when the snapshot was taken is forgotten: both sides look once.
        for event in queue[5:]:
            os.eventfd_write(event, 1)
