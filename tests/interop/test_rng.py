"""A device in Python, examples/rng.py, is a guest's source of entropy: Debian's virtio_rng driver reads from it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.guest_image import GuestImage
from interop.peer_process import PeerProcess
from interop.qemu import Guest

EXAMPLE = Path(__file__).parents[2] / "examples" / "rng.py"
READ = "dd if=/dev/hwrng bs=1024 count=4 iflag=fullblock 2>/dev/null | sha256sum"


@dataclass(frozen=True)
class EntropyDevice:
    """QEMU's vhost-user-rng-pci, connected to `socket`."""

    socket: Path
    packed: bool = False

    def arguments(self, index: int) -> list[str]:
        packed = "on" if self.packed else "off"
        return [
            "-chardev", f"socket,id=r{index},path={self.socket}",
            "-device", f"vhost-user-rng-pci,chardev=r{index},packed={packed}",
        ]  # fmt: skip


@pytest.fixture
def socket(directory: Path) -> Path:
    return directory / "rng.sock"


def entropy_process(directory: Path, socket: Path) -> PeerProcess:
    process = PeerProcess("rng", [sys.executable, EXAMPLE, socket], directory / "rng.log")
    process.wait_for(socket.exists, "its socket")
    return process


@pytest.fixture
def rng(directory: Path, socket: Path) -> Iterator[PeerProcess]:
    process = entropy_process(directory, socket)
    yield process
    process.stop()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_guest_reads_entropy(
    directory: Path, image: GuestImage, socket: Path, rng: PeerProcess, packed: bool
) -> None:
    with Guest("vm", image, directory, (EntropyDevice(socket, packed),)) as guest:
        assert guest.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
        assert guest.run(READ) != guest.run(READ)
        guest.reset()
        assert len(guest.run(READ).split()[0]) == 64


def test_a_driver_is_taken_and_given_back(directory: Path, image: GuestImage, socket: Path, rng: PeerProcess) -> None:
    with Guest("vm", image, directory, (EntropyDevice(socket),)) as guest:
        driver = "/sys/bus/virtio/drivers/virtio_rng"
        device = guest.run(f"basename {driver}/virtio*").strip()
        for _ in range(3):
            guest.run(f"echo {device} >{driver}/unbind; echo {device} >{driver}/bind")
            assert len(guest.run(READ).split()[0]) == 64


def test_the_next_guest_is_served_after_one_was_killed(
    directory: Path, image: GuestImage, socket: Path, rng: PeerProcess
) -> None:
    with Guest("first", image, directory, (EntropyDevice(socket),)) as guest:
        guest.run(READ)
        guest.kill()
    with Guest("second", image, directory, (EntropyDevice(socket),)) as guest:
        assert len(guest.run(READ).split()[0]) == 64
