"""A network card of several queue pairs: its driver says by the control queue how many it uses."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import msgspec
import pytest

from viaduct._core import Chain
from viaduct.vhost_user import Backend, QueueDevice
from viaduct.vhost_user.device import Vring
from viaduct.virtio import DeviceFeature, DeviceType, NetFeature
from viaduct.virtio.net_config import NetConfig
from viaduct.vmm.back_end import BackEnd
from viaduct.vmm.back_end.in_process import InProcessBackEnd
from viaduct.vmm.back_end.queue_pairs import QueuePairsBackEnd
from viaduct.vmm.back_end.vhost_user import VhostUserBackEnd
from viaduct.vmm.config import NicConfig
from viaduct.vmm.errors import MachineError
from viaduct.vmm.nic import open_virtio
from viaduct.vmm.ram import Ram

from .flat import PATIENCE
from .ring_driver import RingDriver

PAIRS = 3
FEATURES = DeviceFeature.VERSION_1 | NetFeature.CTRL_VQ | NetFeature.MQ
STRIDE = 0x30000
CONTROL = 2 * PAIRS


class Card(QueueDevice):
    """Has queues, answers what is sent in upper case, and remembers which of them are enabled."""

    device_id = DeviceType.NET
    queue_count = 2 * PAIRS
    config_size = 17

    def __init__(self) -> None:
        super().__init__()
        self.enabled: set[int] = set()

    def handle(self, queue: int, chain: Chain) -> Awaitable[None] | None:
        chain.write(chain.read().upper())
        return None

    def enable_queue(self, index: int, enabled: bool) -> None:
        super().enable_queue(index, enabled)
        (self.enabled.add if enabled else self.enabled.discard)(index)

    def stop_queue(self, index: int) -> int:
        self.enabled.discard(index)
        return super().stop_queue(index)

    def read_config(self, offset: int, size: int) -> bytes:
        return NetConfig(mac=b"mymac!").pack()[offset : offset + size]


@pytest.fixture
def ram() -> Iterator[Ram]:
    made = Ram(4 << 20)
    yield made
    made.close()


@pytest.fixture
async def card() -> Card:
    return Card()


@pytest.fixture(params=["in process", "vhost-user"])
async def back_end(request: pytest.FixtureRequest, card: Card, tmp_path: Path) -> AsyncIterator[BackEnd]:
    if request.param == "in process":
        yield InProcessBackEnd(card)
        return
    async with Backend(card, str(tmp_path / "card.sock")) as server:
        config = NetConfig(mac=b"mymac!").pack()
        yield VhostUserBackEnd(server.path, DeviceType.NET, [16] * 2 * PAIRS, config=config)


class Running:
    """The card behind `back_end` with all of its queues, driven."""

    def __init__(self, ram: Ram, back_end: BackEnd, features: int = FEATURES) -> None:
        self.whole = QueuePairsBackEnd(back_end, PAIRS)
        count = CONTROL + 1 if features & NetFeature.MQ else 3
        self.features = features
        self.drivers = [RingDriver(ram, features, index, index * STRIDE) for index in range(count)]
        self.ram = ram

    async def __aenter__(self) -> Running:
        await self.whole.open(self.ram)
        await self.whole.activate(self.features, [driver.vring for driver in self.drivers])
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.whole.close()
        for driver in self.drivers:
            driver.close()

    async def use(self, pairs: int) -> bytes:
        """The answer to VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET."""
        return await self.drivers[-1].ask(struct.pack("<BBH", 4, 0, pairs))


async def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        await asyncio.sleep(0.005)


async def test_a_driver_uses_as_many_pairs_as_it_says(ram: Ram, card: Card, back_end: BackEnd) -> None:
    async with Running(ram, back_end) as running:
        whole = running.whole
        assert list(whole.queue_sizes)[CONTROL:] == [64]
        assert whole.features & NetFeature.MQ
        assert whole.features & NetFeature.CTRL_VQ
        shown = NetConfig.unpack(whole.config)
        assert (shown.mac, shown.max_queue_pairs) == (b"mymac!", PAIRS)
        assert card.enabled == {0, 1}, "the first pair only, until the driver says more"
        for pairs in (3, 1, 2):
            assert await running.use(pairs) == b"\0"
            assert card.enabled == set(range(2 * pairs))
        for wrong in (0, PAIRS + 1, 0xFFFF):
            assert await running.use(wrong) == b"\1"
            assert card.enabled == {0, 1, 2, 3}, "as before"
        assert await running.drivers[3].ask(b"second pair") == b"SECOND PAIR"


async def test_commands_that_are_none_are_refused(ram: Ram, card: Card, back_end: BackEnd) -> None:
    async with Running(ram, back_end) as running:
        for command in (b"\4", b"\4\0", b"\4\0\2", b"\4\0\2\0\0", b"\4\1\2\0", b"\0\0\1", b"\xff" * 512):
            assert await running.drivers[-1].ask(command) == b"\1"
        assert card.enabled == {0, 1}


async def test_without_several_pairs_the_control_queue_is_the_third(ram: Ram, card: Card, back_end: BackEnd) -> None:
    async with Running(ram, back_end, DeviceFeature.VERSION_1 | NetFeature.CTRL_VQ) as running:
        assert await running.drivers[0].ask(b"data") == b"DATA"
        assert await running.drivers[2].ask(b"\0\0\1") == b"\1", "an answer: it is the control queue"
        assert card.enabled == {0, 1}


async def test_a_reset_leaves_one_pair_and_a_snapshot_all(ram: Ram, card: Card, back_end: BackEnd) -> None:
    async with Running(ram, back_end) as running:
        whole, vrings = running.whole, [driver.vring for driver in running.drivers]
        assert await running.use(3) == b"\0"
        saved = whole.save()
        bases = await whole.deactivate()
        assert set(bases) == set(range(CONTROL + 1))
        assert bases[CONTROL] == 1
        await whole.activate(FEATURES, [_at(vring, bases[vring.index]) for vring in vrings])
        assert card.enabled == set(range(6)), "stopped and started again is not reset"
        assert await running.use(2) == b"\0"
        await whole.deactivate()
        whole.reset()
        await whole.activate(FEATURES, [_at(vring, bases[vring.index]) for vring in vrings[:-1]])
        assert card.enabled == {0, 1}
        await whole.deactivate()
        whole.restore(saved)
        await whole.activate(FEATURES, [_at(vring, bases[vring.index]) for vring in vrings[:-1]])
        assert card.enabled == set(range(6))
        for wrong in ({}, {"used": 0}, {"used": 4}, {"used": "all"}):
            with pytest.raises(ValueError, match="queue pairs"):
                whole.restore(wrong)


async def test_a_back_end_that_comes_back_serves_the_pairs_in_use(ram: Ram, tmp_path: Path) -> None:
    first, second = Card(), Card()
    path = str(tmp_path / "card.sock")
    server = Backend(first, path)
    await server.start()
    inner = VhostUserBackEnd(path, DeviceType.NET, [16] * 2 * PAIRS, config=NetConfig().pack())
    async with Running(ram, inner) as running:
        assert await running.use(2) == b"\0"
        await server.close()
        await until(lambda: not first.enabled)
        assert await running.use(3) == b"\0", "whoever comes back will know"
        async with Backend(second, path):
            await until(lambda: second.enabled == set(range(6)))
            assert await running.drivers[5].ask(b"again") == b"AGAIN"


async def test_a_back_end_with_fewer_pairs_is_refused(ram: Ram, tmp_path: Path) -> None:
    class One(Card):
        queue_count = 2

    async with Backend(One(), str(tmp_path / "one.sock")) as server:
        inner = VhostUserBackEnd(server.path, DeviceType.NET, [16] * 2 * PAIRS, config=NetConfig().pack())
        whole = QueuePairsBackEnd(inner, PAIRS)
        with pytest.raises(MachineError, match="1 queue pairs, 3 were asked for"):
            await whole.open(ram)
        await whole.close()


@pytest.mark.parametrize("queues", [1, PAIRS])
async def test_what_needs_other_commands_is_not_offered(ram: Ram, tmp_path: Path, queues: int) -> None:
    """As DPDK's vhost library offers it: a driver refuses the card, or finds that its commands fail."""

    class Offering(Card):
        features = int(
            FEATURES | NetFeature.CTRL_RX | NetFeature.CTRL_VLAN | NetFeature.GUEST_ANNOUNCE | NetFeature.MRG_RXBUF
        )

    async with Backend(Offering(), str(tmp_path / "offering.sock")) as server, AsyncExitStack() as stack:
        nic = NicConfig(to=f"vhost-user:{server.path}", queues=queues)
        card = await open_virtio(nic, b"mymac!", "vm1", stack)
        await card.open(ram)
        own = NetFeature.MAC | NetFeature.STATUS | NetFeature.MRG_RXBUF
        wanted = own if queues == 1 else own | NetFeature.MQ | NetFeature.CTRL_VQ
        assert card.features & 0xFFFFFF == int(wanted)
        await card.close()


def _at(vring: Vring, base: int) -> Vring:
    return msgspec.structs.replace(vring, base=base)
