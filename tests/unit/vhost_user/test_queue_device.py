"""Devices that answer in Python, driven by our own front-end and driver over shared memory."""

from __future__ import annotations

import asyncio
import os
import runpy
import signal
import sys
import threading
from collections.abc import Awaitable
from pathlib import Path

import pytest

from vhost_user.driver import Driver
from vhost_user.stand_ins import until
from viaduct._core import Chain
from viaduct.vhost_user import Backend, FrontEnd, QueueDevice
from viaduct.virtio import DeviceFeature, DeviceType

EXAMPLE = Path(__file__).parents[3] / "examples" / "rng.py"
ALL = DeviceFeature.VERSION_1 | DeviceFeature.INDIRECT_DESC
LAYOUTS = [
    pytest.param(ALL, id="split"),
    pytest.param(ALL | DeviceFeature.EVENT_IDX, id="split, event index"),
    pytest.param(ALL | DeviceFeature.RING_PACKED, id="packed"),
    pytest.param(ALL | DeviceFeature.RING_PACKED | DeviceFeature.EVENT_IDX, id="packed, event suppression"),
]


class Echo(QueueDevice):
    """Gives back what it reads, in upper case."""

    device_id = DeviceType.CONSOLE
    queue_count = 2

    def handle(self, queue: int, chain: Chain) -> Awaitable[None] | None:
        chain.write(chain.read().upper())
        return None


class SlowEcho(QueueDevice):
    """Gives back what it reads as soon as it is told to."""

    device_id = DeviceType.CONSOLE

    def __init__(self) -> None:
        super().__init__()
        self.waiting: dict[bytes, asyncio.Event] = {}

    async def handle(self, queue: int, chain: Chain) -> None:
        text = chain.read()
        self.waiting[text] = asyncio.Event()
        await self.waiting[text].wait()
        chain.write(text)


class Broken(QueueDevice):
    device_id = DeviceType.CONSOLE

    def handle(self, queue: int, chain: Chain) -> None:
        raise KeyError("no such thing")


def front_end(path: Path, features: int, queues: int = 1, track_inflight: bool = False) -> FrontEnd:
    return FrontEnd(
        str(path),
        device_id=DeviceType.CONSOLE,
        features=features,
        required=features,
        queue_count=queues,
        queue_size=8,
        memory_size=1 << 20,
        user_base=0x7F00_0000_0000,
        track_inflight=track_inflight,
    )


@pytest.mark.parametrize("features", LAYOUTS)
async def test_requests_are_answered(socket_dir: Path, features: int) -> None:
    path = socket_dir / "s"
    async with Backend(Echo(), str(path)), front_end(path, features, queues=2) as fe:
        drivers = [Driver(fe, index) for index in range(2)]
        for round_ in range(50):
            for driver in drivers:
                text = f"round {round_}".encode()
                assert await driver.ask(text, 64) == text.upper()


@pytest.mark.parametrize("features", LAYOUTS)
async def test_a_full_ring_at_once(socket_dir: Path, features: int) -> None:
    path = socket_dir / "s"
    async with Backend(Echo(), str(path)), front_end(path, features, queues=2) as fe:
        driver = Driver(fe, 0)
        texts = [f"text {i}".encode() for i in range(4)]
        assert await driver.ask_all(texts, 64) == [text.upper() for text in texts]


async def test_a_stopped_queue_goes_on(socket_dir: Path) -> None:
    path = socket_dir / "s"
    async with Backend(Echo(), str(path)), front_end(path, ALL, queues=2) as fe:
        assert await Driver(fe, 0).ask(b"before", 64) == b"BEFORE"
        assert await fe.stop() == [1, 0]
        await fe.start()
        assert await Driver(fe, 0).ask(b"after", 64) == b"AFTER"


@pytest.mark.parametrize("features", LAYOUTS)
async def test_requests_finish_in_any_order(socket_dir: Path, features: int) -> None:
    path = socket_dir / "s"
    device = SlowEcho()
    async with Backend(device, str(path)), front_end(path, features) as fe:
        driver = Driver(fe, 0)
        asking = asyncio.create_task(driver.ask_all([b"one", b"two"], 64))
        await until(lambda: len(device.waiting) == 2)
        device.waiting[b"two"].set()
        await asyncio.sleep(0.001)
        device.waiting[b"one"].set()
        assert await asking == [b"one", b"two"]
        assert driver.order == [1, 0]


async def test_a_stop_waits_for_what_is_in_flight(socket_dir: Path) -> None:
    path = socket_dir / "s"
    device = SlowEcho()
    async with Backend(device, str(path)), front_end(path, ALL) as fe:
        driver = Driver(fe, 0)
        asking = asyncio.create_task(driver.ask(b"one", 64))
        await until(lambda: device.waiting)
        stopping = asyncio.create_task(fe.stop())
        await asyncio.sleep(0.01)
        assert not stopping.done()
        device.waiting[b"one"].set()
        assert await stopping == [1]
        assert await asking == b"one"


async def test_a_front_end_that_gives_up_waiting_is_let_go(socket_dir: Path) -> None:
    """A device that never finishes a request keeps no socket from the next front-end."""
    path = socket_dir / "s"
    device = SlowEcho()
    async with Backend(device, str(path)):
        fe = front_end(path, ALL)
        await fe.start()
        asking = asyncio.create_task(Driver(fe, 0).ask(b"one", 64))
        await until(lambda: device.waiting)
        stopping = asyncio.create_task(fe.stop())
        await asyncio.sleep(0.01)
        asking.cancel()
        stopping.cancel()
        await asyncio.wait([asking, stopping])
        fe.queues = ()
        await fe.close()
        async with front_end(path, ALL) as other:
            assert len(other.queues) == 1


async def test_what_is_in_flight_is_dropped_with_the_front_end(socket_dir: Path) -> None:
    path = socket_dir / "s"
    device = SlowEcho()
    async with Backend(device, str(path)):
        fe = front_end(path, ALL)
        await fe.start()
        driver = Driver(fe, 0)
        asking = asyncio.create_task(driver.ask(b"one", 64))
        await until(lambda: device.waiting)
        asking.cancel()
        fe.queues = ()  # As if it had crashed: no GET_VRING_BASE.
        del driver
        await fe.close()
        async with front_end(path, ALL) as other:
            device.waiting.clear()
            asking = asyncio.create_task(Driver(other, 0).ask(b"two", 64))
            await until(lambda: device.waiting)
            device.waiting[b"two"].set()
            assert await asking == b"two"


async def test_a_driver_that_breaks_its_ring_is_told(socket_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = socket_dir / "s"
    async with Backend(Echo(), str(path), name="echo"), front_end(path, ALL, queues=2) as fe:
        queue = fe.queues[0]
        os.pwrite(fe.memory_fd, b"\x00\x00\xff\x7f", queue.driver_addr)  # available index 32767 of 8
        os.eventfd_write(queue.kick_fd, 1)
        await until(lambda: "the queue stays stopped" in caplog.text)
        assert f"port echo ({path}, peer pid {os.getpid()}): queue 0: " in caplog.text
        assert await Driver(fe, 1).ask(b"still here", 64) == b"STILL HERE"


async def test_a_device_that_raises_stops_its_queue_only(socket_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = socket_dir / "s"
    async with Backend(Broken(), str(path)), front_end(path, ALL) as fe:
        driver = Driver(fe, 0)
        asking = asyncio.create_task(driver.ask(b"x", 8))
        await until(lambda: "the device failed: KeyError: 'no such thing'" in caplog.text)
        asking.cancel()
        assert await fe.stop() == [1]
    caplog.clear()  # Its tracebacks hold the memory.


async def test_a_disabled_queue_waits(socket_dir: Path) -> None:
    path = socket_dir / "s"
    device = SlowEcho()
    async with Backend(device, str(path)), front_end(path, ALL) as fe:
        await fe.enable(0, False)
        asking = asyncio.create_task(Driver(fe, 0).ask(b"one", 64))
        await asyncio.sleep(0.01)
        assert not device.waiting
        await fe.enable(0, True)
        await until(lambda: device.waiting)
        device.waiting[b"one"].set()
        assert await asking == b"one"


async def test_a_queue_without_kicks_is_polled(socket_dir: Path) -> None:
    path = socket_dir / "s"
    async with Backend(Echo(), str(path)), front_end(path, ALL, queues=2) as fe:
        await fe.request("SET_VRING_KICK", (0x100,))
        assert await Driver(fe, 0).ask(b"no kick reaches it", 64) == b"NO KICK REACHES IT"


async def test_a_kick_that_never_ends_occupies_nobody(socket_dir: Path) -> None:
    """The writing end of a pipe is closed, so it is readable for ever; a semaphore holds more than can be counted."""
    path = socket_dir / "s"
    device = Echo()
    async with Backend(device, str(path)), front_end(path, ALL, queues=2) as fe:
        read_end, write_end = os.pipe()
        os.close(write_end)
        await fe.request("SET_VRING_KICK", (0,), [read_end])
        os.close(read_end)
        semaphore = os.eventfd(0xFFFF_FFFE, os.EFD_SEMAPHORE)
        await fe.request("SET_VRING_KICK", (1,), [semaphore])
        os.close(semaphore)
        assert await Driver(fe, 1).ask(b"still here", 64) == b"STILL HERE"


async def test_the_entropy_example(socket_dir: Path) -> None:
    example = runpy.run_path(str(EXAMPLE))
    path = socket_dir / "s"
    async with Backend(example["Rng"](), str(path)), front_end(path, ALL) as fe:
        driver = Driver(fe, 0)
        first, second = await driver.ask(b"", 64), await driver.ask(b"", 64)
        assert len(first) == len(second) == 64
        assert first != second
        assert len(await driver.ask(b"", 100_000)) == 65536


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_the_example_ends_when_told_to(socket_dir: Path, number: signal.Signals) -> None:
    path = socket_dir / "s"
    threads = threading.active_count()
    process = await asyncio.create_subprocess_exec(sys.executable, EXAMPLE, path, stderr=asyncio.subprocess.PIPE)
    async with front_end(path, ALL) as fe:
        assert len(await Driver(fe, 0).ask(b"", 64)) == 64
        process.send_signal(number)
        _, errors = await process.communicate()
        await fe.lost.wait()
    assert (process.returncode, errors) == (0, b"")
    await until(lambda: threading.active_count() == threads)  # asyncio waits for a child in a thread.
    assert not os.listdir(socket_dir)


@pytest.mark.parametrize("features", LAYOUTS)
async def test_what_a_killed_device_owed_is_asked_of_the_next(socket_dir: Path, features: int) -> None:
    path = socket_dir / "s"
    fe = front_end(path, features, track_inflight=True)
    old, new = SlowEcho(), SlowEcho()
    backend = Backend(old, str(path))
    await backend.start()
    try:
        await fe.start()
        driver = Driver(fe, 0)
        bases = [queue.base for queue in fe.queues]
        asking = asyncio.create_task(driver.ask_all([b"one", b"two", b"three"], 64))
        await until(lambda: len(old.waiting) == 3)
        old.waiting[b"two"].set()
        await until(lambda: driver.order == [1])
        await backend.close()  # what is in flight is dropped, as if the process had died
        backend = Backend(new, str(path))
        await backend.start()
        await fe.lost.wait()
        await fe.start(bases)
        await until(lambda: len(new.waiting) == 2)
        assert list(new.waiting) == [b"one", b"three"], "in the order in which they were taken, and no other"
        for event in new.waiting.values():
            event.set()
        assert await asking == [b"one", b"two", b"three"]
    finally:
        await fe.close()
        await backend.close()
