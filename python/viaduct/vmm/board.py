"""What is inside a machine while it is switched on: RAM, an engine's virtual machine, and every device in its place.

Nothing here knows how a guest's instructions are executed: the engine does, and is asked for buses, interrupts and
vCPUs. What a configuration names is opened in one order - memory, back-ends, devices, kernel - and given up in the
other, however far it came.
"""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Any, Protocol

from viaduct._core import PciRoot, VirtioMmio, VirtioPci, Vm
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vmm import memory_map as at
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.boot import BootError, Platform, load
from viaduct.vmm.config import MachineConfig, NicConfig
from viaduct.vmm.engines import EngineName, EngineUnavailableError, choose
from viaduct.vmm.errors import MachineError
from viaduct.vmm.nic import mac_of, socket_of
from viaduct.vmm.pc import Pc, SerialConsole
from viaduct.vmm.ram import Ram
from viaduct.vmm.virtio_devices import back_ends
from viaduct.vmm.virtio_slot import VirtioSlot

if TYPE_CHECKING:
    from viaduct.vmm.boot import CpuState


class Report(Protocol):
    """Tells the machine that something happened, on its loop: see `Machine._from_board`."""

    def __call__(self, kind: str, text: str, code: int = 0) -> None: ...


class Board:
    """Made by `build`; `start` lets the guest run; `close` ends it."""

    def __init__(self, config: MachineConfig, loop: asyncio.AbstractEventLoop, report: Report) -> None:
        self.config = config
        self.report = report
        self.engine = _engine(config)
        self.ram = Ram(config.memory)
        self.slots: list[VirtioSlot] = []
        self.devices: list[str] = []
        """What is where, for people."""
        self._loop = loop
        self._stack = AsyncExitStack()
        self._stack.callback(self.ram.close)
        try:
            self.vm = Vm(self.engine, self.ram.memory, config.cpus, on_event=self._event)
        except (OSError, ValueError, RuntimeError) as error:
            self.ram.close()
            raise MachineError(str(error)) from error

    @classmethod
    async def build(cls, config: MachineConfig, name: str, console: ConsoleTerminal, report: Report) -> Board:
        """A machine switched on, its first vCPU at the kernel's first instruction. Raises `MachineError`."""
        board = cls(config, asyncio.get_running_loop(), report)
        try:
            await board._fit(name, console)
        except (MachineError, BootError, VhostUserError, OSError, ValueError) as error:
            await board.close()
            raise error if isinstance(error, MachineError) else MachineError(str(error)) from error
        except BaseException:
            await board.close()
            raise
        return board

    async def _fit(self, name: str, console: ConsoleTerminal) -> None:
        """Puts every device into its place and the kernel into memory."""
        self._stack.callback(self.vm.close)
        self.pc = Pc(self.vm, self.config.memory, self.call)
        if self.config.console_device == "serial":
            joined = SerialConsole(self.pc.serial, console)
            self._stack.callback(joined.close)
        pci = self._add_pci() if self.config.transport == "pci" else None
        async for device_name, back_end in back_ends(self.config, name, console, self._stack):
            await self._add_virtio(device_name, back_end, pci)
        for index, nic in enumerate(self.config.nics):
            if nic.path == "emulated":
                await self._add_emulated(f"net{index}", nic, mac_of(nic, name, index), name, pci)
        if pci is None:
            self.vm.add_pio(at.RESET_PORT, 1, self.pc.reset_control)
        mmio = () if pci is not None else tuple(range(len(self.slots)))
        platform = Platform(vcpus=self.config.cpus, virtio_mmio=mmio, pci=pci is not None)
        state = await asyncio.to_thread(self._load, platform)
        self.vm.set_registers(0, state.registers())

    def _add_pci(self) -> PciRoot:
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

    async def _add_virtio(self, name: str, back_end: BackEnd, pci: PciRoot | None) -> None:
        """A device where its driver looks for it: a function of the PCI bus, or the next virtio-mmio slot."""
        await back_end.open(self.ram)
        slot = VirtioSlot(name, back_end, self._loop, self.report)
        self._stack.push_async_callback(slot.close)
        features, sizes, config = back_end.features, list(back_end.queue_sizes), back_end.config
        kind = back_end.device_id
        if pci is not None:
            function = VirtioPci(
                self.vm, slot, name=name, device_id=kind, features=features, queue_sizes=sizes, config=config
            )
            place = f"PCI 00:{pci.add(function):02x}.0"
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

    async def _add_emulated(self, name: str, nic: NicConfig, mac: bytes, machine: str, pci: PciRoot | None) -> None:
        """A card of registers, which only PCI has a place for."""
        from viaduct.vmm.emulated_nic import EmulatedNic

        if pci is None:
            raise MachineError(f"{name}: an emulated card needs transport=pci, where its driver looks for it")
        card = EmulatedNic(name, mac, self.ram.memory)
        self._stack.push_async_callback(card.close)
        slot = pci.add(card.function)
        if nic.kind == "tap":
            card.plug_into_tap(nic.target)
        else:
            await card.plug_into_back_end(await asyncio.to_thread(socket_of, nic, machine))
        self.devices.append(f"{name}: e1000 at PCI 00:{slot:02x}.0")

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

    async def start(self, *, paused: bool) -> None:
        """Lets the vCPUs run, or stand ready to."""
        if not paused:
            self.vm.start()

    async def pause(self) -> None:
        """Returns when no vCPU runs. Raises `MachineError` if one does not come back from its device."""
        self.vm.request_pause()
        if not await asyncio.to_thread(self.vm.wait_paused, 30.0):
            raise MachineError("a vCPU is still in a device after 30 s")

    async def resume(self) -> None:
        """Lets the vCPUs run again."""
        self.vm.resume()

    async def close(self) -> None:
        """Ends the guest and lets go of everything. May be called twice."""
        await asyncio.to_thread(self.vm.stop)
        await self._stack.aclose()

    def _event(self, kind: str, detail: dict[str, Any]) -> None:
        """What the engine reports, on a vCPU's thread."""
        if kind == "paused":
            return
        text = ", ".join(f"{key} {value}" for key, value in detail.items() if key not in ("registers", "code"))
        names = {"halted": "shutdown", "triple-fault": "triple-fault", "failed": "failed"}
        code = 0 if kind == "halted" else 1
        self.call(names.get(kind, kind), text, code)

    def call(self, kind: str, text: str, code: int = 0) -> None:
        """Reports from any thread."""
        with suppress(RuntimeError):  # the loop has ended, and the machine with it
            self._loop.call_soon_threadsafe(self.report, kind, text, code)


def _engine(config: MachineConfig) -> EngineName:
    try:
        return choose(config.engine)
    except EngineUnavailableError as error:
        raise MachineError(str(error)) from error
