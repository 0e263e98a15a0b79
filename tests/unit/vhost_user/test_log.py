"""SET_LOG_BASE, SET_LOG_FD, and the two switches of logging: LOG_ALL and VHOST_VRING_F_LOG."""

import os
import struct

import pytest

from vhost_user.stand_ins import RecordingDevice, until
from vhost_user.wire_client import (
    ACK,
    FEATURES,
    MEMORY_SIZE,
    NACK,
    RING_STEP,
    USER_BASE,
    Guest,
    address,
    regions,
    single,
    u64,
)

LOG_ALL = 1 << 26
PAGES = MEMORY_SIZE // 4096
OFFSET = 4096
BYTES = PAGES // 8


def pages(fd: int, offset: int = OFFSET, size: int = BYTES) -> set[int]:
    """The pages whose bits are set."""
    bits = int.from_bytes(os.pread(fd, size, offset), "little")
    return {page for page in range(8 * size) if bits >> page & 1}


async def log_base(guest: Guest, size: int = BYTES, file_size: int = OFFSET + BYTES) -> int:
    """Sets a log of `size` bytes at `OFFSET` of a new file, and returns the file."""
    fd = guest.memory(file_size)
    reply = await guest.ask(6, struct.pack("=QQ", size, OFFSET), [fd])
    assert reply.payload == b""
    return fd


async def switch_log(guest: Guest, on: bool) -> None:
    assert await guest.ack(2, u64(FEATURES | (LOG_ALL if on else 0))) == ACK


@pytest.fixture
def logging_device(device: RecordingDevice) -> RecordingDevice:
    device.features |= LOG_ALL
    return device


async def test_what_is_written_is_logged_while_both_are_there(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready)
    logging_device.memory.write(5 * 4096, b"before LOG_ALL")
    assert pages(fd) == set()
    await switch_log(ready, True)
    logging_device.memory.write(7 * 4096, b"one page")
    logging_device.memory.write(9 * 4096 - 1, b"two pages")
    assert pages(fd) == {7, 8, 9}
    await switch_log(ready, False)
    logging_device.memory.write(20 * 4096, b"after LOG_ALL")
    assert pages(fd) == {7, 8, 9}


async def test_features_first(ready: Guest, logging_device: RecordingDevice) -> None:
    """QEMU's order when a back-end comes back during a migration."""
    await switch_log(ready, True)
    logging_device.memory.write(4096, b"no log yet")
    fd = await log_base(ready)
    logging_device.memory.write(2 * 4096, b"logged")
    assert pages(fd) == {2}


async def test_bits_around_the_log_are_left_alone(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready, file_size=OFFSET + BYTES + 64)
    await switch_log(ready, True)
    logging_device.memory.write(0, bytes(MEMORY_SIZE))
    assert pages(fd) == set(range(PAGES))
    assert os.pread(fd, OFFSET, 0) == bytes(OFFSET)
    assert os.pread(fd, 64, OFFSET + BYTES) == bytes(64)


async def test_another_log_takes_over(ready: Guest, logging_device: RecordingDevice) -> None:
    first = await log_base(ready)
    await switch_log(ready, True)
    second = await log_base(ready, size=2 * BYTES, file_size=OFFSET + 2 * BYTES)
    logging_device.memory.write(3 * 4096, b"x")
    assert (pages(first), pages(second)) == (set(), {3})


async def test_regions_that_come_are_logged_too(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready, size=2 * BYTES, file_size=OFFSET + 2 * BYTES)
    await switch_log(ready, True)
    more = (MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0)
    assert await ready.ack(37, single(more), [ready.memory()]) == ACK
    logging_device.memory.write(MEMORY_SIZE + 4096, b"x")
    assert pages(fd, size=2 * BYTES) == {PAGES + 1}


async def test_the_memory_may_not_outgrow_the_log(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready)
    await switch_log(ready, True)
    more = (MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0)
    assert await ready.ack(37, single(more), [ready.memory()]) == NACK
    assert "for region [" in logging_device.failures[0]
    logging_device.memory.write(0, b"x")
    assert pages(fd) == {0}


async def test_an_old_log_does_not_limit_the_memory(ready: Guest, logging_device: RecordingDevice) -> None:
    """QEMU leaves the log of an ended migration where it is, and sends a larger one before the next."""
    await log_base(ready)
    more = (MEMORY_SIZE, MEMORY_SIZE, USER_BASE + MEMORY_SIZE, 0)
    assert await ready.ack(37, single(more), [ready.memory()]) == ACK
    assert await ready.ack(2, u64(FEATURES | LOG_ALL)) == NACK
    assert "allowed: a log that covers all regions" in logging_device.failures[0]
    fd = await log_base(ready, size=2 * BYTES, file_size=OFFSET + 2 * BYTES)
    await switch_log(ready, True)
    logging_device.memory.write(MEMORY_SIZE, b"x")
    assert pages(fd, size=2 * BYTES) == {PAGES}


async def test_the_whole_table_replaced(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready)
    await switch_log(ready, True)
    assert await ready.ack(5, regions((4096, 4096, USER_BASE, 0)), [ready.memory(4096)]) == ACK
    logging_device.memory.write(4096, b"x")
    assert pages(fd) == {1}


async def test_a_ring_is_told_where_its_writes_are_logged(ready: Guest, logging_device: RecordingDevice) -> None:
    assert await ready.ack(9, log_place(1, log=0x5000)) == ACK
    await ready.start(0)
    (start,) = logging_device.named("start_queue")
    assert start[1].log_addr is None
    assert await ready.ack(9, log_place(0, log=0x3000)) == ACK
    assert await ready.ack(9, log_place(0, log=0x3000)) == ACK
    assert await ready.ack(9, ready.place(0)) == ACK
    assert logging_device.named("set_log_addr") == [("set_log_addr", 0, 0x3000), ("set_log_addr", 0, None)]


async def test_a_ring_that_starts_logged(ready: Guest, logging_device: RecordingDevice) -> None:
    assert await ready.ack(8, struct.pack("=II", 0, 256)) == ACK
    assert await ready.ack(9, log_place(0, log=0x3000)) == ACK
    assert await ready.ack(12, u64(0), [ready.event()]) == ACK
    (start,) = logging_device.named("start_queue")
    assert start[1].log_addr == 0x3000


def log_place(index: int, log: int) -> bytes:
    """`Guest.place` with VHOST_VRING_F_LOG."""
    start = USER_BASE + index * RING_STEP
    return address(index, start, start + 0x3000, start + 0x2000, flags=1, log=log)


# The used ring of `log_place` has 4 + 8 * 256 + 2 * EVENT_IDX bytes; EVENT_IDX is not acknowledged.
USED = 4 + 8 * 256


@pytest.mark.parametrize(
    ("log", "answer"),
    [(MEMORY_SIZE - USED, ACK), (MEMORY_SIZE - USED + 1, NACK), (1 << 63, NACK), ((1 << 64) - 1, NACK)],
)
async def test_a_ring_logged_beyond_the_log(
    ready: Guest, logging_device: RecordingDevice, log: int, answer: int
) -> None:
    await log_base(ready)
    await switch_log(ready, True)
    await ready.start(0)
    assert await ready.ack(9, log_place(0, log=log)) == answer
    assert [call[2] for call in logging_device.named("set_log_addr")] == ([log] if answer == ACK else [])
    for failure in logging_device.failures:
        assert f"ring 0: used ring of {USED:#x} bytes to be logged at {log:#x}; allowed: an end" in failure


async def test_a_log_that_is_too_small_for_a_ring(ready: Guest, logging_device: RecordingDevice) -> None:
    await ready.start(0)
    assert await ready.ack(9, log_place(0, log=MEMORY_SIZE)) == ACK
    ready.send(6, struct.pack("=QQ", BYTES, 0), [ready.memory()])
    assert await ready.closed()
    assert "ring 0: used ring of" in logging_device.failures[0]


@pytest.mark.parametrize(
    ("size", "offset", "said"),
    [
        (8192, 4096, "a log of 0x2000 bytes at offset 0x1000; allowed: a part of the file's 0x2000 bytes"),
        ((1 << 64) - 1, 4096, "a log of 0xffffffffffffffff bytes at offset 0x1000; allowed: a part"),
        (4096, (1 << 64) - 4096, "a log of 0x1000 bytes at offset 0xfffffffffffff000; allowed: a part"),
        (BYTES - 1, 0, f"a log of {BYTES - 1:#x} bytes, with bits up to {(BYTES - 1) * 8 * 4096:#x}, for region ["),
    ],
)
async def test_a_log_that_is_not_there(
    ready: Guest, logging_device: RecordingDevice, size: int, offset: int, said: str
) -> None:
    ready.send(6, struct.pack("=QQ", size, offset), [ready.memory(8192)])
    assert await ready.closed()
    assert said in logging_device.failures[0]


async def test_a_log_in_what_is_no_file(ready: Guest, logging_device: RecordingDevice) -> None:
    ready.send(6, struct.pack("=QQ", BYTES, 0), [ready.event()])
    assert await ready.closed()
    assert "SET_LOG_BASE" in logging_device.failures[0]


async def test_base_without_descriptor(negotiated: Guest, device: RecordingDevice) -> None:
    negotiated.send(6, struct.pack("=QQ", 4096, 0))
    assert await negotiated.closed()
    assert "0 file descriptors; allowed: 1" in device.failures[0]


async def test_base_as_an_address_of_the_front_ends(negotiated: Guest, device: RecordingDevice) -> None:
    negotiated.send(6, u64(0x7F0000000000))
    assert await negotiated.closed()
    assert "a log in no file; allowed: one of at least 1 byte" in device.failures[0]


async def test_a_truncated_log_cuts_the_front_end_off(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready)
    await switch_log(ready, True)
    os.ftruncate(fd, 0)
    assert not logging_device.memory.faulted
    logging_device.memory.write(0, b"x")
    assert logging_device.memory.faulted
    assert logging_device.memory.read(0, 1) == b"x"


async def test_an_event_tells_of_new_marks(ready: Guest, logging_device: RecordingDevice) -> None:
    first, second = ready.event(), ready.event()
    assert await ready.ack(7, b"", [first]) == ACK
    fd = await log_base(ready)
    await switch_log(ready, True)
    logging_device.memory.write(0, b"x")
    logging_device.memory.write(1, b"the same page")
    assert os.eventfd_read(first) == 1
    os.pwrite(fd, b"\0", OFFSET)
    logging_device.memory.write(0, b"x")
    assert os.eventfd_read(first) == 1
    assert await ready.ack(7, u64(0), [second]) == ACK
    logging_device.memory.write(4096, b"x")
    assert os.eventfd_read(second) == 1
    with pytest.raises(BlockingIOError):
        os.eventfd_read(first)


async def test_a_full_event_stops_nobody(ready: Guest, logging_device: RecordingDevice) -> None:
    event = ready.event()
    assert await ready.ack(7, b"", [event]) == ACK
    fd = await log_base(ready)
    await switch_log(ready, True)
    os.eventfd_write(event, (1 << 64) - 2)
    os.set_blocking(event, True)
    logging_device.memory.write(0, b"x")
    assert pages(fd) == {0}


async def test_fd_that_carries_no_events(negotiated: Guest) -> None:
    assert await negotiated.ack(7, b"", [negotiated.memory()]) == NACK


async def test_a_reset_ends_the_log(ready: Guest, logging_device: RecordingDevice) -> None:
    fd = await log_base(ready)
    await switch_log(ready, True)
    assert await ready.ack(34) == ACK
    logging_device.memory.write(0, b"x")
    assert pages(fd) == set()


async def test_the_log_goes_with_the_front_end(ready: Guest, logging_device: RecordingDevice) -> None:
    assert await ready.ack(7, b"", [ready.event()]) == ACK
    await log_base(ready)
    await switch_log(ready, True)
    ready.close()
    await until(lambda: logging_device.ended.is_set())
