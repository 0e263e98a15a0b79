"""The balloon under QEMU 10's generic vhost-user front-end: Linux's virtio_balloon gives memory to this host."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from interop.device_process import VhostUser, device_process
from interop.generic_qemu import MODEL, generic_qemu
from interop.guest_image import GuestImage
from interop.peer_process import PeerProcess, wait_until
from interop.qemu import Guest

MEBIBYTE = 1 << 20
PATIENT = 180
"""Seconds for a guest to give up so much memory, a kilobyte of page numbers after the other, on a busy host."""
PROPERTIES = {"virtio-id": "5", "num_vqs": "4", "config_size": "16"}


def resident(guest: Guest) -> int:
    """Bytes of the guest's memory that are there, as QEMU maps them."""
    assert guest.process is not None
    text = Path(f"/proc/{guest.process.pid}/smaps").read_text()
    return sum(
        int(match[1]) << 10
        for match in re.finditer(r"^\S+ \S+ \S+ \S+ \S+ +/memfd:memory-backend.*?^Rss: +(\d+) kB", text, re.M | re.S)
    )


def meminfo(guest: Guest, key: str) -> int:
    """A line of /proc/meminfo, in bytes."""
    return int(guest.run(f"awk '/^{key}:/ {{ print $2 }}' /proc/meminfo")) << 10


@pytest.fixture
def balloon(directory: Path) -> Iterator[PeerProcess]:
    process = device_process("balloon", directory / "s", "--statistics", "1")
    yield process
    process.stop()


@pytest.fixture
def guest(directory: Path, device_image: GuestImage, balloon: PeerProcess) -> Iterator[Guest]:
    device = VhostUser(MODEL, directory / "s", PROPERTIES)
    with Guest("vm", device_image, directory, (device,), memory="512M", qemu=generic_qemu(directory)) as guest:
        yield guest


def use_memory(guest: Guest, mebibytes: int) -> None:
    """Lets the guest write to that much of its memory, and free it."""
    guest.run(f"dd if=/dev/urandom of=/tmp/fill bs=1M count={mebibytes} 2>/dev/null; rm /tmp/fill")


@pytest.mark.timeout(600)
def test_the_host_gets_what_the_guest_gives(guest: Guest, balloon: PeerProcess) -> None:
    for mebibytes in (200, 150):
        use_memory(guest, 100)
        before = meminfo(guest, "MemFree")
        balloon.say(f"{mebibytes}M")
        balloon.wait_for_output(f"has {mebibytes * MEBIBYTE} bytes, gave back", seconds=PATIENT)
        assert meminfo(guest, "MemFree") < before - (mebibytes - 50) * MEBIBYTE
        wait_until(lambda: resident(guest) < 400 * MEBIBYTE, "the pages are the host's")
        balloon.say("0")
        wait_until(lambda: meminfo(guest, "MemFree") > 300 * MEBIBYTE, "the guest has its memory back", PATIENT)
        use_memory(guest, 250)
        if mebibytes == 200:
            guest.reset()


def test_free_pages_are_reported(guest: Guest) -> None:
    use_memory(guest, 250)
    # The driver reports what has been free for two seconds, blocks of 2 MiB and more.
    wait_until(lambda: resident(guest) < 250 * MEBIBYTE, "the free pages are the host's")
    guest.run("dd if=/dev/urandom of=/tmp/a bs=1M count=100 2>/dev/null")
    data = guest.run("sha256sum </tmp/a; sleep 4; sha256sum </tmp/a")
    assert len(set(data.split("\n")[:2])) == 1


def test_statistics(guest: Guest, balloon: PeerProcess) -> None:
    balloon.wait_for_output("total_memory", seconds=PATIENT)
    told = int(re.findall(r"total_memory (\d+)", balloon.output())[-1])
    assert told == meminfo(guest, "MemTotal")
