"""Who serves a machine's queues, driven by a driver in the machine's RAM."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path

import pytest

from viaduct._core import Chain
from viaduct.vhost_user import Backend, QueueDevice
from viaduct.virtio import DeviceFeature, DeviceType
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.back_end.vhost_net import VhostNetBackEnd
from viaduct.vmm.back_end.vhost_user import VhostUserBackEnd
from viaduct.vmm.errors import MachineError
from viaduct.vmm.ram import Ram
from viaduct.vmm.virtio_slot import VirtioSlot

from .ring_driver import RingDriver

FEATURES = [
    pytest.param(DeviceFeature.VERSION_1, id="split"),
    pytest.param(DeviceFeature.VERSION_1 | DeviceFeature.EVENT_IDX, id="split, event index"),
    pytest.param(DeviceFeature.VERSION_1 | DeviceFeature.RING_PACKED, id="packed"),
]


class Upper(QueueDevice):
    """Gives back what it reads in upper case; has a configuration of four bytes, of which the last can be written."""

    device_id = DeviceType.CONSOLE
    config_size = 4

    def __init__(self) -> None:
        super().__init__()
        self.shown = b"conf"

    def handle(self, queue: int, chain: Chain) -> Awaitable[None] | None:
        chain.write(chain.read().upper())
        return None

    def read_config(self, offset: int, size: int) -> bytes:
        return self.shown[offset : offset + size]

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        if offset != 3 or len(data) != 1:
            raise ValueError("only the last byte can be written")
        self.shown = self.shown[:3] + data


@pytest.fixture
def ram() -> Iterator[Ram]:
    made = Ram(1 << 20)
    yield made
    made.close()


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Backend]:
    async with Backend(Upper(), str(tmp_path / "upper.sock")) as backend:
        yield backend


def remote(backend: Backend) -> VhostUserBackEnd:
    return VhostUserBackEnd(backend.path, DeviceType.CONSOLE, [16])


async def served(back_end: BackEnd, ram: Ram, features: int) -> RingDriver:
    await back_end.open(ram)
    assert features & ~back_end.features == 0
    driver = RingDriver(ram, features)
    await back_end.activate(features, [driver.vring])
    return driver


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize("kind", ["in process", "vhost-user"])
async def test_queues_are_served_until_they_are_stopped(ram: Ram, server: Backend, kind: str, features: int) -> None:
    back_end = InProcessBackEnd(Upper()) if kind == "in process" else remote(server)
    driver = await served(back_end, ram, features)
    try:
        for number in range(40):
            assert await driver.ask(b"request %d" % number) == b"REQUEST %d" % number
        bases = await back_end.deactivate()
        packed = features & DeviceFeature.RING_PACKED
        # A packed ring of 16 was gone through five times, by two descriptors a request: index 0, wrap counter 0.
        assert bases == {0: 0 if packed else 40}
        driver.post(b"nobody is there")
        for _ in range(100):  # Whoever served it would do so on this loop.
            await asyncio.sleep(0)
        assert driver.queue.take() is None
        assert os.eventfd_read(driver.kick) == 1, "nobody has heard of it"
    finally:
        await back_end.close()
        driver.close()


@pytest.mark.parametrize("features", FEATURES)
async def test_a_queue_goes_on_where_it_stands(ram: Ram, server: Backend, features: int) -> None:
    first, second = InProcessBackEnd(Upper()), remote(server)
    driver = await served(first, ram, features)
    try:
        for _ in range(21):
            assert await driver.ask(b"a") == b"A"
        bases = await first.deactivate()
        vring = driver.vring
        moved = type(vring)(0, 16, vring.descriptor_addr, vring.driver_addr, vring.device_addr, bases[0], *_fds(driver))
        await second.open(ram)
        await second.activate(features, [moved])
        for _ in range(21):
            assert await driver.ask(b"b") == b"B"
    finally:
        await first.close()
        await second.close()
        driver.close()


@pytest.mark.parametrize("features", FEATURES)
async def test_a_back_end_that_comes_back_finds_the_rings(ram: Ram, tmp_path: Path, features: int) -> None:
    path = str(tmp_path / "upper.sock")
    back_end = VhostUserBackEnd(path, DeviceType.CONSOLE, [16])
    server = Backend(Upper(), path)
    await server.start()
    driver = await served(back_end, ram, features)
    try:
        for round_ in range(3):
            for _ in range(5):
                assert await driver.ask(b"again") == b"AGAIN"
            await server.close()
            driver.post(b"while nobody is there %d" % round_)
            server = Backend(Upper(), path)
            await server.start()
            assert await driver.answer() == b"WHILE NOBODY IS THERE %d" % round_
    finally:
        await back_end.close()
        await server.close()
        driver.close()


async def test_nobody_there(ram: Ram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("viaduct.vmm.back_end.vhost_user.CONNECT_TIMEOUT", 0.05)
    back_end = VhostUserBackEnd(str(tmp_path / "none.sock"), DeviceType.NET, [16, 16])
    with pytest.raises(MachineError, match="nobody listens there"):
        await back_end.open(ram)
    await back_end.close()


async def test_configuration_is_the_devices(ram: Ram) -> None:
    back_end = InProcessBackEnd(Upper())
    changes = []
    back_end.on_config_change = lambda: changes.append(back_end.config)
    assert back_end.config == b"conf"
    back_end.write_config(3, b"g")
    back_end.write_config(0, b"x")  # ignored, and said in the log
    assert back_end.config == b"cong"
    assert back_end.device.config_changed()
    assert changes == [b"cong"]


async def test_rings_outside_memory_are_refused(ram: Ram, server: Backend) -> None:
    for back_end in (InProcessBackEnd(Upper()), remote(server)):
        await back_end.open(ram)
        driver = RingDriver(ram, DeviceFeature.VERSION_1)
        outside = type(driver.vring)(0, 16, 1 << 30, 0, 0, 0, *_fds(driver))
        with pytest.raises(MachineError):
            await back_end.activate(int(DeviceFeature.VERSION_1), [outside])
        await back_end.close()
        driver.close()


async def test_a_ring_outside_memory_is_nothing_to_the_next_driver(ram: Ram, tmp_path: Path) -> None:
    """The back-end comes back, and the driver after the one that was wrong is served."""
    path = str(tmp_path / "upper.sock")
    server = Backend(Upper(), path)
    await server.start()
    back_end = VhostUserBackEnd(path, DeviceType.CONSOLE, [16])
    await back_end.open(ram)
    driver = RingDriver(ram, DeviceFeature.VERSION_1)
    outside = type(driver.vring)(0, 16, driver.vring.descriptor_addr, 0, (1 << 20) - 4, 0, *_fds(driver))
    with pytest.raises(MachineError):
        await back_end.activate(int(DeviceFeature.VERSION_1), [outside])
    await server.close()
    server = Backend(Upper(), path)
    await server.start()
    await back_end.deactivate()
    await back_end.activate(int(DeviceFeature.VERSION_1), [driver.vring])
    assert await driver.ask(b"well") == b"WELL"
    await back_end.close()
    await server.close()
    driver.close()


def test_vhost_net_gets_rings_that_are_memory_to_their_last_byte(ram: Ram) -> None:
    """The kernel believes the addresses that it is given: what lies behind the RAM here is none of the guest's."""
    card = VhostNetBackEnd("none", bytes(6))
    card._ram = ram
    place = ram.memory.places[0][2]
    assert card._here(0x1000, 0x100) == place + 0x1000
    assert card._here((1 << 20) - 134, 134) == place + (1 << 20) - 134
    for addr, size in (((1 << 20) - 133, 134), (1 << 20, 16), (1 << 40, 16), ((1 << 64) - 8, 16)):
        with pytest.raises(OSError, match="not in the guest's memory"):
            card._here(addr, size)


class Stuck(QueueDevice):
    """Never answers, and so is never drained."""

    device_id = DeviceType.CONSOLE

    def __init__(self) -> None:
        super().__init__()
        self.asked, self.draining = asyncio.Event(), asyncio.Event()

    async def handle(self, queue: int, chain: Chain) -> None:
        self.asked.set()
        await asyncio.Event().wait()

    async def drain_queue(self, index: int) -> None:
        self.draining.set()
        await super().drain_queue(index)


async def test_a_device_that_never_answers_keeps_no_machine(ram: Ram) -> None:
    driver = await served(back_end := InProcessBackEnd(device := Stuck()), ram, DeviceFeature.VERSION_1)
    driver.post(b"?")
    async with asyncio.timeout(60):
        await device.asked.wait()
    slot = VirtioSlot("stuck", back_end, asyncio.get_running_loop(), lambda kind, text: None)
    resetting = asyncio.create_task(asyncio.to_thread(slot.reset))
    async with asyncio.timeout(60):
        await device.draining.wait()
    slot.closing = True
    with pytest.raises(MachineError, match="the machine has ended"):
        await resetting
    await slot.close()
    driver.close()


class Mistaken(Upper):
    """A user's first device."""

    config_size = 4

    def go_wrong(self, method: str) -> None:
        """From now on that method raises."""

        def wrong(*arguments: object) -> None:
            raise TypeError("what did I do?")

        setattr(self, method, wrong)

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        raise NotImplementedError


@pytest.mark.parametrize("method", ["set_features", "set_memory", "start_queue", "enable_queue"])
async def test_whose_device_does_not_start_is_said(ram: Ram, method: str, caplog: pytest.LogCaptureFixture) -> None:
    """And where in it; the queue is not served, and a driver that tries again finds a device that is none the worse."""
    back_end = InProcessBackEnd(device := Mistaken())
    device.go_wrong(method)
    await back_end.open(ram)
    driver = RingDriver(ram, DeviceFeature.VERSION_1)
    for _ in range(20):
        with pytest.raises(MachineError, match=r"Mistaken\.\w+ failed: TypeError: what did I do"):
            await back_end.activate(DeviceFeature.VERSION_1, [driver.vring])
    assert 0 < sum("what did I do" in record.getMessage() for record in caplog.records) <= 10
    assert caplog.records[0].exc_info is not None
    delattr(device, method)
    await back_end.activate(DeviceFeature.VERSION_1, [driver.vring])
    assert await driver.ask(b"well") == b"WELL"
    await back_end.close()
    driver.close()


@pytest.mark.parametrize("method", ["reset", "drain_queue", "stop_queue", "read_config", "disconnected"])
async def test_a_machine_outlives_the_mistakes_of_its_devices(ram: Ram, method: str) -> None:
    """What the driver may do as often as it likes is told of seldom, with the device's name."""
    back_end = InProcessBackEnd(device := Mistaken())
    driver = await served(back_end, ram, DeviceFeature.VERSION_1)
    told: list[str] = []
    slot = VirtioSlot("mine0", back_end, asyncio.get_running_loop(), lambda kind, text: told.append(f"{kind}: {text}"))
    slot._queues = (driver.vring,)
    device.go_wrong(method)
    for _ in range(100):
        await asyncio.to_thread(slot.reset)
        await slot._activate(DeviceFeature.VERSION_1, (driver.vring,))
    assert len(told) <= 16
    assert all("mine0" in line and "Mistaken" in line for line in told)
    assert told or method in ("read_config", "disconnected")
    await slot.close()
    driver.close()


async def test_writes_to_configuration_space_fill_no_log(
    ram: Ram, server: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """A guest makes thousands of them a second."""
    for back_end in (InProcessBackEnd(Mistaken()), remote(server)):
        caplog.clear()
        for number in range(1000):
            back_end.write_config(0, number.to_bytes(4, "little"))
        assert [record.getMessage().count("was ignored") for record in caplog.records] == [1] * 10
        assert "(512 times by now)" in caplog.records[-1].getMessage()


def _fds(driver: RingDriver) -> tuple[int, int, None]:
    return driver.kick, driver.call, None
