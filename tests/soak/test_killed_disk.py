"""The back-end of a disk is killed while a guest writes, over and over: the guest does not notice, nothing is lost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from interop.conftest import device_image
from interop.disk import DiskServer, VirtioDisk, Work
from interop.guest_image import GuestImage
from interop.peer_process import wait_until
from interop.qemu import Guest
from interop.test_disks import check_image, make_image

from soak.conftest import Soak

__all__ = ["device_image"]

PAUSE = 1.5
"""Seconds at most between the first write and a kill, and between two."""


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_nothing_is_lost(directory: Path, device_image: GuestImage, soak: Soak, name: str, packed: bool) -> None:
    server = DiskServer(make_image(directory / name), directory)
    kills = 0
    with server, Guest("vm", device_image, directory, (VirtioDisk(server.socket, packed),)) as guest:
        for number in soak.rounds(2, 300):
            works = [Work(2 * number + half, 8192 * half, 1024, 600) for half in range(2)]
            guest.run("dd if=/dev/zero of=/dev/vda bs=1M count=4 2>/dev/null")
            guest.run("dd if=/dev/zero of=/dev/vda bs=1M seek=32 count=4 2>/dev/null; sync; rm -f /tmp/done")
            writers = "\n".join(f"{work.write()} &" for work in works)
            guest.run(f"({writers}\nwait; touch /tmp/done) >/tmp/errors 2>&1 &")
            for _ in range(soak.random.randint(1, 3)):
                time.sleep(soak.random.uniform(0, PAUSE))
                server.restart()
                kills += 1
            wait_until(lambda: guest.ask("test -e /tmp/done", 120).status == 0, "all is written", 300)
            assert guest.run("cat /tmp/errors") == ""
            for work in works:
                guest.run(work.verify())
    check_image(server.image)
    soak.measured("kills of the back-end", kills)
