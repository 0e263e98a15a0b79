"""Traffic over our switch: what was sent is what arrives."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from viaduct.guest import Receiver, Sender

Sockets = tuple[Path, Path]


@pytest.mark.parametrize(
    ("size", "link"),
    [
        (64, {}),
        (65, {"ring": "packed"}),
        (1514, {"ring": "packed", "mergeable": False}),
        (9014, {"mtu": 9000}),
    ],
    ids=str,
)
async def test_frames_arrive_whole(sockets: Sockets, size: int, link: dict[str, Any]) -> None:
    sender = Sender(sockets[0], size=size, rate=5000, flows=7, **link)
    async with Receiver(sockets[1], queue_size=1024, **link) as receiver, sender:
        sent = await sender.run(count=1000)
        received = await receiver.finish(1.0)
    assert (sent.sent, sent.size) == (1000, size)
    assert (received.received, received.bytes, received.flows) == (1000, 1000 * size, 7)
    assert (received.lost, received.duplicated, received.reordered, received.corrupted) == (0, 0, 0, 0)
    assert received.latency is not None
    assert received.latency.count == 1000
    assert 0 < received.latency.min_us <= received.latency.p50_us <= received.latency.max_us


async def test_many_addresses(sockets: Sockets) -> None:
    async with Receiver(sockets[1], macs=50) as receiver, Sender(sockets[0], rate=5000, flows=100, macs=50) as sender:
        await sender.run(count=500)
        received = await receiver.finish(1.0)
    assert (received.received, received.flows) == (500, 100)


async def test_it_can_be_stopped_and_counted_meanwhile(sockets: Sockets) -> None:
    async with Receiver(sockets[1], count=300) as receiver, Sender(sockets[0], rate=1000) as sender:
        running = asyncio.create_task(sender.run(seconds=60))
        await receiver.wait_done()
        assert receiver.report().received >= 300
        assert sender.report().sent >= 300
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
