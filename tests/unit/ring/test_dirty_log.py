"""A device in Python logs what it writes: through its memory and through its queues."""

from __future__ import annotations

import os

import pytest

from ring.shared_memory import BUFFERS, BYTES, Layout, Queue
from viaduct._core import DeviceQueue, DirtyLog, DriverQueue, GuestMemory

PAGE = 4096
LOG_BYTES = BYTES // PAGE // 8


def pages(fd: int) -> set[int]:
    bits = int.from_bytes(os.pread(fd, LOG_BYTES, 0), "little")
    os.pwrite(fd, bytes(LOG_BYTES), 0)
    return {page for page in range(8 * LOG_BYTES) if bits >> page & 1}


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_buffers_and_rings_of_a_device_queue(layout: Layout) -> None:
    file, log_file = os.memfd_create("memory"), os.memfd_create("log")
    try:
        os.ftruncate(file, BYTES)
        os.ftruncate(log_file, LOG_BYTES)
        memory = GuestMemory().with_region(0, BYTES, 0, 0, file)
        base = 0x8000_8000 if layout == "packed" else 0
        descriptor, driver_addr, device_addr = Queue(layout, 256, base, False, False, False).addresses
        driver = DriverQueue(
            memory,
            layout=layout,
            size=256,
            descriptor_addr=descriptor,
            driver_addr=driver_addr,
            device_addr=device_addr,
        )
        device = DeviceQueue(
            memory,
            layout=layout,
            size=256,
            descriptor_addr=descriptor,
            driver_addr=driver_addr,
            device_addr=device_addr,
        )
        driver.add([], [(BUFFERS, 3 * PAGE)], 7)
        driver.kick()
        taken_before = device.pop()
        assert taken_before is not None
        taken_before.write(b"before the log")
        device.set_log_addr(device_addr)
        device.set_memory(memory.with_log(DirtyLog(log_file, LOG_BYTES)))
        ring = {device_addr // PAGE} | ({descriptor // PAGE} if layout == "packed" else set())
        assert pages(log_file) == ring
        taken_before.write(bytes(PAGE))
        device.push(taken_before)
        device.publish()
        buffers = {BUFFERS // PAGE, BUFFERS // PAGE + 1}
        assert pages(log_file) == buffers | {(descriptor if layout == "packed" else device_addr) // PAGE}
        assert driver.take() == (7, len(b"before the log") + PAGE)
    finally:
        os.close(file)
        os.close(log_file)


def test_a_log_that_is_too_small_is_refused() -> None:
    file = os.memfd_create("memory")
    try:
        os.ftruncate(file, BYTES)
        memory = GuestMemory().with_region(0, BYTES, 0, 0, file)
        log = DirtyLog(file, LOG_BYTES - 1)
        assert log.covers(0, BYTES - 8 * PAGE)
        assert not log.covers(0, BYTES)
        with pytest.raises(ValueError, match="make the log larger first"):
            memory.with_log(log)
    finally:
        os.close(file)
