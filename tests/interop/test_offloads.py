"""Guests that agreed to different offloads: what the receiver did not accept, the switch completes in software.

One end of each link has all offloads, the other lacks some. What reaches a receiver is looked at behind its driver: a
frame must ask for nothing that the receiver did not accept, and be no longer than the MTU if segmentation was not. The
receiving kernel then verifies all checksums itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.back_end import PortSpec
from interop.guest_image import GuestImage
from interop.qemu import Guest, Nic
from interop.viaduct_switch import ViaductSwitch

MEBIBYTES = 16
MTU = 1500
HEADER = 14
NO_SEGMENTS = ("guest_tso4", "guest_tso6", "guest_ufo", "guest_ecn")
NO_CHECKSUM = ("guest_csum", *NO_SEGMENTS)
NOTHING = ("csum", "gso", "host_tso4", "host_tso6", "host_ufo", "host_ecn", *NO_CHECKSUM)


@dataclass(frozen=True)
class Lack:
    """What the lesser end of a link goes without."""

    off: tuple[str, ...]
    packed: bool
    mergeable: bool
    queue_pairs: int = 1
    mtu: int | None = None

    @property
    def checksums(self) -> bool:
        """Whether it still accepts partial checksums."""
        return "guest_csum" not in self.off

    @property
    def segments4(self) -> bool:
        """Whether it still accepts TCP segments of IPv4 to be cut."""
        return "guest_tso4" not in self.off

    @property
    def segments6(self) -> bool:
        """Whether it still accepts TCP segments of IPv6 to be cut."""
        return "guest_tso6" not in self.off


LACKS = (
    Lack(NOTHING, packed=False, mergeable=True, queue_pairs=2),
    Lack(NOTHING, packed=True, mergeable=False),
    Lack(NO_SEGMENTS, packed=False, mergeable=False),
    Lack(("guest_tso6",), packed=True, mergeable=True),
    Lack(("guest_tso4", "guest_ecn"), packed=False, mergeable=True),
    Lack(NO_CHECKSUM, packed=False, mergeable=False, mtu=9000),
)
NAMES = ("nothing-split", "nothing-packed", "no-segments", "no-tso6", "no-tso4", "no-checksum-mtu9000")
links = pytest.mark.parametrize("link", range(len(LACKS)), ids=NAMES)


@dataclass
class Pair:
    """A guest with all offloads on each of its links, one that lacks some on each, and the switch between."""

    full: Guest
    lacking: Guest
    switch: ViaductSwitch

    def completed(self, link: int) -> int:
        """Frames whose offloads the switch had to complete on their way to the lacking guest."""
        ports = self.switch.statistics()["ports"]
        queues = next(port["queues"] for port in ports if port["name"] == f"lacking{link}")
        return sum(queue["completed_offloads"] for queue in queues)


@pytest.fixture(scope="module")
def pair(module_directory: Path, image: GuestImage, viaduct_only: None) -> Iterator[Pair]:
    ports: list[PortSpec] = []
    full: list[Nic] = []
    lacking: list[Nic] = []
    for link, lack in enumerate(LACKS):
        sockets = [module_directory / f"{name}{link}.sock" for name in ("full", "lacking")]
        full.append(Nic(sockets[0], f"02:56:00:00:2{link}:01", packed=bool(link % 2), mtu=lack.mtu))
        lacking.append(
            Nic(
                sockets[1],
                f"02:56:00:00:2{link}:02",
                packed=lack.packed,
                mergeable=lack.mergeable,
                queue_pairs=lack.queue_pairs,
                off=lack.off,
                mtu=lack.mtu,
            )
        )
        ports.append(PortSpec(f"full{link}", sockets[0], link, mtu=lack.mtu))
        ports.append(PortSpec(f"lacking{link}", sockets[1], link, queue_pairs=lack.queue_pairs, mtu=lack.mtu))
    switch = ViaductSwitch(module_directory, ports)
    guests = (
        Guest("full", image, module_directory, tuple(full)),
        Guest("lacking", image, module_directory, tuple(lacking), processors=2),
    )
    try:
        switch.start()
        for guest in guests:
            guest.start()
        for host, guest in enumerate(guests, 1):
            guest.wait_ready()
            for link, lack in enumerate(LACKS):
                guest.configure(link, f"10.0.{link}.{host}/24", f"fd00:{link}::{host}/64", mtu=lack.mtu or MTU)
            guest.serve_transfers()
        yield Pair(*guests, switch)
        for guest in guests:
            guest.stop()
        switch.stop()
    finally:
        for guest in guests:
            guest.kill()
        switch.kill()


def sniff(guest: Guest, link: int) -> None:
    guest.run(f"transfer sniff eth{link} 600000 >/tmp/sniffed & echo $! >/tmp/sniffer")
    guest.run("until grep -q sniffing /tmp/sniffed; do :; done")


def sniffed(guest: Guest) -> dict[str, int]:
    guest.run("kill $(cat /tmp/sniffer); until grep -q frames /tmp/sniffed; do :; done")
    return {name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", guest.run("cat /tmp/sniffed"))}


@links
@pytest.mark.parametrize("version", [4, 6])
def test_transfer_to_the_lacking_end(pair: Pair, link: int, version: int) -> None:
    lack = LACKS[link]
    address = f"10.0.{link}.2" if version == 4 else f"fd00:{link}::2"
    completed = pair.completed(link)
    sniff(pair.lacking, link)
    pair.full.send_transfer(address, MEBIBYTES, flows=2)
    seen = sniffed(pair.lacking)
    assert seen["frames"] > 0
    if not lack.checksums:
        assert seen["checksum"] == 0
    if not (lack.segments4 if version == 4 else lack.segments6):
        assert seen["segmentation"] == 0
        assert seen["longest"] <= (lack.mtu or MTU) + HEADER
        assert pair.completed(link) > completed
    else:
        assert seen["longest"] > (lack.mtu or MTU) + HEADER, "the sender did not use its segmentation offload"
    assert pair.lacking.checksum_errors() == 0


@links
def test_transfer_from_the_lacking_end(pair: Pair, link: int) -> None:
    pair.lacking.send_transfer(f"10.0.{link}.1", MEBIBYTES, flows=2)
    pair.lacking.send_transfer(f"fd00:{link}::1", MEBIBYTES)
    assert pair.full.checksum_errors() == 0


@links
def test_datagrams_both_ways(pair: Pair, link: int) -> None:
    """UDP whose checksum the sender left to the device; the larger ones are fragmented by the kernel."""
    for guest, host in ((pair.full, 2), (pair.lacking, 1)):
        for address in (f"10.0.{link}.{host}", f"fd00:{link}::{host}"):
            for size in (1, 1400, 20000):
                guest.echo_datagrams(address, 5, size)
    assert pair.full.checksum_errors() == 0
    assert pair.lacking.checksum_errors() == 0
