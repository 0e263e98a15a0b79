"""Messages on the wire: in pieces, several at once, broken (vhost-user, "Header" and "Communication")."""

import asyncio
import os
import resource

import pytest

from vhost_user.stand_ins import RecordingDevice, until
from vhost_user.wire_client import ACK, HEADER, MEMORY_SIZE, NACK, NEED_REPLY, USER_BASE, VERSION, Guest, regions, u64


async def test_a_message_byte_by_byte(wire: Guest, device: RecordingDevice) -> None:
    for byte in HEADER.pack(2, VERSION | NEED_REPLY, 8) + u64(1 << 32):
        wire.raw(bytes([byte]))
        await asyncio.sleep(0)
    assert (await wire.receive()).u64 == ACK


async def test_many_messages_at_once(wire: Guest) -> None:
    wire.raw(HEADER.pack(1, VERSION, 0) * 100)
    for _ in range(100):
        assert (await wire.receive()).request == 1


async def test_descriptors_stay_with_their_message(negotiated: Guest, device: RecordingDevice) -> None:
    """Two tables are sent before the back-end reads one byte of them."""
    for _ in range(2):
        negotiated.send(5, regions((0, MEMORY_SIZE, USER_BASE, 0)), [negotiated.memory()], flags=VERSION | NEED_REPLY)
    for _ in range(2):
        assert (await negotiated.receive()).u64 == ACK


async def test_descriptors_of_a_message_in_pieces(negotiated: Guest) -> None:
    table = regions((0, MEMORY_SIZE, USER_BASE, 0))
    negotiated.raw(HEADER.pack(5, VERSION | NEED_REPLY, len(table)), [negotiated.memory()])
    await asyncio.sleep(0.01)
    negotiated.raw(table)
    assert (await negotiated.receive()).u64 == ACK


@pytest.mark.parametrize("version", [0, 2, 3])
async def test_wrong_version(wire: Guest, device: RecordingDevice, version: int) -> None:
    wire.send(1, flags=version)
    assert await wire.closed()
    assert f'request 1 has protocol version {version}; allowed: 1 (vhost-user, "Header")' in device.failures[0]


async def test_a_payload_beyond_reason(wire: Guest, device: RecordingDevice) -> None:
    wire.raw(HEADER.pack(5, VERSION, 0xFFFF_FFFF))
    assert await wire.closed()
    assert "announces a payload of 4294967295 bytes; allowed: up to 4096" in device.failures[0]


async def test_the_reply_flag_in_a_request(wire: Guest, device: RecordingDevice) -> None:
    wire.send(1, flags=VERSION | 4)
    assert await wire.closed()
    assert "a request with the reply flag" in device.failures[0]


@pytest.mark.parametrize("length", [1, 11, 12, 15])
async def test_the_end_inside_a_message(wire: Guest, device: RecordingDevice, length: int) -> None:
    wire.raw((HEADER.pack(2, VERSION, 8) + u64(0))[:length], [wire.memory()])
    wire.sock.shutdown(1)
    assert await wire.closed()
    assert "the connection ended inside a message" in device.failures[0]


async def test_the_end_between_messages_is_no_error(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(3) == ACK
    wire.sock.shutdown(1)
    assert await wire.closed()
    assert device.failures == []
    assert device.end == "the front-end closed the connection"


@pytest.mark.parametrize("count", [1, 8, 100])
async def test_surplus_descriptors(wire: Guest, device: RecordingDevice, count: int) -> None:
    fd = wire.memory()
    assert await wire.ack(3, b"", [fd] * count) == NACK
    assert f"{count} file descriptors; allowed: none" in device.failures[0]
    assert await wire.ack(3) == ACK


async def test_descriptors_that_this_process_may_not_open(wire: Guest, device: RecordingDevice) -> None:
    fd = wire.memory()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    wire.send(5, regions((0, 4096, 0, 0)), [fd] * 3)
    # The limit is one of numbers: there must be no gap below it, however other tests left the descriptors.
    lowest_free = os.dup(fd)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
    try:
        assert await wire.closed()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert "descriptors of a message were lost" in device.failures[0]
    assert "ulimit -n" in device.failures[0]


async def test_a_front_end_that_reads_no_answers_stops_only_itself(wire: Guest, device: RecordingDevice) -> None:
    message = HEADER.pack(1, VERSION, 0)
    await until(lambda: not wire.takes(message))
    for _ in range(20):
        assert (await wire.receive()).request == 1
