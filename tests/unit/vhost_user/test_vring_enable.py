"""SET_VRING_ENABLE."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest, state


async def test_before_the_start_and_before_set_features(wire: Guest, device: RecordingDevice) -> None:
    """QEMU 7.2 enables the rings of a reconnected port before it acknowledges features."""
    assert await wire.ack(18, state(0, 1)) == ACK
    assert not device.named("enable_queue")
    await wire.negotiate()
    await wire.share()
    await wire.start(0)
    assert [call[0] for call in device.calls[-2:]] == ["start_queue", "enable_queue"]


async def test_on_and_off(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(3)
    for enabled in (1, 1, 0, 0, 1):
        assert await ready.ack(18, state(3, enabled)) == ACK
    assert device.named("enable_queue") == [
        ("enable_queue", 3, True),
        ("enable_queue", 3, False),
        ("enable_queue", 3, True),
    ]


async def test_outlives_a_stop(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(18, state(0, 1)) == ACK
    await ready.ask(11, state(0, 0))
    await ready.start()
    assert len(device.named("enable_queue")) == 2


async def test_other_values(ready: Guest, device: RecordingDevice) -> None:
    assert await ready.ack(18, state(0, 2)) == NACK
    assert "state 2; allowed: 0 or 1" in device.failures[0]


async def test_no_such_ring(ready: Guest) -> None:
    assert await ready.ack(18, state(6, 1)) == NACK
