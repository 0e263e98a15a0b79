"""SET_VRING_BASE and GET_VRING_BASE."""

import struct

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, FEATURES, NACK, Guest, state

PACKED = FEATURES | 1 << 34


def base_of(device: RecordingDevice) -> int:
    base = device.named("start_queue")[-1][1].base
    assert isinstance(base, int)
    return base


async def test_the_ring_starts_where_it_is_told(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(0, base=0xFFFF)
    assert base_of(device) == 0xFFFF


async def test_a_split_index_has_16_bits(ready: Guest, device: RecordingDevice) -> None:
    assert await ready.ack(10, state(0, 0x10000)) == NACK
    assert "index 0x10000; allowed: 0 to 0xffff" in device.failures[0]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        pytest.param(0x8000_8000, 0x8000_8000, id="fresh"),
        pytest.param(0x0003_8005, 0x0003_8005, id="with requests in flight"),
        pytest.param(0x8000, 0x8000_8000, id="DPDK leaves the used index out"),
        pytest.param(0x0007, 0x0007_0007, id="DPDK, second round"),
    ],
)
async def test_packed_indices(wire: Guest, device: RecordingDevice, given: int, meant: int) -> None:
    await wire.negotiate(PACKED)
    await wire.share()
    await wire.start(0, base=given)
    assert base_of(device) == meant


async def test_a_packed_ring_without_base_starts_afresh(wire: Guest, device: RecordingDevice) -> None:
    await wire.negotiate(PACKED)
    await wire.share()
    assert await wire.ack(8, state(0, 100)) == ACK
    assert await wire.ack(9, wire.place(0)) == ACK
    assert await wire.ack(12, struct.pack("=Q", 0), [wire.event()]) == ACK
    assert base_of(device) == 0x8000_8000


async def test_not_while_the_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(10, state(0, 7)) == NACK
    assert "SET_VRING_BASE: ring 0 is started" in device.failures[0]


async def test_get_stops_the_ring_and_tells_where_it_stands(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(2)
    device.base = 0x1234
    assert (await ready.ask(11, state(2, 0))).payload == state(2, 0x1234)
    assert device.named("stop_queue") == [("stop_queue", 2)]


async def test_a_stopped_ring_goes_on_where_it_stood(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    device.base = 99
    await ready.ask(11, state(0, 0))
    assert await ready.ack(12, struct.pack("=Q", 0), [ready.event()]) == ACK
    assert base_of(device) == 99


async def test_get_of_a_ring_that_never_ran(ready: Guest, device: RecordingDevice) -> None:
    assert await ready.ack(10, state(1, 5)) == ACK
    assert (await ready.ask(11, state(1, 0))).payload == state(1, 5)
    assert not device.named("stop_queue")


async def test_get_of_no_such_ring(ready: Guest) -> None:
    ready.send(11, state(6, 0))
    assert await ready.closed()


async def test_a_device_that_cannot_stop(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    device.failing.add("stop_queue")
    ready.send(11, state(0, 0))
    assert await ready.closed()
    assert "GET_VRING_BASE: the device refused it: stop_queue failed on purpose" in device.failures[0]
