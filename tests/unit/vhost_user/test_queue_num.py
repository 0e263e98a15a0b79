"""GET_QUEUE_NUM."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import Guest
from viaduct.vhost_user import ProtocolFeature
from viaduct.virtio import DeviceType


async def test_a_network_device_counts_pairs(wire: Guest) -> None:
    assert (await wire.ask(17)).u64 == 3


async def test_other_devices_count_queues(wire: Guest, device: RecordingDevice) -> None:
    device.device_id = DeviceType.ENTROPY
    assert (await wire.ask(17)).u64 == 6


async def test_not_offered(wire: Guest, device: RecordingDevice) -> None:
    device.protocol_features &= ~ProtocolFeature.MQ
    wire.send(17)
    assert await wire.closed()
    assert "needs VHOST_USER_PROTOCOL_F_MQ, which this back-end does not offer" in device.failures[0]
