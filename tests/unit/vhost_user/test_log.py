"""SET_LOG_BASE and SET_LOG_FD."""

import struct

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest


async def test_base(negotiated: Guest, device: RecordingDevice) -> None:
    reply = await negotiated.ask(6, struct.pack("=QQ", 4096, 4096), [negotiated.memory(8192)])
    assert reply.payload == b""
    assert device.named("set_log") == [("set_log", 4096, 4096)]


async def test_base_beyond_the_file(negotiated: Guest, device: RecordingDevice) -> None:
    negotiated.send(6, struct.pack("=QQ", 4096, 8192), [negotiated.memory(8192)])
    assert await negotiated.closed()
    assert "a log of 0x1000 bytes at offset 0x2000; allowed: a part of the file's 0x2000 bytes" in device.failures[0]


async def test_base_without_descriptor(negotiated: Guest, device: RecordingDevice) -> None:
    negotiated.send(6, struct.pack("=QQ", 4096, 0))
    assert await negotiated.closed()
    assert "0 file descriptors; allowed: 1" in device.failures[0]


async def test_fd(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(7, b"", [negotiated.event()]) == ACK
    assert len(device.named("set_log_fd")) == 1


async def test_fd_that_carries_no_events(negotiated: Guest) -> None:
    assert await negotiated.ack(7, b"", [negotiated.memory()]) == NACK
