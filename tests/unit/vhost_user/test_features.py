"""GET_FEATURES and SET_FEATURES."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, FEATURES, NACK, Guest, state, u64

PROTOCOL_FEATURES = 1 << 30
LOG_ALL = 1 << 26
ACCESS_PLATFORM = 1 << 33
REPLY_ACK, BACKEND_REQ = 1 << 3, 1 << 5


async def test_offers_the_devices_features_and_protocol_features(wire: Guest, device: RecordingDevice) -> None:
    assert (await wire.ask(1)).u64 == device.features | PROTOCOL_FEATURES


async def test_access_platform_needs_a_channel_for_misses_and_answers(wire: Guest, device: RecordingDevice) -> None:
    device.features |= ACCESS_PLATFORM
    assert (await wire.ask(1)).u64 & ACCESS_PLATFORM
    offered = device.protocol_features
    for needed in (BACKEND_REQ, REPLY_ACK):
        device.protocol_features = offered & ~needed
        assert not (await wire.ask(1)).u64 & ACCESS_PLATFORM


async def test_log_all_needs_the_protocol_feature(wire: Guest, device: RecordingDevice) -> None:
    device.features |= LOG_ALL
    assert (await wire.ask(1)).u64 & LOG_ALL
    device.protocol_features &= ~2
    assert not (await wire.ask(1)).u64 & LOG_ALL


async def test_get_features_with_a_payload(wire: Guest, device: RecordingDevice) -> None:
    wire.send(1, u64(0))
    assert await wire.closed()
    assert "payload of 8 bytes; allowed: 0 bytes" in device.failures[0]


async def test_the_device_gets_what_was_acknowledged(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(2, u64(FEATURES)) == ACK
    assert device.named("set_features") == [("set_features", 1 << 32)]


async def test_a_bit_that_was_not_offered(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(2, u64(FEATURES | 1 << 40 | 1 << 49)) == NACK
    assert "features that were not offered: RING_RESET, bit 49" in device.failures[0]
    assert not device.named("set_features")


async def test_wrong_size(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(2, b"1234") == NACK
    assert 'payload of 4 bytes; allowed: 8 bytes: u64 (vhost-user, "Payload")' in device.failures[0]


async def test_the_same_features_again_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    """QEMU sends them once for each queue pair, the second time when the first pair runs."""
    await ready.start()
    assert await ready.ack(2, u64(FEATURES)) == ACK
    assert len(device.named("set_features")) == 1


async def test_other_features_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(2, u64(FEATURES | 1 << 5)) == NACK
    assert "ring 0 is started (GET_VRING_BASE stops it)" in device.failures[0]


async def test_logging_is_switched_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    device.features |= LOG_ALL
    await ready.start()
    assert await ready.ack(2, u64(FEATURES | LOG_ALL)) == ACK
    assert device.named("set_features")[-1] == ("set_features", 1 << 32 | LOG_ALL)


async def test_without_protocol_features_rings_start_enabled(wire: Guest, device: RecordingDevice) -> None:
    """vhost-user, "Ring states"."""
    assert await wire.ack(2, u64(1 << 32)) == ACK
    await wire.share()
    await wire.start(0)
    assert device.calls[-1] == ("enable_queue", 0, True)


async def test_with_protocol_features_rings_start_disabled(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(0)
    assert not device.named("enable_queue")
    assert await ready.ack(18, state(0, 1)) == ACK
    assert device.calls[-1] == ("enable_queue", 0, True)


async def test_a_device_that_refuses(wire: Guest, device: RecordingDevice) -> None:
    device.failing.add("set_features")
    assert await wire.ack(2, u64(FEATURES)) == NACK
    assert "SET_FEATURES: the device refused it: set_features failed on purpose; refused" in device.failures[0]
    device.failing.clear()
    assert await wire.ack(2, u64(FEATURES)) == ACK
