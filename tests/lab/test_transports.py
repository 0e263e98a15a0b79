"""Linux's own drivers find virtio devices by each transport, and use them."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guest import viaduct_guest

pytestmark = pytest.mark.lab

DRIVERS_OK = 0xF
"""ACKNOWLEDGE, DRIVER, DRIVER_OK and FEATURES_OK (virtio 1.2, 2.1)."""


@pytest.mark.parametrize(("transport", "interrupt"), [("pci", "PCI-MSIX"), ("mmio", "IO-APIC")])
def test_drivers_bind(transport: str, interrupt: str, tmp_path: Path) -> None:
    """The disk reads as what is in its file, the entropy device gives bytes, and both have interrupted for it."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * 4096)
    with viaduct_guest("drivers", tmp_path, "--transport", transport, "--disk", str(disk)) as guest:
        found = {}
        for device in guest.run("ls /sys/bus/virtio/devices").split():
            words = guest.run(f"cd /sys/bus/virtio/devices/{device}; cat status; basename $(readlink driver)").split()
            found[words[1]] = int(words[0], 0)
        assert found == {"virtio_blk": DRIVERS_OK, "virtio_rng": DRIVERS_OK}
        assert guest.run("head -c 512 /dev/vda | od -An -v -tu1").split() == [str(n) for n in [*range(256)] * 2]
        assert guest.run("head -c 16 /dev/hwrng | wc -c").split() == ["16"]
        lines = [line.split() for line in guest.run("grep virtio /proc/interrupts").splitlines()]
        assert lines
        assert all(any(interrupt in word for word in words) for words in lines)
        assert sum(int(words[1]) for words in lines) >= 2
        assert guest.power_off() == 0
