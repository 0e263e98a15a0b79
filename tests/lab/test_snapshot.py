"""A machine of ours is kept in the middle of a TCP stream over the switch, ended, restored, and the stream goes on."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from interop.peer_process import wait_until

from lab.guest import Guest, viaduct_guest
from lab.network import Network

pytestmark = pytest.mark.lab

PORT = 5001


def configure(guest: Guest, address: str) -> None:
    """Give the guest's only card an address."""
    guest.run(f"ip link set eth0 up && ip addr add {address}/24 dev eth0")


def moved(guest: Guest) -> int:
    """Bytes that the guest's card has received."""
    return int(guest.run("cat /sys/class/net/eth0/statistics/rx_bytes"))


def test_a_restored_guest_continues_its_stream(tmp_path: Path) -> None:
    """Every byte is checked by the receiver, which is the one that is kept; its files and its disk go on."""
    disk = tmp_path / "disk.img"
    disk.write_bytes(bytes(4 << 20))
    with (
        Network(tmp_path, ["near", "far"]) as network,
        viaduct_guest("far", tmp_path, "--nic", f"vhost-user:{network.socket('far')}") as far,
    ):
        near_nic = f"vhost-user:{network.socket('near')}"
        with viaduct_guest("near", tmp_path, "--nic", near_nic, "--disk", str(disk)) as near:
            configure(far, "10.0.0.2")
            configure(near, "10.0.0.1")
            near.run("echo kept >/tmp/mark; dd if=/dev/urandom of=/dev/vda bs=4096 count=64 oflag=direct 2>/dev/null")
            before = near.run("dd if=/dev/vda bs=4096 count=64 iflag=direct 2>/dev/null | sha256sum")
            near.run(f"transfer serve {PORT} >/tmp/serve.log 2>&1 &")
            wait_until(lambda: f":{PORT:04X} " in near.run("cat /proc/net/tcp6"), "near listens")
            far.run(f"(transfer pump 10.0.0.1 {PORT} /tmp/enough 64; echo status $?) >/tmp/pump.log 2>&1 &")
            start = moved(near)
            wait_until(lambda: moved(near) > start + (1 << 20), "the stream flows")
            kept = tmp_path / "kept"
            subprocess.run(["viaduct", "vm", "snapshot", "near", str(kept), "--stop"], check=True)
            near.ended()
        restore = ["viaduct", "vm", "restore", str(kept), "--console", f"socket:{tmp_path / 'near.console'}"]
        again = Guest("near", restore, tmp_path)
        again.start()
        try:
            assert again.run("cat /tmp/mark").strip() == "kept"
            start = moved(again)
            wait_until(lambda: moved(again) > start + (1 << 20), "the stream flows again")
            far.run("touch /tmp/enough")
            wait_until(lambda: "status" in far.run("cat /tmp/pump.log"), "the stream ends")
            assert "status 0" in far.run("cat /tmp/pump.log"), far.run("cat /tmp/pump.log")
            assert again.run("dd if=/dev/vda bs=4096 count=64 iflag=direct 2>/dev/null | sha256sum") == before
            assert again.power_off() == 0
        finally:
            again.stop()
