"""Our driver and TCP/IP stack against back-ends nobody here wrote: testpmd's net_vhost and Open vSwitch with DPDK.

Two guests of this process talk through the peer in every ring mode; both sides' checks have to be content: every ping
comes back with its payload, every byte of a stream and of every frame is where it belongs, and the peer never used an
offload that was not negotiated.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from interop.back_end import PortSpec
from interop.ovs import OpenVswitch
from interop.testpmd import TestpmdBackEnd
from viaduct.guest import Guest, Receiver, Sender
from viaduct.virtio.features import DeviceFeature

BYTES = 4 << 20
LISTEN_TIMEOUT = 60.0

MODES = [
    pytest.param(
        {"ring": ring, "mergeable": mergeable, "event_idx": event_idx, "indirect": indirect},
        id="-".join([ring, "mrg" if mergeable else "no_mrg", *["event_idx"] * event_idx, *["indirect"] * indirect]),
    )
    for ring, mergeable, event_idx, indirect in product(
        ("split", "packed"), (True, False), (True, False), (True, False)
    )
]


@pytest.fixture(scope="module")
def testpmd_pair(module_directory: Path) -> Iterator[tuple[Path, Path]]:
    """Two sockets of one testpmd that serves all tests here; each frame that enters one leaves by the other."""
    sockets = (module_directory / "pmd0.sock", module_directory / "pmd1.sock")
    back_end = TestpmdBackEnd(module_directory, [PortSpec(path.stem, path) for path in sockets])
    back_end.start()
    yield sockets
    back_end.stop()


async def talk(left: Guest, right: Guest, modes: dict[str, Any]) -> None:
    """Pings, streams in both directions and datagrams between two guests, and no complaint of either driver."""
    right.serve()
    for remote in ("10.0.0.2", "fd00::2"):
        ping = await left.ping(remote, count=5, interval=0.01, wait=5)
        assert ping.received == 5, str(ping)
        assert not ping.corrupted
    largest = await left.ping("10.0.0.2", count=3, size=left.options.mtu - 28, interval=0.01, wait=5)
    assert largest.received == 3, str(largest)
    for direction in ("send", "receive", "echo"):
        stream = await left.stream("10.0.0.2", direction=direction, bytes=BYTES, patience=30)
        assert stream.error is None, str(stream)
        assert stream.verified, str(stream)
    datagrams = await left.datagrams("10.0.0.2", count=200, rate=2000)
    assert (datagrams.received, datagrams.corrupted) == (200, 0)
    for guest in (left, right):
        counters = guest.counters()
        assert counters["rx_violations"] == 0
        assert counters["rx_bad_checksum"] == 0
        packed = bool(guest.link.features & DeviceFeature.RING_PACKED)
        assert packed == (modes["ring"] == "packed")


def forget_database(directory: Path) -> None:
    """Lets an Open vSwitch begin anew in a directory where another one has been."""
    for path in directory.glob("conf.db*"):
        path.unlink()


def guests(sockets: tuple[Path, Path], second: dict[str, Any] | None = None, **modes: Any) -> tuple[Guest, Guest]:
    """Two guests, one on each socket; `second` overrides for the second what they have in common."""
    left = Guest(sockets[0], name="left", ip=("10.0.0.1/24", "fd00::1/64"), connect_timeout=LISTEN_TIMEOUT, **modes)
    common = {**modes, **(second or {})}
    right = Guest(sockets[1], name="right", ip=("10.0.0.2/24", "fd00::2/64"), connect_timeout=LISTEN_TIMEOUT, **common)
    return left, right


@pytest.mark.parametrize("modes", MODES)
async def test_guests_talk_through_testpmd_in_every_ring_mode(
    testpmd_pair: tuple[Path, Path], modes: dict[str, Any]
) -> None:
    left, right = guests(testpmd_pair, **modes)
    async with left, right:
        await talk(left, right, modes)


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_large_packets_pass_testpmd(testpmd_pair: tuple[Path, Path], ring: str) -> None:
    left, right = guests(testpmd_pair, ring=ring, mtu=9000)
    async with left, right:
        await talk(left, right, {"ring": ring})


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_every_frame_through_testpmd_is_whole(testpmd_pair: tuple[Path, Path], ring: str) -> None:
    for size in (64, 1514):
        receiver = Receiver(testpmd_pair[1], ring=ring, queue_size=1024)
        sender = Sender(testpmd_pair[0], ring=ring, size=size, flows=10, rate=20_000)
        async with receiver, sender:
            sent = await sender.run(count=10_000)
            received = await receiver.finish(quiet=1.0)
        assert (sent.sent, received.flows) == (10_000, 10)
        assert (received.corrupted, received.duplicated, received.reordered) == (0, 0, 0)
        # testpmd drops what its other end has no room for, on a machine that does other things as well.
        assert received.received + received.lost <= sent.sent
        assert received.received > sent.sent / 2


@pytest.mark.parametrize("ring", ["split", "packed"])
async def test_guests_talk_through_open_vswitch(ovs_sockets: tuple[Path, Path], ring: str) -> None:
    left, right = guests(ovs_sockets, second={"listen": True}, ring=ring)
    async with left, right:
        await talk(left, right, {"ring": ring})


async def test_a_stream_survives_a_new_open_vswitch(directory: Path) -> None:
    sockets = (directory / "ovs0.sock", directory / "ovs1.sock")
    ports = [PortSpec(path.stem, path, client=True) for path in sockets]
    left, right = guests(sockets, listen=True, second={})
    with OpenVswitch(directory, ports):
        await asyncio.gather(left.start(), right.start())
        right.serve()
        ping = await left.ping("10.0.0.2", wait=5)
        assert ping.received == ping.sent
        stream = asyncio.create_task(left.stream("10.0.0.2", seconds=20, patience=60))
        await asyncio.sleep(1)
    forget_database(directory)
    with OpenVswitch(directory, ports):
        result = await stream
        assert (result.error, result.verified) == (None, True)
        assert left.link.reconnects == 1
        await left.close()
        await right.close()
