"""Debian's stock kernel reaches its shell by every way of booting, with one vCPU and several."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.guest import viaduct_guest

pytestmark = pytest.mark.lab

COMPLAINTS = (
    "dmesg | grep -iE '(acpi|pci|apic|mp-?bios|mptable|pnp).*(error|warning|bug|fatal|invalid|fail)' | grep -v nocrs"
)
"""One line of Linux says with each PCI bus how bugs are to be reported (pci=nocrs)."""


@pytest.mark.parametrize("cpus", [1, 4])
@pytest.mark.parametrize(
    ("boot", "kernel"), [("bzimage", "bzImage"), ("pvh", "vmlinux"), ("linux", "vmlinux")], ids=lambda value: str(value)
)
def test_stock_kernel_reaches_its_shell(boot: str, kernel: str, cpus: int, tmp_path: Path) -> None:
    options = ("--boot", boot, "--cpus", str(cpus))
    with viaduct_guest("guest", tmp_path, *options, kernel=kernel, append="some=thing") as guest:
        assert int(guest.run("nproc")) == cpus
        assert guest.run("cat /proc/cmdline").rstrip().endswith("some=thing")
        assert guest.ask(COMPLAINTS) == (1, "")
        assert guest.power_off() == 0


def test_kernel_without_acpi_finds_its_vcpus_by_the_mp_tables(tmp_path: Path) -> None:
    """And its interrupts: the console is one that needs them."""
    options = ("--boot", "bzimage", "--cpus", "4", "--transport", "mmio")
    with viaduct_guest("guest", tmp_path, *options, kernel="bzImage", append="acpi=off") as guest:
        assert int(guest.run("nproc")) == 4
        guest.run("dmesg | grep 'Intel MultiProcessor Specification v1.4'")


def test_virtio_mmio_devices_are_found_by_acpi(tmp_path: Path) -> None:
    """The random number generator, which every machine has, at the place that the DSDT says."""
    with viaduct_guest("guest", tmp_path, "--transport", "mmio") as guest:
        guest.run("ls -d /sys/bus/acpi/devices/LNRO0005:00 /sys/bus/platform/devices/LNRO0005:00/virtio0")
        assert guest.power_off() == 0
