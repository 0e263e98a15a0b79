"""Two QEMU guests with Debian's kernel and its stock virtio-net driver talk through the switch, in every ring mode.

Six options make 64 kinds of device. Sixteen of them are tried, chosen so that any three options meet in all eight
ways; each is one end of a link between the two guests, and links also join unlike ends. A boot carries four links.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from interop.back_end import BackEnd, PortSpec
from interop.guest_image import GuestImage
from interop.qemu import Guest, Nic

OPTIONS = ("packed", "mergeable", "event_index", "indirect", "two_pairs", "qemu_listens")
# Row n of the array gives option i the parity of n & COLUMNS[i]. Any three of these four-bit words are linearly
# independent, so any three options take each of their eight combinations in exactly two of the sixteen rows.
COLUMNS = (1, 2, 4, 8, 7, 11)
# Boots, links, ends. The ends of the first boot's links differ in ring layout, mergeable buffers, indirect
# descriptors and who listens; those of the second in the last two only. Both ends of a link have as many queue pairs,
# since testpmd, which joins the Nth queues of two ports, could not stand in for the switch otherwise.
LINKS = (((0, 11), (1, 10), (2, 9), (3, 8)), ((4, 12), (5, 13), (6, 14), (7, 15)))
MEBIBYTES = 64
JUMBO = 9000


def row(number: int) -> dict[str, bool]:
    """The options of one kind of device."""
    return {option: (number & column).bit_count() % 2 == 1 for option, column in zip(OPTIONS, COLUMNS, strict=True)}


def describe(number: int) -> str:
    """A row as part of a test's name: "packed+mergeable"."""
    return "+".join(option for option, on in row(number).items() if on) or "split"


def test_the_rows_cover_all_triples() -> None:
    rows = [row(number) for boot in LINKS for link in boot for number in link]
    for options in itertools.combinations(OPTIONS, 3):
        met = {tuple(kind[option] for option in options) for kind in rows}
        assert len(met) == 8, f"{options} meet in {sorted(met)} only"


@dataclass
class Pair:
    """The two guests of one boot."""

    left: Guest
    right: Guest

    def configure(self, link: int, mtu: int) -> None:
        for host, guest in enumerate((self.left, self.right), 1):
            guest.configure(link, f"10.0.{link}.{host}/24", f"fd00:{link}::{host}/64", mtu=mtu)


def nic(number: int, socket: Path, mac: str) -> Nic:
    options = row(number)
    return Nic(
        socket,
        mac,
        server=options["qemu_listens"],
        packed=options["packed"],
        mergeable=options["mergeable"],
        event_index=options["event_index"],
        indirect=options["indirect"],
        queue_pairs=2 if options["two_pairs"] else 1,
    )


@pytest.fixture(scope="module", params=range(len(LINKS)), ids=lambda boot: f"boot{boot}")
def pair(
    request: pytest.FixtureRequest,
    module_directory: Path,
    image: GuestImage,
    make_back_end: Callable[[Path, Sequence[PortSpec]], BackEnd],
) -> Iterator[Pair]:
    """Two guests, four links; the back-end starts first and connects to those sockets on which QEMU listens."""
    boot: int = request.param
    directory = module_directory / f"boot{boot}"
    directory.mkdir()
    ports: list[PortSpec] = []
    nics: tuple[list[Nic], list[Nic]] = ([], [])
    for link, ends in enumerate(LINKS[boot]):
        for side, number in enumerate(ends):
            socket = directory / f"{link}{side}.sock"
            kind = nic(number, socket, f"02:56:00:00:0{link}:0{side + 1}")
            nics[side].append(kind)
            ports.append(PortSpec(f"p{link}{side}", socket, link, client=kind.server, queue_pairs=kind.queue_pairs))
    back_end = make_back_end(directory, ports)
    left, right = (
        Guest(name, image, directory, tuple(of), processors=2) for name, of in zip(("left", "right"), nics, strict=True)
    )
    try:
        back_end.start()
        left.start()
        with right:
            left.wait_ready()
            both = Pair(left, right)
            for link in range(len(LINKS[boot])):
                both.configure(link, 1500)
            left.serve_transfers()
            right.serve_transfers()
            yield both
        left.stop()
        back_end.stop()
    finally:
        left.kill()
        back_end.kill()


links = pytest.mark.parametrize("link", range(4), ids=lambda link: f"link{link}")


@links
def test_ping(pair: Pair, link: int) -> None:
    pair.left.ping(f"10.0.{link}.2", count=20)
    pair.right.ping(f"10.0.{link}.1", count=20, size=1400)


@links
def test_ipv6(pair: Pair, link: int) -> None:
    pair.left.ping(f"fd00:{link}::2", count=20)
    pair.right.send_transfer(f"fd00:{link}::1", 16)
    pair.left.echo_datagrams(f"fd00:{link}::2", 20, 1400)


@links
def test_checked_transfer_each_way(pair: Pair, link: int) -> None:
    pair.left.send_transfer(f"10.0.{link}.2", MEBIBYTES, flows=4)
    pair.right.send_transfer(f"10.0.{link}.1", MEBIBYTES, flows=4)
    assert pair.left.checksum_errors() == 0
    assert pair.right.checksum_errors() == 0


@links
def test_jumbo_frames(pair: Pair, link: int) -> None:
    pair.configure(link, JUMBO)
    pair.left.ping(f"10.0.{link}.2", count=5, size=JUMBO - 28)
    pair.right.ping(f"fd00:{link}::1", count=5, size=JUMBO - 48)
    pair.left.echo_datagrams(f"10.0.{link}.2", 20, JUMBO - 28)
    pair.left.send_transfer(f"10.0.{link}.2", 16)
    pair.right.send_transfer(f"fd00:{link}::1", 16)


def test_all_links_at_once(pair: Pair) -> None:
    wait = "\n".join(f"wait $p{link} || exit 1" for link in range(4))
    start = "\n".join(f"transfer send 10.0.{link}.2 5001 16 2 & p{link}=$!" for link in range(4))
    pair.left.run(f"{start}\n{wait}", seconds=120)
