"""SET_VRING_NUM."""

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, FEATURES, NACK, Guest, state

PACKED = FEATURES | 1 << 34


@pytest.mark.parametrize("size", [1, 2, 256, 32768])
async def test_split_takes_powers_of_two(negotiated: Guest, size: int) -> None:
    assert await negotiated.ack(8, state(0, size)) == ACK


@pytest.mark.parametrize("size", [0, 3, 100, 32769, 65536, 0xFFFFFFFF])
async def test_split_takes_nothing_else(negotiated: Guest, device: RecordingDevice, size: int) -> None:
    assert await negotiated.ack(8, state(0, size)) == NACK
    assert f"queue size {size}; allowed: a power of two up to 32768 (virtio 1.2, 2.7)" in device.failures[0]


@pytest.mark.parametrize("size", [1, 3, 100, 32768])
async def test_packed_takes_any_size(wire: Guest, size: int) -> None:
    await wire.negotiate(PACKED)
    assert await wire.ack(8, state(0, size)) == ACK


@pytest.mark.parametrize("size", [0, 32769])
async def test_packed_has_the_same_limit(wire: Guest, device: RecordingDevice, size: int) -> None:
    await wire.negotiate(PACKED)
    assert await wire.ack(8, state(0, size)) == NACK
    assert "allowed: 1 to 32768 (virtio 1.2, 2.8)" in device.failures[0]


@pytest.mark.parametrize("index", [6, 0xFFFFFFFF])
async def test_no_such_ring(negotiated: Guest, device: RecordingDevice, index: int) -> None:
    assert await negotiated.ack(8, state(index, 256)) == NACK
    assert f"ring {index}; allowed: 0 to 5" in device.failures[0]


async def test_not_while_the_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(1)
    assert await ready.ack(8, state(1, 128)) == NACK
    assert "ring 1 is started (GET_VRING_BASE stops it); allowed: while the ring is stopped" in device.failures[0]
    assert await ready.ack(8, state(0, 128)) == ACK


async def test_wrong_size(negotiated: Guest) -> None:
    assert await negotiated.ack(8, bytes(4)) == NACK
