"""GET_PROTOCOL_FEATURES and SET_PROTOCOL_FEATURES."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest, u64
from viaduct.vhost_user import ProtocolFeature


async def test_may_be_asked_before_anything_else(wire: Guest, device: RecordingDevice) -> None:
    assert (await wire.ask(15)).u64 == device.protocol_features


async def test_offers_only_what_the_device_supports(wire: Guest, device: RecordingDevice) -> None:
    device.protocol_features = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
    assert (await wire.ask(15)).u64 == 1 << 0 | 1 << 3


async def test_offers_nothing_whose_messages_are_not_carried_out(wire: Guest, device: RecordingDevice) -> None:
    device.protocol_features |= ProtocolFeature.PAGEFAULT | ProtocolFeature.CROSS_ENDIAN
    assert not (await wire.ask(15)).u64 & (1 << 8 | 1 << 6)


async def test_a_bit_that_was_not_offered(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(16, u64(1 << 8)) == NACK
    assert "protocol features that were not offered" in device.failures[0]
    assert "PAGEFAULT" in device.failures[0]


async def test_the_same_again_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(16, u64(int(device.protocol_features))) == ACK


async def test_others_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(16, u64(8)) == NACK
    assert "while all rings are stopped, or with the value in force" in device.failures[0]
