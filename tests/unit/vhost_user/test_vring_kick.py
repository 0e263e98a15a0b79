"""SET_VRING_KICK, with which a ring starts (vhost-user, "Ring states")."""

import os

import pytest

from vhost_user.stand_ins import RecordingDevice
from vhost_user.wire_client import ACK, NACK, NO_FD, USER_BASE, Guest, regions, state, u64
from viaduct.vhost_user import Vring
from viaduct.vhost_user.event_fd import check_event_fd, drain, signal


async def test_starts_the_ring_with_all_that_was_said(ready: Guest, device: RecordingDevice) -> None:
    assert await ready.ack(13, u64(1), [ready.event()]) == ACK
    assert await ready.ack(14, u64(1), [ready.event()]) == ACK
    await ready.start(1, size=128, base=3)
    vring: Vring = device.named("start_queue")[0][1]
    start = USER_BASE + 0x10000
    assert (vring.index, vring.size, vring.base) == (1, 128, 3)
    assert (vring.descriptor_addr, vring.driver_addr, vring.device_addr) == (start, start + 0x2000, start + 0x3000)
    assert None not in (vring.kick_fd, vring.call_fd, vring.err_fd)


async def test_without_descriptor_the_ring_is_polled(ready: Guest, device: RecordingDevice) -> None:
    await ready.start(0)
    assert await ready.ack(12, u64(0 | NO_FD)) == ACK
    assert device.named("start_queue")[-1][1].kick_fd is None


async def test_order_does_not_matter(wire: Guest, device: RecordingDevice) -> None:
    assert await wire.ack(12, u64(0), [wire.event()]) == ACK
    assert await wire.ack(9, wire.place(0)) == ACK
    assert await wire.ack(8, state(0, 256)) == ACK
    await wire.share()
    assert not device.named("start_queue")
    await wire.negotiate()
    assert len(device.named("start_queue")) == 1


async def test_a_ring_that_waits_for_memory_starts_with_the_table_that_holds_it(
    negotiated: Guest, device: RecordingDevice
) -> None:
    assert await negotiated.ack(12, u64(0), [negotiated.event()]) == ACK
    assert await negotiated.ack(8, state(0, 256)) == ACK
    assert await negotiated.ack(9, negotiated.place(0)) == ACK
    assert await negotiated.ack(5, regions((0, 4096, 0, 0)), [negotiated.memory()]) == ACK
    assert not device.named("start_queue")
    await negotiated.share()
    assert len(device.named("start_queue")) == 1


async def test_a_new_kick_restarts_the_ring_where_it_stands(ready: Guest, device: RecordingDevice) -> None:
    await ready.start()
    assert await ready.ack(18, state(0, 1)) == ACK
    device.base = 42
    assert await ready.ack(12, u64(0), [ready.event()]) == ACK
    assert [call[0] for call in device.calls[-3:]] == ["stop_queue", "start_queue", "enable_queue"]
    assert device.named("start_queue")[-1][1].base == 42


@pytest.mark.parametrize("request_number", [12, 13, 14])
@pytest.mark.parametrize(("payload", "count"), [(0, 0), (0, 2), (NO_FD, 1)])
async def test_missing_or_surplus_descriptors(
    ready: Guest, device: RecordingDevice, request_number: int, payload: int, count: int
) -> None:
    assert await ready.ack(request_number, u64(payload), [ready.event() for _ in range(count)]) == NACK
    assert (
        f"{count} file descriptors; allowed: {0 if payload else 1} (1, or none if bit 8 is set)" in device.failures[0]
    )


@pytest.mark.parametrize("request_number", [12, 13, 14])
async def test_a_descriptor_that_carries_no_events(ready: Guest, device: RecordingDevice, request_number: int) -> None:
    assert await ready.ack(request_number, u64(0), [ready.memory()]) == NACK
    assert "a file descriptor of /memfd:guest (deleted); allowed: an eventfd or a pipe" in device.failures[0]


@pytest.mark.parametrize("request_number", [12, 13, 14])
async def test_a_pipe_does(ready: Guest, request_number: int) -> None:
    for end in os.pipe():
        assert await ready.ack(request_number, u64(0), [ready.own(end)]) == ACK


@pytest.mark.parametrize("request_number", [12, 13, 14])
async def test_no_such_ring(ready: Guest, request_number: int) -> None:
    assert await ready.ack(request_number, u64(6), [ready.event()]) == NACK


async def test_a_device_that_cannot_start(ready: Guest, device: RecordingDevice) -> None:
    device.failing.add("start_queue")
    assert await ready.ack(8, state(0, 256)) == ACK
    assert await ready.ack(9, ready.place(0)) == ACK
    assert await ready.ack(12, u64(0), [ready.event()]) == NACK
    device.failing.clear()
    assert await ready.ack(12, u64(0), [ready.event()]) == ACK


def test_signals_are_taken_at_once_and_an_end_is_told() -> None:
    read_end, write_end = os.pipe()
    semaphore = os.eventfd(0xFFFF_FFFE, os.EFD_SEMAPHORE)
    check_event_fd(read_end)
    check_event_fd(semaphore)
    assert drain(read_end)
    signal(write_end)
    assert drain(read_end)
    os.close(write_end)
    assert not drain(read_end)
    assert drain(semaphore)
    os.close(read_end)
    os.close(semaphore)


def test_the_wrong_ends_of_pipes_are_no_errors() -> None:
    read_end, write_end = os.pipe()
    signal(read_end)
    assert not drain(write_end)
    os.close(read_end)
    os.close(write_end)


def test_a_signal_to_what_nobody_reads_is_dropped() -> None:
    read_end, write_end = os.pipe()
    full = os.eventfd(0xFFFF_FFFE)
    check_event_fd(write_end)
    check_event_fd(full)
    os.close(read_end)
    signal(write_end)
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE - 0xFFFF_FFFE)
    signal(full)
    signal(None)
    os.close(write_end)
    os.close(full)
