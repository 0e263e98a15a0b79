"""A network namespace of the host's kernel reaches a QEMU guest through the switch and its tap port."""

from __future__ import annotations

import functools
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.back_end import PortSpec
from interop.guest_image import TRANSFER, GuestImage
from interop.network_namespace import NetworkNamespace
from interop.peer_process import require, wait_until
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

MEBIBYTES = 64
# Links of the guest: all offloads on split rings; none of its own on packed rings.
NOTHING = ("csum", "gso", "guest_csum", "guest_tso4", "guest_tso6", "guest_ufo", "guest_ecn")


@dataclass
class Site:
    """A namespace with two tap interfaces, a guest with two links, and the switch between them."""

    namespace: NetworkNamespace
    guest: Guest
    transfer: Path

    def from_namespace(self, *words: str) -> str:
        return self.namespace.run([str(self.transfer), *words])


@pytest.fixture(scope="module")
def site(module_directory: Path, image: GuestImage, viaduct_only: None) -> Iterator[Site]:
    transfer = module_directory / "transfer"
    subprocess.run([require("gcc", "gcc libc6-dev"), "-O2", "-o", str(transfer), str(TRANSFER)], check=True)
    nics = (
        Nic(module_directory / "0.sock", "02:56:00:00:30:01"),
        Nic(module_directory / "1.sock", "02:56:00:00:31:01", packed=True, off=NOTHING),
    )
    ports = [PortSpec(f"guest{link}", nic.socket, link) for link, nic in enumerate(nics)]
    # The switch runs in the namespace and makes the interfaces there: one with a queue, one with two.
    taps = ["tap0=tap:viatap0,vlan=100", "tap1=tap:viatap1,queues=2,vlan=101"]
    guest = Guest("guest", image, module_directory, nics)
    with NetworkNamespace() as namespace:
        switch = ViaductSwitch(module_directory, ports, taps, launcher=namespace.enter)
        try:
            switch.start()
            for link in range(len(nics)):
                interface = f"viatap{link}"
                namespace.run(["ip", "addr", "add", f"10.0.{link}.1/24", "dev", interface])
                namespace.run(["ip", "addr", "add", f"fd00:{link}::1/64", "dev", interface, "nodad"])
                namespace.run(["ip", "link", "set", interface, "up"])
            with guest:
                for link in range(len(nics)):
                    guest.configure(link, f"10.0.{link}.2/24", f"fd00:{link}::2/64")
                guest.serve_transfers()
                yield Site(namespace, guest, transfer)
            switch.stop()
            assert "viatap" not in namespace.run(["ip", "link"]), "the switch left its tap interfaces behind"
        finally:
            switch.kill()


links = pytest.mark.parametrize("link", range(2), ids=["split", "packed-no-offloads"])


def answered(site: Site, ping: list[str]) -> bool:
    """Whether one ping from the namespace is answered."""
    return "1 packets received" in site.namespace.run(ping)


@links
def test_namespace_pings_guest(site: Site, link: int) -> None:
    for address in (f"10.0.{link}.2", f"fd00:{link}::2"):
        # A guest does not answer for an address before it has seen that nobody else has it (RFC 4862, 5.4).
        once = ["sh", "-c", f"busybox ping -c 1 -W 1 {address} || true"]
        wait_until(functools.partial(answered, site, once), f"{address} answers")
        output = site.namespace.run(["busybox", "ping", "-c", "5", "-i", "0.2", "-W", "10", address])
        assert "5 packets received" in output
    site.guest.ping(f"10.0.{link}.1", count=5)


@links
def test_checked_transfer_each_way(site: Site, link: int) -> None:
    site.from_namespace("send", f"10.0.{link}.2", "5001", str(MEBIBYTES), "4")
    site.from_namespace("send", f"fd00:{link}::2", "5001", "16", "1")
    with site.namespace.spawn([str(site.transfer), "serve", "5001"]):
        site.guest.send_transfer(f"10.0.{link}.1", MEBIBYTES, flows=4)
        site.guest.send_transfer(f"fd00:{link}::1", 16)
        site.guest.echo_datagrams(f"10.0.{link}.1", 10, 1400)
    site.from_namespace("echo", f"10.0.{link}.2", "5001", "10", "1400")
    assert site.guest.checksum_errors() == 0
