"""The entropy device, from the driver's side."""

from __future__ import annotations

import pytest

from devices.slot import Slot, until
from viaduct.devices.entropy import CHUNK, Entropy
from viaduct.virtio import DeviceFeature


class Clock:
    """Time that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("packed", [0, DeviceFeature.RING_PACKED], ids=["split", "packed"])
async def test_buffers_are_filled(packed: int) -> None:
    async with Slot(Entropy(), DeviceFeature.VERSION_1 | DeviceFeature.EVENT_IDX | packed) as slot:
        seen = {await slot.rings[0].ask(room=64) for _ in range(200)}
        assert len(seen) == 200
        assert {len(data) for data in seen} == {64}


async def test_a_buffer_of_many_elements() -> None:
    async with Slot(Entropy()) as slot:
        assert len(await slot.rings[0].ask(room=[1, 100, 3, 1000])) == 1104


async def test_a_huge_buffer_gets_a_bounded_answer() -> None:
    device = Entropy()
    async with Slot(device, spare=1 << 20) as slot:
        ring = slot.rings[0]
        ring.add_at([], [(0, 1 << 20)] * 16, 5)
        await ring.next_used()
        assert device.given == CHUNK


async def test_what_the_driver_writes_is_not_read_and_nothing_can_be_written() -> None:
    async with Slot(Entropy()) as slot:
        assert await slot.rings[0].ask(out=b"a request") == b""
        assert len(await slot.rings[0].ask(room=8)) == 8
        assert not slot.failures


async def test_a_rate_is_kept() -> None:
    clock = Clock()
    device = Entropy(rate=1000, clock=clock)
    async with Slot(device) as slot:
        ring = slot.rings[0]
        assert len(await ring.ask(room=64)) == 64
        assert len(await ring.ask(room=64)) == 36
        ring.add(room=64)
        clock.now += 0.01
        assert len((await ring.next_used())[1]) == 10
        clock.now += 3600
        assert len(await ring.ask(room=4096)) == 100
        assert device.given == 210


async def test_waiting_for_the_rate_ends_with_the_queue() -> None:
    clock = Clock()
    device = Entropy(rate=1, clock=clock)
    async with Slot(device) as slot:
        ring = slot.rings[0]
        assert len(await ring.ask(room=64)) == 1
        ring.add(room=64)
        await slot.stop()
        slot.start()
        clock.now += 1
        assert len((await ring.next_used())[1]) == 1


async def test_more_buffers_than_a_turn_of_the_loop_allows() -> None:
    device = Entropy()
    async with Slot(device, queue_size=128) as slot:
        for _ in range(100):
            slot.rings[0].add(room=16, kick=False)
        slot.rings[0].kick()
        await until(lambda: device.given == 1600)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="1 byte a second or more"):
        Entropy(rate=0)
