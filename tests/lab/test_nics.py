"""Two machines exchange a TCP stream with every byte checked, over the switch, by each way that a card may go."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from interop.peer_process import wait_until

from lab.guest import Guest, viaduct_guest
from lab.network import Network

pytestmark = pytest.mark.lab

PATHS = {
    "vhost-user": ("vhost-user:{near}", "virtio_net"),
    "switch": ("switch:made-for-it", "virtio_net"),
    "tap": ("tap:tap0", "virtio_net"),
    "tap, vhost-net": ("tap:tap1,path=vhost", "virtio_net"),
    "emulated": ("vhost-user:{near},path=emulated", "e1000"),
    "tap, emulated": ("tap:tap2,path=emulated", "e1000"),
}
"""`--nic` of the machine under test, and the driver its card gets."""
MEBIBYTES = 4
PORT = 5001


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Network]:
    """A switch with a port for each of two machines, and interfaces beside it."""
    with Network(tmp_path_factory.mktemp("network"), ["near", "far"], ["tap0", "tap1", "tap2"]) as network:
        yield network


@pytest.fixture(scope="module")
def far(network: Network, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guest]:
    """The machine at the other end, always the same."""
    nic = f"vhost-user:{network.socket('far')}"
    with viaduct_guest("far", tmp_path_factory.mktemp("far"), "--nic", nic) as guest:
        configure(guest, "10.0.0.2")
        yield guest


def configure(guest: Guest, address: str) -> None:
    """Give the guest's only card an address, and serve transfers there."""
    guest.run(f"ip link set eth0 up && ip addr add {address}/24 dev eth0")
    guest.run(f"transfer serve {PORT} >/tmp/serve.log 2>&1 &")
    wait_until(lambda: f":{PORT:04X} " in guest.run("cat /proc/net/tcp6"), f"{guest.name} listens")


@pytest.mark.parametrize("path", PATHS)
def test_checked_stream_both_ways(path: str, network: Network, far: Guest, tmp_path: Path) -> None:
    """With the card's stock driver; the stream's receiver knows what each byte has to be."""
    nic, driver = PATHS[path]
    with viaduct_guest("near", tmp_path, "--nic", nic.format(near=network.socket("near"))) as near:
        bound = near.run("basename $(readlink /sys/class/net/eth0/device/driver)").strip()
        assert bound == driver
        configure(near, "10.0.0.1")
        wait_until(lambda: near.ask("ping -c 1 -W 1 10.0.0.2")[0] == 0, "a ping is answered")
        near.run(f"transfer send 10.0.0.2 {PORT} {MEBIBYTES} 2")
        far.run(f"transfer send 10.0.0.1 {PORT} {MEBIBYTES} 2")


@pytest.mark.parametrize("nic", ["switch:several,queues=2", "tap:tap3,queues=2", "tap:tap4,path=vhost,queues=2"])
def test_two_pairs_of_queues(nic: str, network: Network, far: Guest, tmp_path: Path) -> None:
    """Linux asks for both by the control queue, gives each processor one to send by, and is answered by either."""
    with viaduct_guest("pairs", tmp_path, "--cpus", "2", "--nic", nic) as guest:
        queues = guest.run("cd /sys/class/net/eth0/queues; ls -d rx-* tx-*").split()
        assert queues == ["rx-0", "rx-1", "tx-0", "tx-1"], "as many as the device has granted"
        guest.run("ip link set eth0 up && ip addr add 10.0.1.1/24 dev eth0")
        peer = "10.0.1.2"
        if nic.startswith("tap:"):
            ifname = nic.removeprefix("tap:").partition(",")[0]
            subprocess.run(["ip", "addr", "add", f"{peer}/24", "dev", ifname], check=True)
        else:
            far.run(f"ip addr add {peer}/24 dev eth0")
        wait_until(lambda: guest.ask(f"ping -c 1 -W 1 {peer}")[0] == 0, "a ping is answered")
        assert guest.run("cd /sys/class/net/eth0/queues; cat tx-0/xps_cpus tx-1/xps_cpus").split() == ["1", "2"]
        for processor in (1, 2):
            guest.run(f"taskset {processor} ping -c 3 -i 0.2 -W 5 {peer}")
        assert guest.power_off() == 0
