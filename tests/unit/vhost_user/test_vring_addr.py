"""SET_VRING_ADDR."""

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, FEATURES, MEMORY_SIZE, NACK, USER_BASE, Guest, address, state, u64

END = USER_BASE + MEMORY_SIZE


@pytest.mark.parametrize(
    ("bytes_", "said"),
    [
        pytest.param(
            address(0, USER_BASE + 8, USER_BASE, USER_BASE),
            "descriptor table at 0x7f0000000008; allowed: multiples of 16",
            id="descriptor",
        ),
        pytest.param(
            address(0, USER_BASE, USER_BASE + 2, USER_BASE),
            "used ring at 0x7f0000000002; allowed: multiples of 4",
            id="used",
        ),
        pytest.param(
            address(0, USER_BASE, USER_BASE, USER_BASE + 1),
            "available ring at 0x7f0000000001; allowed: multiples of 2",
            id="available",
        ),
        pytest.param(
            address(0, 0x1000, USER_BASE, USER_BASE),
            "descriptor table of 0x1000 bytes at user address 0x1000",
            id="descriptor outside",
        ),
        pytest.param(
            address(0, USER_BASE, END, USER_BASE),
            "used ring of 0x804 bytes at user address 0x7f0000100000",
            id="used outside",
        ),
        pytest.param(
            address(0, USER_BASE, USER_BASE, END - 0x202),
            "available ring of 0x204 bytes",
            id="available crosses the end",
        ),
        pytest.param(
            address(0, (1 << 64) - 16, USER_BASE, USER_BASE),
            "at user address 0xfffffffffffffff0",
            id="descriptor wraps",
        ),
    ],
)
async def test_a_bad_place(ready: Guest, device: RecordingDevice, bytes_: bytes, said: str) -> None:
    assert await ready.ack(8, state(0, 256)) == ACK
    assert await ready.ack(9, bytes_) == NACK
    assert said in device.failures[0]
    assert "port vm1 (" in device.failures[0]


async def test_a_bad_place_that_shows_at_the_start(negotiated: Guest, device: RecordingDevice) -> None:
    """The memory comes after the address, so only SET_VRING_KICK can refuse."""
    assert await negotiated.ack(8, state(0, 256)) == ACK
    assert await negotiated.ack(9, address(0, 0x1000, 0x3000, 0x2000)) == ACK
    await negotiated.share()
    assert await negotiated.ack(12, u64(0), [negotiated.event()]) == NACK
    assert "SET_VRING_KICK: ring 0: descriptor table of 0x1000 bytes at user address 0x1000" in device.failures[0]
    assert not device.named("start_queue")


async def test_packed_alignment(wire: Guest, device: RecordingDevice) -> None:
    await wire.negotiate(FEATURES | 1 << 34)
    await wire.share()
    assert await wire.ack(8, state(0, 100)) == ACK
    assert await wire.ack(9, address(0, USER_BASE, USER_BASE, USER_BASE + 2)) == NACK
    assert "driver event suppression at 0x7f0000000002; allowed: multiples of 4" in device.failures[0]


async def test_the_same_place_while_the_ring_runs(ready: Guest) -> None:
    await ready.start()
    assert await ready.ack(9, ready.place(0)) == ACK


async def test_another_place_while_the_ring_runs(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(9, ready.place(1).replace(b"\1", b"\0", 1)) == NACK
    assert "ring 0 is started" in device.failures[0]


async def test_no_such_ring(ready: Guest) -> None:
    assert await ready.ack(9, ready.place(6)) == NACK


async def test_wrong_size(ready: Guest, device: RecordingDevice) -> None:
    assert await ready.ack(9, ready.place(0)[:-8]) == NACK
    assert "payload of 32 bytes; allowed: 40 bytes: vring address description" in device.failures[0]
