"""A memory balloon (virtio 1.2, 5.5): takes pages from a guest, and really gives them back to this host.

# How it works

The device says how large the balloon should be (`resize`); the driver takes so many free pages of its guest out of use
and tells their numbers (inflate queue), and each is punched out of the file behind the guest's memory, so that it costs
nothing until it is written again. A balloon that shrinks (deflate queue) needs no more than that: the guest writes, and
the page is there, zeroed. Numbers are the guest's word: what lies in no region of its memory is ignored, and all that a
lie can destroy is the liar's own memory.

Three queues are optional, and the driver counts those it has agreed to, in this order: statistics, which the driver
leaves with the device until the device wants new ones (5.5.6.3); free page hints, in rounds that the device begins
(5.5.6.5); free page reports, in which the driver waits until the pages are given back, and uses them again by writing
(5.5.6.7). Reports are what keeps a guest small without anybody's attention.

Hints are off unless asked for: Linux takes hinted pages back without a word when it runs out of memory, and may find
one zeroed that it has written in the meantime. Reports have no such gap.
"""

from __future__ import annotations

import asyncio
import logging
import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from viaduct.vhost_user.protocol import ProtocolFeature
from viaduct.vhost_user.queue_device import QueueDevice
from viaduct.virtio.balloon_config import BalloonConfig
from viaduct.virtio.features import BalloonFeature, DeviceType

if TYPE_CHECKING:
    from viaduct._core import Chain
    from viaduct.vhost_user.handover import Fds

log = logging.getLogger("viaduct.devices")

PAGE = 4096
"""Bytes of a balloon's page, whatever the guest's or the host's are (virtio 1.2, 5.5.6)."""
NUMBERS_MAX = 4096
"""Page numbers that one buffer may hold; what is beyond is ignored. Linux puts 256 into one."""
DISCARDS = 256
"""Ranges that are given back before others have their turn."""
_STATISTIC = struct.Struct("<HQ")
_STATISTICS_MAX = 64

STOP, DONE, FIRST_ROUND = 0, 1, 2
"""Values of `BalloonConfig.free_page_hint_cmd_id` (virtio 1.2, 5.5.6.5)."""


class BalloonStatistic(IntEnum):
    """What the driver tells about its guest, memory in bytes (virtio 1.2, 5.5.6.4)."""

    SWAP_IN = 0
    SWAP_OUT = 1
    MAJOR_FAULTS = 2
    MINOR_FAULTS = 3
    FREE_MEMORY = 4
    TOTAL_MEMORY = 5
    AVAILABLE_MEMORY = 6
    DISK_CACHES = 7
    HUGE_PAGES_ALLOCATED = 8
    HUGE_PAGES_FAILED = 9


class _Role(IntEnum):
    """What a queue is for."""

    INFLATE = 0
    DEFLATE = 1
    STATISTICS = 2
    HINTS = 3
    REPORTS = 4


_OPTIONAL = {
    _Role.STATISTICS: BalloonFeature.STATS_VQ,
    _Role.HINTS: BalloonFeature.FREE_PAGE_HINT,
    _Role.REPORTS: BalloonFeature.REPORTING,
}


class Balloon(QueueDevice):
    """A balloon of `size` bytes at first. `deflate_on_oom`: the guest may take pages back when it runs out of memory;
    `reporting`, `hinting`: see the module's text."""

    device_id = DeviceType.BALLOON
    protocol_features = QueueDevice.protocol_features | ProtocolFeature.CONFIG
    config_size = 16

    def __init__(
        self, size: int = 0, *, deflate_on_oom: bool = True, reporting: bool = True, hinting: bool = False
    ) -> None:
        super().__init__()
        self.features = QueueDevice.features | BalloonFeature.STATS_VQ | BalloonFeature.PAGE_POISON
        if deflate_on_oom:
            self.features |= BalloonFeature.DEFLATE_ON_OOM
        if reporting:
            self.features |= BalloonFeature.REPORTING
        if hinting:
            self.features |= BalloonFeature.FREE_PAGE_HINT
        self.queue_count = len(_roles(self.features))
        self.config = BalloonConfig(num_pages=_pages(size))
        self.statistics: dict[BalloonStatistic, int] = {}
        """What the driver told last."""
        self.given_back = 0
        """Bytes that were given back to the host so far, some of them more than once."""
        self._roles: list[_Role] = []
        self._queue_of: dict[_Role, int] = {}
        self._held: Chain | None = None
        self._inflating: tuple[Chain, Iterator[tuple[int, int]]] | None = None
        self._soon: asyncio.Handle | None = None
        self._round = FIRST_ROUND
        self._hinting = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._failure = ""

    # What the host wants.

    @property
    def size(self) -> int:
        """Bytes that the balloon has, as the driver says."""
        return self.config.actual * PAGE

    @property
    def target(self) -> int:
        """Bytes that it should have."""
        return self.config.num_pages * PAGE

    def set_target(self, size: int) -> None:
        """Asks the driver for a balloon of `size` bytes, rounded down to pages. Raises ValueError if there is no such
        balloon."""
        self.config = self.config._replace(num_pages=_pages(size))
        self.config_changed()

    async def resize(self, size: int, timeout: float | None = None) -> None:  # noqa: ASYNC109
        """Asks for a balloon of `size` bytes and waits until the driver has made it. Raises TimeoutError, with how far
        it came, after `timeout` seconds: a guest may not have so much to give."""
        self.set_target(size)
        try:
            async with asyncio.timeout(timeout):
                while self.config.actual != self.config.num_pages:
                    await self._change()
        except TimeoutError:
            raise TimeoutError(
                f"the balloon has {self.size} bytes instead of {self.target} after {timeout:g} s: the guest has no "
                "more to give, or no driver"
            ) from None

    async def ask_statistics(self, timeout: float | None = None) -> dict[BalloonStatistic, int]:  # noqa: ASYNC109
        """Asks the driver for new statistics. Raises TimeoutError if it gives none."""
        async with asyncio.timeout(timeout):
            while self._held is None:
                await self._change()
            held, self._held = self._held, None
            queue = self._queue_of[_Role.STATISTICS]  # There was no driver yet, perhaps, when we began to wait.
            self.give(queue, held)
            self._take_statistics(queue)
            while self._held is None:
                await self._change()
        return self.statistics

    async def reclaim_hinted(self, timeout: float | None = None) -> int:  # noqa: ASYNC109
        """Lets the driver hint all its free pages and gives them back; returns how many bytes. Raises ValueError if
        that was not agreed on, TimeoutError if the driver does not come to an end."""
        if not self.negotiated & BalloonFeature.FREE_PAGE_HINT:
            raise ValueError("free page hinting was not negotiated; the balloon has to be made with hinting=True")
        before = self.given_back
        self._round = self._round + 1 if self._round < 0xFFFF_FFFF else FIRST_ROUND
        self._set_round(self._round)
        try:
            async with asyncio.timeout(timeout):
                while self.config.free_page_hint_cmd_id == self._round:
                    await self._change()
        finally:
            self._set_round(DONE)
        return self.given_back - before

    def _set_round(self, number: int) -> None:
        self._hinting = False
        self.config = self.config._replace(free_page_hint_cmd_id=number)
        self.config_changed()

    async def _change(self) -> None:
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.add(waiter)
        try:
            await waiter
        finally:
            self._waiting.discard(waiter)

    def _changed(self) -> None:
        for waiter in self._waiting:
            if not waiter.done():
                waiter.set_result(None)

    # Queues.

    def set_features(self, features: int) -> None:
        super().set_features(features)
        self._roles = _roles(features)
        self._queue_of = {role: queue for queue, role in enumerate(self._roles)}
        pulled = (_Role.INFLATE, _Role.STATISTICS)
        self.pulled_queues = frozenset(self._queue_of[role] for role in pulled if role in self._queue_of)

    def handle(self, queue: int, chain: Chain) -> None:
        match self._role(queue):
            case _Role.HINTS:
                self._hint(chain)
            case _Role.REPORTS if not self._poisoned:
                self._discard_room(chain)

    def chains_waiting(self, queue: int) -> None:
        if self._role(queue) is _Role.INFLATE:
            if self._soon is None:
                self._inflate()
        elif self._role(queue) is _Role.STATISTICS:
            self._take_statistics(queue)

    def _role(self, queue: int) -> _Role | None:
        """None: a queue that was not agreed on."""
        return self._roles[queue] if queue < len(self._roles) else None

    def _inflate(self) -> None:
        """Gives back what the driver has named, a part each turn of the loop. The driver gets its buffer when that is
        done: from then on it may take a page out of the balloon again, and write to it."""
        self._soon = None
        for _ in range(DISCARDS):
            if self._inflating is None:
                if (chain := self.take(_Role.INFLATE)) is None:
                    return
                self._inflating = chain, _ranges(chain.read(0, 4 * NUMBERS_MAX))
            chain, ranges = self._inflating
            if pages := next(ranges, None):
                self._discard(*pages)
            else:
                self._inflating = None
                self.give(_Role.INFLATE, chain)
        self._soon = asyncio.get_running_loop().call_soon(self._inflate)

    def _end_inflating(self) -> None:
        """Comes to the end of the buffer that is being worked on."""
        if self._soon is not None:
            self._soon.cancel()
            self._soon = None
        if self._inflating is not None:
            chain, ranges = self._inflating
            self._inflating = None
            for pages in ranges:
                self._discard(*pages)
            self.give(_Role.INFLATE, chain)

    def _take_statistics(self, queue: int) -> None:
        if self._held is None and (chain := self.take(queue)) is not None:
            data = chain.read(0, _STATISTIC.size * _STATISTICS_MAX)
            data = data[: len(data) // _STATISTIC.size * _STATISTIC.size]
            known = set(BalloonStatistic)
            self.statistics = {
                BalloonStatistic(tag): value for tag, value in _STATISTIC.iter_unpack(data) if tag in known
            }
            self._held = chain
            self._changed()

    def _hint(self, chain: Chain) -> None:
        """A command, in bytes to read, or free pages, in room to write (virtio 1.2, 5.5.6.5)."""
        if chain.readable_len >= 4:
            command = int.from_bytes(chain.read(0, 4), "little")
            self._hinting = command == self.config.free_page_hint_cmd_id and command >= FIRST_ROUND
            if command == STOP and self.config.free_page_hint_cmd_id == self._round:
                self._set_round(DONE)
                self._changed()
        elif self._hinting and not self._poisoned:
            self._discard_room(chain)

    @property
    def _poisoned(self) -> bool:
        """The guest relies on what it has filled its free pages with; zeroes would not do (virtio 1.2, 5.5.6.6)."""
        return bool(self.negotiated & BalloonFeature.PAGE_POISON and self.config.poison_val)

    # Pages.

    def _discard(self, first: int, count: int) -> None:
        assert self.memory is not None
        try:
            self.given_back += self.memory.discard(first * PAGE, count * PAGE)
        except ValueError:
            if count > 1:  # Some of them may exist.
                for page in range(first, first + count):
                    self._discard(page, 1)
        except OSError as error:
            self._cannot(error)

    def _discard_room(self, chain: Chain) -> None:
        try:
            self.given_back += chain.discard()
        except OSError as error:
            self._cannot(error)

    def _cannot(self, error: OSError) -> None:
        """Says it once: the guest would say the same of each page."""
        if self._failure != str(error):
            self._failure = str(error)
            log.warning(
                "balloon: the guest's pages cannot be given back: %s; its memory must be a memfd or a file on tmpfs or "
                "hugetlbfs, shared and not sealed against writes",
                error,
            )

    # Configuration and life.

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config.pack()[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, flags: int) -> None:
        """Takes `actual` and `poison_val`; the rest is the device's, and stays (QEMU sends all of it)."""
        space = bytearray(self.config.pack())
        if offset + len(data) > len(space):
            raise ValueError(f"{len(data)} bytes at {offset} of a balloon's configuration, which has {len(space)}")
        space[offset : offset + len(data)] = data
        written = BalloonConfig.unpack(bytes(space))
        self.config = self.config._replace(actual=written.actual, poison_val=written.poison_val)
        self._changed()

    async def drain_queue(self, index: int) -> None:
        if self._held is not None and self._role(index) is _Role.STATISTICS:
            held, self._held = self._held, None
            self.give(index, held)  # The driver brings new statistics when the queue runs again.
        await super().drain_queue(index)

    def stop_queue(self, index: int) -> int:
        if self._role(index) is _Role.STATISTICS:
            self._held = None
        elif self._role(index) is _Role.INFLATE:
            self._end_inflating()
        return super().stop_queue(index)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def disconnected(self, reason: str) -> None:
        super().disconnected(reason)
        self._forget()

    def _forget(self) -> None:
        """The guest begins anew, with all its memory; what is wanted of it stays."""
        self.config = BalloonConfig(num_pages=self.config.num_pages)
        self.statistics = {}
        self._hinting = False
        self._changed()

    def save(self, fds: Fds) -> dict[str, Any]:
        return super().save(fds) | {"config": list(self.config)}

    def restore(self, data: dict[str, Any], fds: Fds) -> None:
        super().restore(data, fds)
        if saved := data.get("config"):
            self.config = BalloonConfig(*saved)


def _roles(features: int) -> list[_Role]:
    """What the queues are for, with these features: those that were not agreed on are not counted."""
    return [role for role in _Role if role not in _OPTIONAL or features & _OPTIONAL[role]]


def _pages(size: int) -> int:
    if not 0 <= size < PAGE << 32:
        raise ValueError(f"a balloon of {size} bytes: 0 or more, and less than 16 TiB (virtio 1.2, 5.5.4)")
    return size // PAGE


def _ranges(data: bytes) -> Iterator[tuple[int, int]]:
    """Page numbers as first page and count of ranges that hang together."""
    numbers = sorted({number for (number,) in struct.iter_unpack("<I", data[: len(data) // 4 * 4])})
    first = count = 0
    for number in numbers:
        if count and number == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = number, 1
    if count:
        yield first, count
