"""GET_INFLIGHT_FD and SET_INFLIGHT_FD."""

import os
import struct

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, Guest, state


def description(size: int, offset: int, queues: int, queue_size: int, padding: int = 4) -> bytes:
    return struct.pack("=QQHH", size, offset, queues, queue_size) + bytes(padding)


@pytest.mark.parametrize("padding", [0, 4], ids=["as documented", "as QEMU and DPDK send it"])
async def test_get(negotiated: Guest, device: RecordingDevice, padding: int) -> None:
    reply = await negotiated.ask(31, description(0, 0, 2, 256, padding))
    assert reply.payload == description(8192, 0, 2, 256, padding)
    (fd,) = reply.fds
    assert os.fstat(fd).st_size == 8192
    os.close(fd)
    assert device.named("get_inflight") == [("get_inflight", 2, 256)]


async def test_set(negotiated: Guest, device: RecordingDevice) -> None:
    assert await negotiated.ack(32, description(4096, 4096, 2, 256), [negotiated.memory(8192)]) == ACK
    assert device.named("set_inflight") == [("set_inflight", 4096, 4096, 2, 256)]


@pytest.mark.parametrize(
    ("payload", "said"),
    [
        pytest.param(description(4096, 8192, 2, 256), "at offset 0x2000 of the buffer's file", id="beyond the file"),
        pytest.param(description(0, 0, 2, 256), "0x0 bytes at offset", id="empty"),
        pytest.param(description(4096, 0, 7, 256), "7 queues; allowed: 1 to 6", id="queues"),
        pytest.param(description(4096, 0, 0, 256), "0 queues; allowed: 1 to 6", id="no queues"),
        pytest.param(description(4096, 0, 2, 0), "queue size 0", id="queue size"),
        pytest.param(description(4096, 0, 2, 256, 8), "payload of 28 bytes; allowed: 20 or 24", id="size"),
    ],
)
async def test_bad_description(negotiated: Guest, device: RecordingDevice, payload: bytes, said: str) -> None:
    assert await negotiated.ack(32, payload, [negotiated.memory(8192)]) == NACK
    assert said in device.failures[0]


async def test_not_while_a_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(32, description(4096, 0, 2, 256), [ready.memory()]) == NACK
    await ready.ask(11, state(0, 0))
    assert await ready.ack(32, description(4096, 0, 2, 256), [ready.memory()]) == ACK


async def test_needs_a_descriptor(negotiated: Guest) -> None:
    assert await negotiated.ack(32, description(4096, 0, 2, 256)) == NACK


async def test_a_device_that_fails_to_make_one(negotiated: Guest, device: RecordingDevice) -> None:
    device.failing.add("get_inflight")
    negotiated.send(31, description(0, 0, 2, 256))
    assert await negotiated.closed()
