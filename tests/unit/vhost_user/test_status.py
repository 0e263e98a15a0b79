"""SET_STATUS, GET_STATUS and RESET_DEVICE."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, FEATURES, NACK, Guest, state, u64


async def test_status_is_kept(negotiated: Guest) -> None:
    assert (await negotiated.ask(40)).u64 == 0
    assert await negotiated.ack(39, u64(0xF)) == ACK
    assert (await negotiated.ask(40)).u64 == 0xF


async def test_status_has_eight_bits(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(39, u64(0x100)) == NACK
    assert "status 0x100; allowed: 0 to 0xff (virtio 1.2, 2.1)" in device.failures[0]


async def test_status_zero_does_not_lose_the_rings_place(ready: Guest, device: RecordingDevice) -> None:
    """QEMU 7.2 sends it before it asks where the rings stand, and goes on there after a pause of the machine."""
    await ready.start()
    assert await ready.ack(39, u64(0)) == ACK
    assert not device.named("stop_queue")
    device.base = 17
    assert (await ready.ask(11, state(0, 0))).payload == state(0, 17)


async def test_reset_stops_all_rings_and_keeps_the_memory(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(0)
    await ready.start(1)
    assert await ready.ack(39, u64(0xF)) == ACK
    assert await ready.ack(34) == ACK
    assert [call[0] for call in device.calls[-3:]] == ["stop_queue", "stop_queue", "reset"]
    assert (await ready.ask(40)).u64 == 0
    assert await ready.ack(2, u64(FEATURES)) == ACK
    await ready.start(0)
    assert len(device.named("start_queue")) == 3


async def test_reset_disables_and_forgets(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(18, state(0, 1)) == ACK
    assert await ready.ack(34) == ACK
    assert (await ready.ask(11, state(0, 0))).payload == state(0, 0)
    assert await ready.ack(2, u64(FEATURES)) == ACK
    await ready.start()
    assert device.calls[-1][0] == "start_queue"
