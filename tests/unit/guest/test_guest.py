"""Guests over our switch: pings, streams, datagrams, in every way of driving a device, and across a restart."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

import viaduct
from viaduct.guest import Guest, GuestError

Sockets = tuple[Path, Path]

MODES: list[dict[str, Any]] = [
    {},
    {"ring": "packed"},
    {"mergeable": False},
    {"ring": "packed", "mergeable": False, "event_idx": False},
    {"indirect": True, "event_idx": False},
    {"ring": "packed", "indirect": True},
    {"checksum": False},
    {"segmentation": False, "ring": "packed"},
    {"queue_size": 64},
    {"ring": "packed", "queue_size": 100},
]


def pair(sockets: Sockets, left: dict[str, Any], right: dict[str, Any]) -> tuple[Guest, Guest]:
    return (
        Guest(sockets[0], name="left", ip=("10.0.0.1/24", "fd00::1/64"), **left),
        Guest(sockets[1], name="right", ip=("10.0.0.2/24", "fd00::2/64"), **right),
    )


@pytest.mark.parametrize("modes", MODES, ids=str)
async def test_guests_with_different_devices_talk(sockets: Sockets, modes: dict[str, Any]) -> None:
    left, right = pair(sockets, modes, {})
    async with left, right:
        right.serve()
        for remote in ("10.0.0.2", "fd00::2"):
            ping = await left.ping(remote, count=3, interval=0.01, wait=10)
            assert (ping.sent, ping.received, ping.corrupted) == (3, 3, 0)
        for direction in ("send", "receive", "echo"):
            stream = await left.stream("10.0.0.2", direction=direction, bytes=1 << 20, patience=30)
            assert (stream.verified, stream.error) == (True, None)
            moved = stream.sent if direction == "send" else stream.received
            assert moved >= 1 << 20
        assert right.service_counters()["streams_verified"] == 1
        for guest in (left, right):
            counters = guest.counters()
            assert (counters["rx_violations"], counters["rx_bad_checksum"]) == (0, 0)


async def test_datagrams_are_counted_at_the_other_end(sockets: Sockets) -> None:
    left, right = pair(sockets, {}, {})
    async with left, right:
        right.serve()
        result = await left.datagrams("10.0.0.2", size=1000, count=100, rate=1000, patience=10)
        assert (result.sent, result.received, result.lost) == (100, 100, 0)
        assert (result.duplicated, result.reordered, result.corrupted) == (0, 0, 0)


async def test_a_ping_in_fragments(sockets: Sockets) -> None:
    left, right = pair(sockets, {}, {})
    async with left, right:
        ping = await left.ping("10.0.0.2", count=2, interval=0.01, wait=10, size=20_000)
        assert ping.received == 2


async def test_nobody_answers(sockets: Sockets) -> None:
    left, right = pair(sockets, {}, {})
    async with left, right:
        ping = await left.ping("10.0.0.9", count=2, interval=0.01, wait=0.2)
        assert (ping.sent, ping.received, ping.lost, ping.rtt) == (2, 0, 2, None)
        with pytest.raises(GuestError, match=r"refused the connection to port 9.*viaduct guest serve"):
            await left.stream("10.0.0.2", bytes=1)
        with pytest.raises(GuestError, match=r"no answer for 0\.3 s"):
            await left.stream("10.0.0.9", bytes=1, patience=0.3)
        with pytest.raises(GuestError, match="is in none of the guest's networks and there is no gateway"):
            await left.ping("192.168.1.1")
        with pytest.raises(GuestError, match="IPv6 does not fit into an MTU of 1500"):
            await left.ping("fd00::2", size=1453)


async def test_a_stream_goes_on_when_the_switch_comes_back(tmp_path: Path) -> None:
    paths = (tmp_path / "a.sock", tmp_path / "b.sock")
    left, right = pair(paths, {}, {"ring": "packed"})

    async def add_ports(switch: viaduct.Switch) -> None:
        for path in paths:
            await switch.add_port(path.stem, f"vhost-user:{path}")

    async with viaduct.Switch() as switch:
        await add_ports(switch)
        await left.start()
        await right.start()
        right.serve()
        stream = asyncio.create_task(left.stream("10.0.0.2", seconds=4, patience=60))
        await asyncio.sleep(0.3)
    async with viaduct.Switch() as switch:
        await add_ports(switch)
        result = await stream
        assert (result.error, result.verified) == (None, True)
        assert (left.link.reconnects, right.link.reconnects) == (1, 1)
        await left.close()
        await right.close()


async def test_closing_ends_what_runs_and_leaves_nothing(sockets: Sockets) -> None:
    before = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
    left, right = pair(sockets, {}, {})
    await left.start()
    await right.start()
    right.serve()
    ping = asyncio.create_task(left.ping("10.0.0.2", count=1000, interval=1))
    await asyncio.sleep(0.2)
    await left.close()
    await right.close()
    with pytest.raises(GuestError, match="guest left was closed"):
        await ping
    with pytest.raises(GuestError, match="is not running"):
        await left.ping("10.0.0.2")
    for _ in range(100):
        after = len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))
        if after == before:
            break
        await asyncio.sleep(0.05)  # The switch closes its ends when it hears of it.
    assert after == before


async def test_a_cancelled_task_leaves_the_guest_usable(sockets: Sockets) -> None:
    left, right = pair(sockets, {}, {})
    async with left, right:
        right.serve()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(left.ping("10.0.0.2", count=1000), 0.2)
        assert (await left.ping("10.0.0.2", count=1, wait=10)).received == 1
        await right.stop_serving()
        with pytest.raises(GuestError, match="refused"):
            await left.stream("10.0.0.2", bytes=1)
        right.serve()
        assert (await left.stream("10.0.0.2", bytes=1000)).verified
