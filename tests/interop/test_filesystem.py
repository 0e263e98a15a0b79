"""A directory of the host in a guest: virtiofsd started by us, Linux's virtiofs under QEMU's vhost-user-fs-pci."""

from __future__ import annotations

import asyncio
import hashlib
import os
from pathlib import Path

from interop.device_process import VhostUser
from interop.guest_image import GuestImage
from interop.qemu import Guest
from viaduct.devices.filesystem import Virtiofsd


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
