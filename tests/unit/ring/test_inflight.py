"""A device process is killed with SIGKILL while it serves; the next one goes on where it was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from viaduct._core import DriverQueue, GuestMemory, inflight_bytes

from .shared_memory import BUFFERS, BYTES, Layout, Queue

# Serves for ever: answers each number with its successor, in batches and out of order, and always keeps two back.
DEVICE = """
import sys, time
from viaduct._core import DeviceQueue, GuestMemory
memory_fd, record_fd, layout, size, descriptor, driver, device = sys.argv[1], sys.argv[2], sys.argv[3], *sys.argv[4:]
memory = GuestMemory().with_region(0, int(size), 0, 0, int(memory_fd))
queue = DeviceQueue(memory, layout=layout, size=16, descriptor_addr=int(descriptor), driver_addr=int(driver),
                    device_addr=int(device))
print(queue.attach_inflight(int(record_fd), 64), flush=True)
held = []
while True:
    while len(held) < 5 and (chain := queue.pop()) is not None:
        held.append(chain)
    for chain in reversed(held[:-2]):
        number = int.from_bytes(chain.read(), "little")
        chain.write((number + 1).to_bytes(8, "little"))
        queue.push(chain)
    del held[:-2]
    queue.publish()
    time.sleep(0.0001)
"""


@pytest.mark.parametrize("layout", ["split", "packed"])
def test_a_killed_device_loses_nothing(layout: Layout) -> None:
    queue = Queue(layout, 16, 0 if layout == "split" else 0x8000_8000, False, False, False)
    memory_fd, record_fd = os.memfd_create("memory"), os.memfd_create("record")
    os.ftruncate(memory_fd, BYTES)
    os.ftruncate(record_fd, 64 + inflight_bytes(layout, 16))
    memory = GuestMemory().with_region(0, BYTES, 0, 0, memory_fd)
    descriptor, driver_addr, device_addr = queue.addresses
    driver = DriverQueue(
        memory,
        layout=layout,
        size=16,
        descriptor_addr=descriptor,
        driver_addr=driver_addr,
        device_addr=device_addr,
    )
    arguments = [str(part) for part in (memory_fd, record_fd, layout, BYTES, *queue.addresses)]

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", DEVICE, *arguments], pass_fds=(memory_fd, record_fd), stdout=subprocess.PIPE
        )

    sent = back = resumed = 0
    outstanding: set[int] = set()

    def exchange() -> None:
        nonlocal sent, back
        while len(outstanding) < 8:
            place = BUFFERS + sent % 64 * 32
            memory.write(place, sent.to_bytes(8, "little"))
            assert driver.add([(place, 8)], [(place + 16, 8)], sent)
            outstanding.add(sent)
            sent += 1
        driver.kick()
        while (taken := driver.take()) is not None:
            token, written = taken
            outstanding.remove(token)
            assert written == 8
            assert int.from_bytes(memory.read(BUFFERS + token % 64 * 32 + 16, 8), "little") == token + 1
            back += 1

    process = start()
    try:
        for round in range(4):
            goal = back + 40
            deadline = time.monotonic() + 60
            while back < goal:
                exchange()
                time.sleep(0.0002)
                assert process.poll() is None, "the device gave up"
                assert time.monotonic() < deadline, "the queue stands still"
            if round == 3:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            resumed += int(process.stdout.readline())
            process.stdout.close()
            process = start()
    finally:
        process.kill()
        process.wait()
        assert process.stdout is not None
        resumed += int(process.stdout.readline())
        process.stdout.close()
        os.close(memory_fd)
        os.close(record_fd)
    assert resumed > 0, "no device was killed with chains in its hands"
