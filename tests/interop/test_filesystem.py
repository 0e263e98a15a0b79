"""A directory of the host in a guest: virtiofsd started by us, Linux's virtiofs under QEMU's vhost-user-fs-pci."""

from __future__ import annotations

import asyncio
import hashlib
import os
import struct
from contextlib import AsyncExitStack
from pathlib import Path

from interop.device_process import VhostUser
from interop.guest_image import GuestImage
from interop.qemu import Guest
from viaduct._core import DriverQueue
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.devices.filesystem import Virtiofsd
from viaduct.vhost_user import Vring
from viaduct.virtio import DeviceFeature
from viaduct.vmm.config import MachineConfig, ShareConfig
from viaduct.vmm.ram import Ram
from viaduct.vmm.virtio_devices import back_ends


async def test_a_guest_reads_and_writes_a_directory(directory: Path, device_image: GuestImage) -> None:
    shared = directory / "shared"
    shared.mkdir()
    data = os.urandom(3 << 20)
    (shared / "from host").write_bytes(data)
    async with Virtiofsd(shared, directory / "fs.sock") as share:
        device = VhostUser("vhost-user-fs-pci", directory / "fs.sock", {"tag": "data", "queue-size": "128"})
        guest = Guest("vm", device_image, directory, (device,))
        await asyncio.to_thread(guest.start)
        try:
            await asyncio.to_thread(guest.wait_ready)
            script = (
                "mkdir -p /mnt; mount -t virtiofs data /mnt && sha256sum <'/mnt/from host' && "
                "dd if=/dev/urandom of=/mnt/back bs=1M count=2 2>/dev/null && sha256sum </mnt/back && umount /mnt"
            )
            there, back = (line.split()[0] for line in (await asyncio.to_thread(guest.run, script)).splitlines())
        finally:
            await asyncio.to_thread(guest.stop)
        assert there == hashlib.sha256(data).hexdigest()
        assert back == hashlib.sha256((shared / "back").read_bytes()).hexdigest()
        assert share.socket.exists()
    assert not (directory / "fs.sock").exists()


async def test_a_machine_reaches_a_directory(directory: Path) -> None:
    """What `--share` gives a guest: virtiofsd answers the first request of its filesystem, FUSE_INIT."""
    config = MachineConfig(kernel="k", rng=False, shares=(ShareConfig(directory=str(directory), tag="data"),))
    async with AsyncExitStack() as stack:
        found = [pair async for pair in back_ends(config, "vm", ConsoleTerminal(), stack)]
        (_, back_end) = found[0]
        ram = Ram(1 << 20)
        stack.callback(ram.close)
        await back_end.open(ram)
        stack.push_async_callback(back_end.close)
        kicks = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]
        for fd in kicks:
            stack.callback(os.close, fd)
        places = [(0x1000 * (1 + 4 * index), 0x1000 * (2 + 4 * index), 0x1000 * (3 + 4 * index)) for index in range(2)]
        drivers = [
            DriverQueue(
                ram.memory, layout="split", size=16, descriptor_addr=at[0], driver_addr=at[1], device_addr=at[2]
            )
            for at in places
        ]
        vrings = [Vring(index, 16, *places[index], 0, kicks[2 * index], kicks[2 * index + 1], None) for index in (0, 1)]
        await back_end.activate(int(DeviceFeature.VERSION_1), vrings)
        ram.memory.write(
            0x20000, struct.pack("<IIQQIIII", 56, 26, 1, 1, 0, 0, 0, 0) + struct.pack("<IIII", 7, 31, 0, 0)
        )
        assert drivers[1].add([(0x20000, 56)], [(0x21000, 200)], 1)
        drivers[1].kick()
        os.eventfd_write(kicks[2], 1)
        async with asyncio.timeout(60):
            while (taken := drivers[1].take()) is None:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        size, error, unique, major = struct.unpack("<IiQI", ram.memory.read(0x21000, 20))
        assert (size, error, unique, major) == (taken[1], 0, 1, 7)
        await back_end.deactivate()
