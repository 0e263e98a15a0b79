"""GET_CONFIG and SET_CONFIG."""

import struct

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest


def config(offset: int, size: int, flags: int = 0, data: bytes | None = None) -> bytes:
    return struct.pack("=III", offset, size, flags) + (bytes(size) if data is None else data)


async def test_read(negotiated: Guest, device: RecordingDevice) -> None:
    reply = await negotiated.ask(24, config(4, 8))
    assert reply.payload == config(4, 8, 0, bytes(range(4, 12)))


async def test_a_read_that_fails_is_answered_with_nothing(negotiated: Guest, device: RecordingDevice) -> None:
    """vhost-user, "VHOST_USER_GET_CONFIG": zero length of payload says so."""
    assert (await negotiated.ask(24, config(30, 8))).payload == b""
    assert "read_config returned 2 bytes instead of 8" in device.failures[0]
    assert (await negotiated.ask(24, config(0, 4))).payload != b""


@pytest.mark.parametrize(("offset", "size"), [(0, 0), (0, 257), (256, 1), (0xFFFFFFFF, 1)])
async def test_out_of_range(negotiated: Guest, device: RecordingDevice, offset: int, size: int) -> None:
    assert (await negotiated.ask(24, config(offset, size))).payload == b""
    assert f"{size} bytes at offset {offset} of the configuration space" in device.failures[0]


@pytest.mark.parametrize("length", [0, 11, 12, 15, 17])
async def test_wrong_size(negotiated: Guest, device: RecordingDevice, length: int) -> None:
    assert (await negotiated.ask(24, (config(0, 4) + b"\0")[:length])).payload == b""
    assert f"payload of {length} bytes; allowed: 12 + size bytes" in device.failures[0]


async def test_write(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(25, config(2, 3, 1, b"abc")) == ACK
    assert device.named("write_config") == [("write_config", 2, b"abc", 1)]


async def test_write_to_a_read_only_field(negotiated: Guest, device: RecordingDevice) -> None:
    device.failing.add("write_config")
    assert await negotiated.ack(25, config(0, 1)) == NACK


async def test_write_with_unknown_flags(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(25, config(0, 1, 2)) == NACK
    assert "flags 0x2; allowed: 0 or 1" in device.failures[0]
