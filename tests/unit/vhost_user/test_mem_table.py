"""SET_MEM_TABLE, and what every region must satisfy."""

import os

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, MEMORY_SIZE, NACK, USER_BASE, Guest, regions

PAGE = 4096


async def test_two_regions(negotiated: Guest, device: RecordingDevice) -> None:
    table = regions((0, PAGE, USER_BASE, 0), (1 << 32, PAGE, USER_BASE + PAGE, PAGE))
    fd = negotiated.memory(2 * PAGE)
    assert await negotiated.ack(5, table, [fd, fd]) == ACK
    assert len(device.named("set_memory")) == 1


async def test_the_full_structure_with_unused_regions(negotiated: Guest) -> None:
    table = regions((0, PAGE, USER_BASE, 0)) + bytes(7 * 32)
    assert await negotiated.ack(5, table, [negotiated.memory()]) == ACK


async def test_a_new_table_replaces_the_old_one(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(5, regions((0, MEMORY_SIZE, USER_BASE, 0)), [ready.memory()]) == ACK
    assert len(device.named("set_memory")) == 2
    assert not device.named("stop_queue")


async def test_a_new_table_must_hold_the_running_ring(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(5, regions((0, PAGE, USER_BASE, 0)), [ready.memory()]) == NACK
    assert "available ring of 0x204 bytes at user address 0x7f0000002000" in device.failures[0]
    assert len(device.named("set_memory")) == 1


async def test_an_empty_table_under_a_running_ring(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(5, regions()) == NACK
    assert "an empty memory table while ring 0 runs" in device.failures[0]


@pytest.mark.parametrize(
    ("region", "said"),
    [
        pytest.param((0, 0, USER_BASE, 0), "is empty", id="empty"),
        pytest.param(((1 << 64) - PAGE, 2 * PAGE, 0, 0), "ends beyond 64 bits in guest addresses", id="guest overflow"),
        pytest.param((0, 2 * PAGE, (1 << 64) - PAGE, 0), "ends beyond 64 bits in user addresses", id="user overflow"),
        pytest.param((0, 2 * PAGE, 0, (1 << 64) - PAGE), "ends beyond 64 bits in file addresses", id="file overflow"),
        pytest.param((0, MEMORY_SIZE + PAGE, 0, 0), "up to the file's size, 0x100000", id="longer than the file"),
        pytest.param((0, MEMORY_SIZE, 0, PAGE), "ends at 0x101000 of its file", id="beyond the file"),
    ],
)
async def test_a_bad_region(
    negotiated: Guest, device: RecordingDevice, region: tuple[int, int, int, int], said: str
) -> None:
    assert await negotiated.ack(5, regions(region), [negotiated.memory()]) == NACK
    assert said in device.failures[0]
    assert 'vhost-user, "Memory region description"' in device.failures[0]
    assert not device.named("set_memory")


@pytest.mark.parametrize(
    ("second", "space"),
    [
        pytest.param((PAGE, 2 * PAGE, USER_BASE + 8 * PAGE, 0), "guest", id="guest"),
        pytest.param((8 * PAGE, 2 * PAGE, USER_BASE + PAGE, 0), "user", id="user"),
        pytest.param((0, 2 * PAGE, USER_BASE, 0), "guest", id="twice the same"),
    ],
)
async def test_overlapping_regions(
    negotiated: Guest, device: RecordingDevice, second: tuple[int, int, int, int], space: str
) -> None:
    fd = negotiated.memory()
    assert await negotiated.ack(5, regions((0, 2 * PAGE, USER_BASE, 0), second), [fd, fd]) == NACK
    assert f"in {space} addresses; allowed: disjoint regions" in device.failures[0]


@pytest.mark.parametrize("count", [0, 1, 3, 8])
async def test_descriptors_must_match_the_regions(negotiated: Guest, device: RecordingDevice, count: int) -> None:
    fd = negotiated.memory()
    table = regions((0, PAGE, 0, 0), (PAGE, PAGE, PAGE, 0))
    assert await negotiated.ack(5, table, [fd] * count) == NACK
    assert f"{count} file descriptors; allowed: 2 (1 for each region)" in device.failures[0]


async def test_nine_regions(negotiated: Guest, device: RecordingDevice) -> None:
    fd = negotiated.memory()
    table = regions(*((i * PAGE, PAGE, i * PAGE, 0) for i in range(9)))
    assert await negotiated.ack(5, table, [fd] * 8) == NACK
    assert "9 regions; allowed: 0 to 8" in device.failures[0]


@pytest.mark.parametrize("size", [0, 7, 8, 39, 41, 72])
async def test_wrong_size(negotiated: Guest, device: RecordingDevice, size: int) -> None:
    table = (regions((0, PAGE, 0, 0)) + bytes(64))[:size]
    assert await negotiated.ack(5, table, [negotiated.memory()]) == NACK
    assert f"payload of {size} bytes" in device.failures[0]


async def test_a_descriptor_that_cannot_be_mapped(negotiated: Guest, device: RecordingDevice) -> None:
    read_end, write_end = os.pipe()
    negotiated.own(read_end)
    negotiated.own(write_end)
    assert await negotiated.ack(5, regions((0, PAGE, 0, 0)), [read_end]) == NACK
    assert "cannot be mapped" in device.failures[0]


async def test_without_need_reply_a_bad_table_ends_the_connection(negotiated: Guest, device: RecordingDevice) -> None:
    negotiated.send(5, regions((0, 0, 0, 0)), [negotiated.memory()])
    assert await negotiated.closed()
    assert device.failures[0].endswith("connection closed")
    assert device.end.startswith("SET_MEM_TABLE: region")


async def test_a_device_that_refuses_keeps_the_old_table(ready: Guest, device: RecordingDevice) -> None:
    device.failing.add("set_memory")
    assert await ready.ack(5, regions((0, PAGE, 0, 0)), [ready.memory()]) == NACK
    await ready.start()
    assert device.named("start_queue")
