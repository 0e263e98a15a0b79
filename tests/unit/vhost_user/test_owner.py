"""SET_OWNER and RESET_OWNER."""

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest, u64


async def test_marks_the_session_once(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(3) == ACK
    assert await wire.ack(3) == NACK
    assert "a second one; allowed: once in a connection" in device.failures[0]


async def test_a_payload_is_too_much(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(3, u64(0)) == NACK


async def test_reset_owner_changes_nothing_else(ready: Guest, device: RecordingDevice) -> None:
    """The document recommends to ignore it; the next owner may come."""
    await ready.start()
    calls = len(device.calls)
    assert await ready.ack(4) == ACK
    assert len(device.calls) == calls
    assert await ready.ack(3) == ACK
