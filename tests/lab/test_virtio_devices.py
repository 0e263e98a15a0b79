"""Linux's own drivers in a machine of ours: entropy, sockets, a balloon, a console, by either transport."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path

import pytest

from lab.guest import PATIENCE, Guest, viaduct_guest

pytestmark = pytest.mark.lab

DRIVERS = "/sys/bus/virtio/drivers"
MEBIBYTE = 1 << 20


def resident(guest: Guest) -> int:
    """Bytes of the guest's memory that are there."""
    assert guest.process is not None
    maps = Path(f"/proc/{guest.process.pid}/smaps").read_text()
    return sum(int(size) << 10 for size in re.findall(r"/memfd:.*?^Rss: +(\d+) kB", maps, re.M | re.S))


@pytest.mark.parametrize("transport", ["pci", "mmio"])
def test_linux_drives_our_devices(tmp_path: Path, transport: str) -> None:
    path = tmp_path / "v"
    with viaduct_guest("vm", tmp_path, "--transport", transport, "--vsock", str(path), "--balloon") as guest:
        assert guest.run("cat /sys/class/misc/hw_random/rng_current").startswith("virtio_rng")
        read = "dd if=/dev/hwrng bs=64 count=16 iflag=fullblock 2>/dev/null | sha256sum"
        assert guest.run(read) != guest.run(read)
        for driver in ("virtio_balloon", "vmw_vsock_virtio_transport"):
            assert "virtio" in guest.run(f"ls -d {DRIVERS}/{driver}/virtio*")
        # Nobody listens in the guest: its kernel says so, by both queues.
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(PATIENCE)
            sock.connect(str(path))
            sock.sendall(b"CONNECT 1024\n")
            assert sock.recv(100) == b""
        # What the guest has used and freed comes back, by free page reports.
        guest.run("dd if=/dev/zero of=/tmp/fill bs=1M count=120 2>/dev/null; rm /tmp/fill")
        end = time.monotonic() + PATIENCE
        while resident(guest) > 130 * MEBIBYTE:
            assert time.monotonic() < end, f"{resident(guest)} bytes of the guest's memory are still there"
            time.sleep(0.5)


def test_the_console_is_a_virtio_device(tmp_path: Path) -> None:
    with viaduct_guest("vm", tmp_path, "--console-device", "virtio", append="console=hvc0") as guest:
        assert "hvc0" in guest.run("cat /sys/class/tty/console/active")
        assert guest.run("seq 3000").endswith("2999\n3000\n")
