"""GET_MAX_MEM_SLOTS, ADD_MEM_REG and REM_MEM_REG."""

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, MEMORY_SIZE, NACK, USER_BASE, Guest, single, u64
from viaduct.vhost_user import ProtocolFeature

PAGE = 4096


async def test_slots(negotiated: Guest) -> None:
    assert (await negotiated.ask(36)).u64 == 509


async def test_all_slots_are_filled_and_emptied(negotiated: Guest, device: RecordingDevice) -> None:
    fd = negotiated.memory()
    places = [(2 * i * PAGE, PAGE, USER_BASE + i * PAGE, 0) for i in range(510)]
    for place in places[:509]:
        assert await negotiated.ack(37, single(place), [fd]) == ACK
    assert await negotiated.ack(37, single(places[509]), [fd]) == NACK
    assert "one more region; allowed: 509" in device.failures[0]
    for place in places[:509]:
        assert await negotiated.ack(38, single(place)) == ACK
    assert await negotiated.ack(38, single(places[0])) == NACK
    assert "none, the table is empty" in device.failures[1]


async def test_a_ring_in_an_added_region(negotiated: Guest, device: RecordingDevice) -> None:
    region = single((0, MEMORY_SIZE, USER_BASE, 0))
    assert await negotiated.ack(37, region, [negotiated.memory()]) == ACK
    await negotiated.start()
    assert await negotiated.ack(38, region) == NACK
    assert "an empty memory table while ring 0 runs" in device.failures[0]
    await negotiated.ask(11, u64(0))
    assert await negotiated.ack(38, region) == ACK


async def test_removal_ignores_the_offset_and_closes_a_descriptor(negotiated: Guest) -> None:
    fd = negotiated.memory()
    assert await negotiated.ack(37, single((0, PAGE, USER_BASE, PAGE)), [fd]) == ACK
    assert await negotiated.ack(38, single((0, PAGE, USER_BASE, 0)), [fd]) == ACK


@pytest.mark.parametrize("wrong", [(PAGE, PAGE, USER_BASE, 0), (0, 2 * PAGE, USER_BASE, 0), (0, PAGE, 0, 0)])
async def test_removal_of_what_is_not_there(
    negotiated: Guest, device: RecordingDevice, wrong: tuple[int, int, int, int]
) -> None:
    assert await negotiated.ack(37, single((0, PAGE, USER_BASE, 0)), [negotiated.memory()]) == ACK
    assert await negotiated.ack(38, single(wrong)) == NACK
    assert 'vhost-user, "VHOST_USER_REM_MEM_REG"' in device.failures[0]


async def test_overlap(negotiated: Guest, device: RecordingDevice) -> None:
    fd = negotiated.memory()
    assert await negotiated.ack(37, single((0, 2 * PAGE, USER_BASE, 0)), [fd]) == ACK
    assert await negotiated.ack(37, single((PAGE, PAGE, 0, 0)), [fd]) == NACK
    assert "overlaps region" in device.failures[0]


@pytest.mark.parametrize("count", [0, 2])
async def test_add_takes_one_descriptor(negotiated: Guest, device: RecordingDevice, count: int) -> None:
    fd = negotiated.memory()
    assert await negotiated.ack(37, single((0, PAGE, 0, 0)), [fd] * count) == NACK
    assert f"{count} file descriptors; allowed: 1" in device.failures[0]


@pytest.mark.parametrize("size", [0, 32, 39, 48])
async def test_wrong_size(negotiated: Guest, device: RecordingDevice, size: int) -> None:
    assert await negotiated.ack(37, bytes(size), [negotiated.memory()]) == NACK
    assert f"payload of {size} bytes; allowed: 40 bytes" in device.failures[0]


async def test_needs_the_feature(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(37, single((0, PAGE, 0, 0)), [wire.memory()]) == NACK
    assert "was offered but not acknowledged" in device.failures[0]
    device.protocol_features &= ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    assert await wire.ack(37, single((0, PAGE, 0, 0)), [wire.memory()]) == NACK
    assert "does not offer" in device.failures[1]


async def test_a_region_added_again_is_removed_as_often(negotiated: Guest, device: RecordingDevice) -> None:
    """As QEMU before 8.0 does, once for every queue pair."""
    region, fd = single((0, MEMORY_SIZE, USER_BASE, 0)), negotiated.memory()
    for _ in range(3):
        assert await negotiated.ack(37, region, [fd]) == ACK
    await negotiated.start()
    for _ in range(2):
        assert await negotiated.ack(38, region) == ACK
    assert await negotiated.ack(38, region) == NACK
    assert "an empty memory table while ring 0 runs" in device.failures[0]


async def test_the_same_addresses_in_another_file_overlap(negotiated: Guest, device: RecordingDevice) -> None:
    region = single((0, PAGE, USER_BASE, 0))
    assert await negotiated.ack(37, region, [negotiated.memory()]) == ACK
    assert await negotiated.ack(37, region, [negotiated.memory()]) == NACK
    assert "overlaps region" in device.failures[0]
