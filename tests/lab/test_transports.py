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


@pytest.mark.parametrize(
    ("options", "append", "sees"),
    [
        (["--transitional"], "virtio_pci.force_legacy=1", "grep -l 0x1001 /sys/bus/pci/devices/*/device"),
        (["--port-notify"], "", "grep -l 0x1042 /sys/bus/pci/devices/*/device"),
        (["--interrupts", "split"], "", "grep IO-APIC /proc/interrupts"),
    ],
    ids=["legacy driver", "ports", "split interrupts"],
)
def test_disks_are_read_and_written_by_each_way(options: list[str], append: str, sees: str, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(range(256)) * 4096)
    with viaduct_guest("ways", tmp_path, *options, "--disk", str(disk), append=append) as guest:
        guest.run(sees)
        assert guest.run("head -c 512 /dev/vda | od -An -v -tu1").split() == [str(n) for n in [*range(256)] * 2]
        guest.run("dd if=/dev/vda of=/dev/vda bs=1000 count=60 skip=1 seek=600 conv=fsync,notrunc 2>/dev/null")
        if append:
            features = guest.run("cat /sys/bus/virtio/drivers/virtio_blk/virtio*/features").split()[0]
            assert features[32] == "0", "VERSION_1 is not for drivers of before"
        assert guest.power_off() == 0
    written = disk.read_bytes()
    assert written[600_000:660_000] == written[1000:61_000]
