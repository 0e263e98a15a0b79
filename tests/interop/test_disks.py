"""Debian's virtio_blk driver uses our disks in QEMU: every layout, format and mode; what it made durable stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from interop.disk import BLOCK, DiskServer, VirtioDisk, Work, synced
from interop.guest_image import GuestImage
from interop.peer_process import require, wait_until
from interop.qemu import Guest

SIZE = 64 << 20
BLOCKS = SIZE // BLOCK


def make_image(path: Path) -> Path:
    """A disk of `SIZE` bytes, in the format that its name says."""
    if path.suffix == ".qcow2":
        tool = require("qemu-img", "qemu-utils")
        subprocess.run([tool, "create", "-q", "-f", "qcow2", path, str(SIZE)], check=True)
    else:
        path.touch()
        os.truncate(path, SIZE)
    return path


def check_image(path: Path) -> None:
    """Raises if QEMU finds a qcow2 image damaged. Leaks, space that nobody uses, are what a kill may leave."""
    if path.suffix == ".qcow2":
        done = subprocess.run(["qemu-img", "check", path], capture_output=True, text=True)
        assert done.returncode in (0, 3), done.stdout + done.stderr


def changed(path: Path, before: int) -> bool:
    """Whether somebody has written to a file since its time was `before`."""
    return path.stat().st_mtime_ns != before


def has_synced(guest: Guest, number: int) -> bool:
    """Whether a guest has reported that so many writes are durable."""
    return synced(guest) >= number


@pytest.fixture
def serve(directory: Path) -> Iterator[Callable[..., DiskServer]]:
    """Starts a back-end for a new image, and ends it."""
    servers = []

    def start(name: str, *options: str) -> DiskServer:
        server = DiskServer(make_image(directory / name), directory, options)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_formats_writes_and_verifies(
    directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer], name: str, packed: bool
) -> None:
    server = serve(name, "--serial", "viaduct-7")
    work = Work(seed=1, first=0, blocks=1024, count=1500)
    with Guest("vm", device_image, directory, (VirtioDisk(server.socket, packed),)) as guest:
        assert guest.run("cat /sys/block/vda/size").strip() == str(SIZE // 512)
        assert guest.run("cat /sys/block/vda/serial").strip() == "viaduct-7"
        assert guest.run("cat /sys/block/vda/cache_type").strip() == "write back"
        guest.run(work.write())
        guest.run(work.verify())
        guest.run("blkdiscard -o 0 -l 2097152 /dev/vda && disk_work is /dev/vda 0 512 0")
        guest.run(
            "set -e; mke2fs -F /dev/vda; mkdir /mnt; mount -t ext4 /dev/vda /mnt;"
            "dd if=/dev/urandom of=/mnt/file bs=1M count=8;"
            "sha256sum /mnt/file >/mnt/sum; umount /mnt; echo 3 >/proc/sys/vm/drop_caches;"
            "mount -t ext4 /dev/vda /mnt; sha256sum -c /mnt/sum; umount /mnt"
        )
        guest.reset()
        guest.run("mkdir /mnt; mount -t ext4 -o ro /dev/vda /mnt && sha256sum -c /mnt/sum")
    server.stop()
    check_image(server.image)


def test_every_queue_works(directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer]) -> None:
    server = serve("disk.img")
    disk = VirtioDisk(server.socket, options=("num-queues=2", "queue-size=64"))
    works = [Work(seed, 2048 * seed, 2048, 1000) for seed in range(4)]
    with Guest("vm", device_image, directory, (disk,), processors=2) as guest:
        assert guest.run("ls /sys/block/vda/mq").split() == ["0", "1"]
        writers = "\n".join(f"taskset {1 + seed % 2} {work.write()} &" for seed, work in enumerate(works))
        guest.run(f"{writers}\nwait")
        for work in works:
            guest.run(work.verify())


def test_a_read_only_disk(directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer]) -> None:
    server = serve("disk.img", "--read-only")
    with Guest("vm", device_image, directory, (VirtioDisk(server.socket),)) as guest:
        assert guest.run("cat /sys/block/vda/ro").strip() == "1"
        assert guest.ask("dd if=/dev/zero of=/dev/vda bs=4096 count=1 conv=fsync").status != 0
        guest.run("disk_work is /dev/vda 0 64 0")


def test_a_driver_chooses_write_through(
    directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer]
) -> None:
    server = serve("disk.img")
    with Guest("vm", device_image, directory, (VirtioDisk(server.socket),)) as guest:
        guest.run("echo 'write through' >/sys/block/vda/cache_type")
        assert guest.run("cat /sys/block/vda/cache_type").strip() == "write through"
        work = Work(seed=3, first=0, blocks=256, count=300)
        guest.run(work.write())
        guest.run(work.verify())
        guest.run("echo 'write back' >/sys/block/vda/cache_type")


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_the_guest_does_not_notice_that_the_back_end_is_killed(
    directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer], name: str, packed: bool
) -> None:
    server = serve(name)
    works = [Work(seed, 4096 * seed, 4096, 1500) for seed in range(2)]
    with Guest("vm", device_image, directory, (VirtioDisk(server.socket, packed),)) as guest:
        writers = "\n".join(f"{work.write()} &" for work in works)
        guest.run(f"({writers}\nwait; touch /tmp/done) >/tmp/errors 2>&1 &")
        for _ in range(4):
            before = server.image.stat().st_mtime_ns
            wait_until(partial(changed, server.image, before), "writes go on")
            server.restart()
        wait_until(lambda: guest.ask("test -e /tmp/done").status == 0, "all is written", 200)
        assert guest.run("cat /tmp/errors") == ""
        for work in works:
            guest.run(work.verify())
    server.stop()
    check_image(server.image)


@pytest.mark.parametrize("name", ["disk.img", "disk.qcow2"])
@pytest.mark.parametrize("victim", ["guest", "both"])
def test_what_was_made_durable_is_there_after_a_kill(
    directory: Path, device_image: GuestImage, serve: Callable[..., DiskServer], name: str, victim: str
) -> None:
    server = serve(name)
    for seed in range(1, 3):
        work = Work(seed, first=8192 * (seed - 1), blocks=2048, count=1_000_000)
        with Guest(f"vm{seed}", device_image, directory, (VirtioDisk(server.socket),)) as guest:
            guest.run(f"{work.write(10, '/dev/ttyS0')} >/dev/null 2>&1 &")
            wait_until(partial(has_synced, guest, 200), "writes are made durable")
            guest.kill()
            known = synced(guest)
        if victim == "both":
            server.restart()
        with Guest(f"look{seed}", device_image, directory, (VirtioDisk(server.socket),)) as guest:
            guest.run(work.verify(known))
    server.stop()
    check_image(server.image)
