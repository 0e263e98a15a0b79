"""A QEMU guest whose network cards are behind its IOMMU, in strict mode: a buffer is mapped for one frame.

The other guest has no IOMMU. QEMU plays the IOMMU and tells the switch what the guest's kernel maps and takes away.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

IOMMU = "intel-iommu,intremap=on,device-iotlb=on"
STRICT = "intel_iommu=on iommu=nopt iommu.strict=1"
LAYOUTS = ("split", "packed")
MEBIBYTES = 4


@dataclass
class Pair:
    """The guest behind an IOMMU, one without, a link for each ring layout, and the switch between."""

    behind: Guest
    plain: Guest
    switch: ViaductSwitch

    def port(self, name: str) -> Any:
        """What `viaduct port list --json` says of a port."""
        return next(port for port in json.loads(self.switch.ask("port", "list", "--json")) if port["name"] == name)

    def drops(self, name: str) -> dict[str, int]:
        """Frames that a port dropped, by reason."""
        port = next(port for port in self.switch.statistics()["ports"] if port["name"] == name)
        total: dict[str, int] = {}
        for queue in port["queues"]:
            for reason, count in queue["drops"].items():
                total[reason] = total.get(reason, 0) + count
        return total


@pytest.fixture(scope="module")
def pair(module_directory: Path, image: GuestImage, viaduct_only: None) -> Iterator[Pair]:
    ports: list[PortSpec] = []
    behind: list[Nic] = []
    plain: list[Nic] = []
    for link, layout in enumerate(LAYOUTS):
        sockets = [module_directory / f"{name}{link}.sock" for name in ("behind", "plain")]
        behind.append(Nic(sockets[0], f"02:56:00:00:3{link}:01", packed=layout == "packed", iommu=True))
        plain.append(Nic(sockets[1], f"02:56:00:00:3{link}:02"))
        ports += [PortSpec(f"behind{link}", sockets[0], link), PortSpec(f"plain{link}", sockets[1], link)]
    switch = ViaductSwitch(module_directory, ports)
    guests = (
        Guest("behind", image, module_directory, tuple(behind), devices=(IOMMU,), kernel_arguments=STRICT),
        Guest("plain", image, module_directory, tuple(plain)),
    )
    try:
        switch.start()
        for guest in guests:
            guest.start()
        for host, guest in enumerate(guests, 1):
            guest.wait_ready()
            for link in range(len(LAYOUTS)):
                guest.configure(link, f"10.0.{link}.{host}/24")
            guest.serve_transfers()
        yield Pair(*guests, switch)
        for guest in guests:
            guest.stop()
        switch.stop()
    finally:
        for guest in guests:
            guest.kill()
        switch.kill()


links = pytest.mark.parametrize("link", range(len(LAYOUTS)), ids=LAYOUTS)


@links
def test_the_device_is_translated(pair: Pair, link: int) -> None:
    """The guest has put the device into a domain of its own, the switch was told of it, and each frame changes that."""
    device = pair.behind.run(f"cat /sys/class/net/eth{link}/device/../iommu_group/type").strip()
    assert device == "DMA", "strict mode, no pass-through"
    port = pair.port(f"behind{link}")
    assert "ACCESS_PLATFORM" in port["features"]
    assert port["ring"] == LAYOUTS[link]
    pair.behind.wait_ping(f"10.0.{link}.2")
    before = pair.port(f"behind{link}")["iommu"]
    assert before["updates"] > 0
    pair.behind.ping(f"10.0.{link}.2", count=20)
    after = pair.port(f"behind{link}")["iommu"]
    assert after["updates"] > before["updates"]
    assert after["invalidations"] > before["invalidations"]
    assert pair.port(f"plain{link}").get("iommu") is None


@links
def test_checked_transfer_each_way(pair: Pair, link: int) -> None:
    pair.behind.send_transfer(f"10.0.{link}.2", MEBIBYTES, flows=2)
    pair.plain.send_transfer(f"10.0.{link}.1", MEBIBYTES, flows=2)
    assert pair.behind.checksum_errors() == 0
    assert pair.plain.checksum_errors() == 0
    assert "iommu" not in pair.drops(f"behind{link}"), "a driver that maps what it lends is refused nothing"


@links
def test_the_driver_leaves_and_comes_back(pair: Pair, link: int) -> None:
    """What the IOMMU allowed the driver before is not remembered."""
    device = pair.behind.unbind_driver(link)
    pair.behind.bind_driver(device)
    pair.behind.configure(link, f"10.0.{link}.1/24")
    pair.behind.wait_ping(f"10.0.{link}.2")
    pair.behind.send_transfer(f"10.0.{link}.2", 1)
    assert "iommu" not in pair.drops(f"behind{link}")


@links
def test_an_upgrade_keeps_what_the_iommu_said(pair: Pair, link: int) -> None:
    """The new process has the translations and the channel to ask for more."""
    pair.behind.wait_ping(f"10.0.{link}.2")
    pair.switch.upgrade()
    pair.behind.ping(f"10.0.{link}.2", count=20)
    pair.plain.send_transfer(f"10.0.{link}.1", 1)
    assert "iommu" not in pair.drops(f"behind{link}")


@links
def test_a_killed_switch_is_found_again(pair: Pair, link: int) -> None:
    """QEMU connects anew, and its IOMMU is asked anew."""
    pair.switch.kill()
    pair.switch.start()
    pair.behind.wait_ping(f"10.0.{link}.2")
    pair.plain.send_transfer(f"10.0.{link}.1", 1)
    assert pair.port(f"behind{link}")["iommu"]["updates"] > 0
