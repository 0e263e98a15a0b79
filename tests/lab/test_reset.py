"""A guest restarts its machine, by each way that Linux knows: the same process around it, another boot inside."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from interop.peer_process import wait_until

from lab.guest import Guest, viaduct_guest

pytestmark = pytest.mark.lab

WAYS = {
    "its own choice": "",
    "triple fault": "reboot=t",
    "keyboard controller": "reboot=k",
    "ACPI": "reboot=a",
    "reset control": "reboot=p",
}
"""Arguments of the guest's kernel."""
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"


def machine(way: str, directory: Path, *options: str) -> Guest:
    """A machine whose guest restarts it in this way."""
    guest = viaduct_guest("again", directory, *options)
    guest.command = [word.replace("reboot=t", WAYS[way]) for word in guest.command]
    return guest


@pytest.mark.parametrize("way", WAYS)
def test_guest_restarts_its_machine(way: str, tmp_path: Path) -> None:
    """It is there again, and the machine's disk with what it wrote."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    with machine(way, tmp_path, "--disk", str(disk), "--on-reset", "restart") as guest:
        before = guest.run(f"{BOOT_ID}; echo it stays | dd of=/dev/vda conv=fsync,notrunc 2>/dev/null")
        guest.send("reboot -f")
        guest.wait_ready()
        assert guest.run(BOOT_ID) != before
        assert guest.run("head -n 1 /dev/vda").strip() == "it stays"
        assert guest.power_off() == 0


@pytest.mark.parametrize("way", ["its own choice", "triple fault"])
def test_restart_ends_a_machine_that_is_to_stop_then(way: str, tmp_path: Path) -> None:
    with machine(way, tmp_path, "--on-reset", "stop") as guest:
        guest.send("reboot -f")
        assert guest.ended() == 0


def test_a_guest_hears_of_its_power_button(tmp_path: Path) -> None:
    """By Linux's driver of generic event devices, which is in every kernel with ACPI."""
    with viaduct_guest("pressed", tmp_path) as guest:

        def presses() -> int:
            return int(guest.run("grep 'ACPI:Ged' /proc/interrupts").split()[1])

        assert presses() == 0
        guest.run("grep -l PNP0C0C /sys/bus/acpi/devices/*/hid")
        subprocess.run(["viaduct", "vm", "shutdown", "pressed"], check=True)
        wait_until(lambda: presses() == 1, "the interrupt is counted")
        subprocess.run(["viaduct", "vm", "shutdown", "pressed"], check=True)
        wait_until(lambda: presses() == 2, "and the next one")
        assert guest.power_off() == 0
