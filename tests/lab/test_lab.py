"""The lab is the computer that the other tests here count on."""

from __future__ import annotations

import fcntl
import os
import subprocess
from pathlib import Path

import pytest

from lab.guest import BOOT, microvm_guest

pytestmark = pytest.mark.lab

KVM_GET_API_VERSION = 0xAE00
KVM_API_VERSION = 12


def test_kvm_answers() -> None:
    """The kernel's interface to hardware virtualization is there, in its one version."""
    with open("/dev/kvm", "rb") as kvm:
        assert fcntl.ioctl(kvm, KVM_GET_API_VERSION) == KVM_API_VERSION


@pytest.mark.parametrize("device", ["vhost-net", "vhost-vsock", "net/tun"])
def test_devices_of_the_host_kernel_are_there(device: str) -> None:
    """They open, so their drivers are loaded."""
    os.close(os.open(f"/dev/{device}", os.O_RDWR))


def test_viaduct_runs_at_the_first_command() -> None:
    """The package is this checkout's, and its dependencies are there."""
    done = subprocess.run(["viaduct", "switch", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    import viaduct

    assert viaduct.__file__.startswith("/viaduct/python/")


def test_iommu_separates_devices() -> None:
    """Device assignment needs groups, which only an active IOMMU makes."""
    assert len(list(Path("/sys/kernel/iommu_groups").iterdir())) > 1


def test_card_has_virtual_functions() -> None:
    """The SR-IOV card's driver loads, and its functions appear and go."""
    subprocess.run(["modprobe", "igb"], check=True)
    functions = Path("/sys/bus/pci/devices/0000:01:00.0/sriov_numvfs")
    try:
        functions.write_text("2")
        assert len(list(functions.parent.glob("virtfn*"))) == 2
    finally:
        functions.write_text("0")
        subprocess.run(["modprobe", "-r", "igb"], check=True)


def test_huge_pages_can_be_reserved() -> None:
    """As on any host; 2 MiB each."""
    count = Path("/proc/sys/vm/nr_hugepages")
    try:
        count.write_text("32")
        assert int(count.read_text()) == 32
    finally:
        count.write_text("0")


@pytest.mark.parametrize("kernel", ["vmlinux", "bzImage"])
def test_stock_kernel_boots_in_microvm(kernel: str, tmp_path: Path) -> None:
    """QEMU boots the guests' kernel to their shell by hardware virtualization, so this is possible here."""
    with microvm_guest("reference", tmp_path, kernel=kernel) as guest:
        assert guest.run("uname -r") == (BOOT / "version").read_text() + "\n"
        assert guest.power_off() == 0
