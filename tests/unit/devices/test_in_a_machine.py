"""The same devices carried by a machine's slot instead of a socket: they start, pause, go on, are reset and end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devices.test_filesystem import RUST, program
from viaduct._core import DriverQueue
from viaduct.devices import filesystem
from viaduct.devices.balloon import Balloon
from viaduct.devices.console import Console
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.devices.entropy import Entropy
from viaduct.devices.vsock import Vsock
from viaduct.vhost_user import Device, Vring
from viaduct.virtio import DeviceFeature, DeviceType
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.config import MachineConfig, ShareConfig
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram
from viaduct.vmm.virtio_devices import back_ends

SIZE = 16
PART = 0x4000


class Queue:
    """One queue in a machine's RAM and a buffer of it."""

    def __init__(self, ram: Ram, index: int) -> None:
        self.ram, self.index = ram, index
        self.at = 0x100000 + index * PART
        self.kick, self.call = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
        self.base = 0
        self.core = DriverQueue(
            ram.memory,
            layout="split",
            size=SIZE,
            descriptor_addr=self.at,
            driver_addr=self.at + 0x400,
            device_addr=self.at + 0x800,
        )

    @property
    def vring(self) -> Vring:
        """Where it stands."""
        addresses = (self.at, self.at + 0x400, self.at + 0x800)
        return Vring(self.index, SIZE, *addresses, self.base, self.kick, self.call, None)

    def post(self, out: bytes, room: int) -> None:
        """Makes one buffer available."""
        self.ram.memory.write(self.at + 0x1000, out)
        self.core.add(
            [(self.at + 0x1000, len(out))] if out else [], [(self.at + 0x2000, room)] if room else [], self.index
        )
        self.core.kick()
        os.eventfd_write(self.kick, 1)

    async def answer(self) -> bytes:
        """What the device wrote into it."""
        async with asyncio.timeout(30):
            while (taken := self.core.take()) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        return self.ram.memory.read(self.at + 0x2000, taken[1])

    def close(self) -> None:
        os.close(self.kick)
        os.close(self.call)


class Machine:
    """A back-end with the queues of its driver."""

    def __init__(self, device: Device, ram: Ram) -> None:
        self.back_end = InProcessBackEnd(device)
        self.ram = ram
        self.queues: list[Queue] = []
        self.changes = 0

    async def start(self) -> None:
        """The driver is ready, for the first time or after a reset."""
        for queue in self.queues:
            queue.close()
        self.queues = [Queue(self.ram, index) for index in range(len(self.back_end.queue_sizes))]
        await self.go_on()

    async def go_on(self) -> None:
        plain = DeviceFeature.RING_PACKED | DeviceFeature.EVENT_IDX
        await self.back_end.activate(self.back_end.features & ~plain, [queue.vring for queue in self.queues])

    async def pause(self) -> None:
        bases = await self.back_end.deactivate()
        for queue in self.queues:
            queue.base = bases[queue.index]

    async def reset(self) -> None:
        await self.back_end.deactivate()
        self.back_end.reset()
        await self.start()


@contextlib.asynccontextmanager
async def machine(device: Device) -> AsyncIterator[Machine]:
    """A device in a machine of 16 MiB."""
    ram = Ram(16 << 20)
    running = Machine(device, ram)
    await running.back_end.open(ram)
    try:
        await running.start()
        yield running
    finally:
        await running.back_end.close()
        for queue in running.queues:
            queue.close()
        ram.close()
        device.close()


async def test_entropy() -> None:
    async with machine(Entropy()) as running:
        for step in (running.pause, running.reset, None):
            running.queues[0].post(b"", 64)
            assert len(await running.queues[0].answer()) == 64
            if step is not None:
                await step()
                if step == running.pause:
                    await running.go_on()


async def test_a_console() -> None:
    terminal = ConsoleTerminal()
    async with machine(Console(terminal)) as running:
        changes: list[bytes] = []
        running.back_end.on_config_change = lambda: changes.append(running.back_end.config)
        running.queues[1].post(b"login: ", 0)
        assert await terminal.expect("login: ", 30) == "login: "
        await running.queues[1].answer()
        running.queues[0].post(b"", 100)
        await running.pause()
        terminal.write("root\n")
        await running.go_on()
        assert await running.queues[0].answer() == b"root\n"
        terminal.resize(80, 25)
        assert changes == [struct.pack("<HHII", 80, 25, 1, 0)]
        await running.reset()
        running.queues[1].post(b"again", 0)
        assert await terminal.expect("again", 30) == "again"
        running.back_end.write_config(8, b"!\0\0\0")
        assert await terminal.expect("!", 30) == "!"
        running.back_end.write_config(0, b"\1\0")  # Refused, and said so.


async def test_a_balloon() -> None:
    device = Balloon()
    async with machine(device) as running:
        running.ram.memory.write(0x20000, b"\xaa" * 8192)
        running.queues[0].post(struct.pack("<I", 0x20), 0)
        await running.queues[0].answer()
        assert running.ram.memory.read(0x20000, 8192) == bytes(4096) + b"\xaa" * 4096
        running.queues[2].post(struct.pack("<HQ", 4, 77), 0)
        async with asyncio.timeout(30):
            while not device.statistics:  # noqa: ASYNC110
                await asyncio.sleep(0.002)
        await running.pause()
        await running.queues[2].answer()
        await running.go_on()
        device.set_target(1 << 20)
        assert running.back_end.config == struct.pack("<IIII", 256, 0, 0, 0)
        running.back_end.write_config(4, struct.pack("<I", 256))
        assert device.size == 1 << 20


async def test_sockets(tmp_path: Path) -> None:
    async with machine(Vsock(str(tmp_path / "v"))) as running:
        request = struct.pack("<QQIIIHHIII", 3, 2, 1000, 53, 0, 1, 1, 0, 4096, 0)
        for step in (running.pause, running.reset, None):
            running.queues[1].post(request, 0)
            running.queues[0].post(b"", 100)
            assert (await running.queues[0].answer())[28:32] == b"\1\0\3\0"  # A stream, RST.
            await running.queues[1].answer()
            if step is not None:
                await step()
                if step == running.pause:
                    await running.go_on()
    assert not (tmp_path / "v").exists()


async def test_a_machine_has_what_its_configuration_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = program(tmp_path, RUST)
    monkeypatch.setenv(filesystem.ENVIRONMENT, str(path))
    config = MachineConfig(
        kernel="k",
        console_device="virtio",
        balloon=True,
        vsock=str(tmp_path / "v"),
        shares=(ShareConfig(directory=str(tmp_path), tag="data"),),
    )
    async with contextlib.AsyncExitStack() as stack:
        found = [pair async for pair in back_ends(config, "vm1", ConsoleTerminal(), stack)]
        kinds = {name: DeviceType(back_end.device_id) for name, back_end in found}
        assert kinds == {
            "console": DeviceType.CONSOLE,
            "rng": DeviceType.ENTROPY,
            "balloon": DeviceType.BALLOON,
            "vsock": DeviceType.VSOCK,
            "share0": DeviceType.FS,
        }
        assert found[-1][1].config.rstrip(b"\0") == b"data".ljust(36, b"\0") + b"\1"
    assert not (tmp_path / "v").exists()


async def test_a_share_that_cannot_be(tmp_path: Path) -> None:
    config = MachineConfig(kernel="k", rng=False, shares=(ShareConfig(directory=str(tmp_path / "absent")),))
    async with contextlib.AsyncExitStack() as stack:
        with pytest.raises(MachineError, match="is no directory that could be shared"):
            [pair async for pair in back_ends(config, "vm1", ConsoleTerminal(), stack)]
