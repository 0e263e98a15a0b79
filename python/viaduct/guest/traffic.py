"""Traffic for measurements: a `Sender` and a `Receiver` of frames that carry numbers, times and checksums.

    async with Receiver("/tmp/vm2.sock") as receiver, Sender("/tmp/vm1.sock", size=64, rate=None) as sender:
        sent = await sender.run(seconds=5)
        received = await receiver.finish()

Both stand directly on the driver, without a TCP/IP stack, and handle millions of frames a second each on one core. The
times are of the system's monotonic clock, so sender and receiver may be different processes, but of one host.
"""

from __future__ import annotations

import asyncio
import os
from types import TracebackType
from typing import Any, Generic, TypeVar

import msgspec

from viaduct._core import TrafficSink, TrafficSource
from viaduct.guest.errors import GuestError
from viaduct.guest.link import CONNECT_TIMEOUT, Link, LinkOptions
from viaduct.guest.mac import parse_mac
from viaduct.guest.results import Latency

SENDER_MAC = "02:76:64:00:00:01"
RECEIVER_MAC = "02:76:64:01:00:01"
"""The first addresses of senders and receivers that were not told otherwise: so they find each other."""
SHORTEST = 64
"""Bytes of the shortest frame, without its checksum."""
_LOOK = 0.05
"""Seconds between two looks at counters."""
QUIET = 0.3
"""Seconds without a frame after which nothing more is expected."""


class Sent(msgspec.Struct, frozen=True):
    """What a sender did."""

    size: int
    """Bytes of each frame, Ethernet header included, checksum not."""
    sent: int
    seconds: float
    full: int
    """How often the transmit ring was full."""

    @property
    def frames_per_second(self) -> float:
        """The rate that was reached."""
        return self.sent / self.seconds if self.seconds > 0 else 0.0

    @property
    def bits_per_second(self) -> float:
        """The same in bits of these frames."""
        return 8 * self.size * self.frames_per_second


class Received(msgspec.Struct, frozen=True):
    """What a receiver found."""

    received: int
    """Good frames, each counted once."""
    bytes: int
    lost: int
    """Numbers missing between the first and the last of each flow; what never arrived at either end of a flow, only the
    sender knows."""
    duplicated: int
    reordered: int
    corrupted: int
    """Frames whose content does not fit their checksum. They count as lost, too."""
    foreign: int
    """Frames of others."""
    flows: int
    seconds: float
    """From the first frame to the last."""
    latency: Latency | None

    @property
    def frames_per_second(self) -> float:
        """The rate at which they came."""
        return self.received / self.seconds if self.seconds > 0 else 0.0

    @property
    def bits_per_second(self) -> float:
        """The same in bits."""
        return 8 * self.bytes / self.seconds if self.seconds > 0 else 0.0


_Engine = TypeVar("_Engine", TrafficSource, TrafficSink)


class _Traffic(Generic[_Engine]):
    """An engine of the Rust half, and the link that it uses."""

    def __init__(self, path: str | os.PathLike[str], name: str, options: LinkOptions) -> None:
        self.path = os.fspath(path)
        self.name = name
        # Nothing here is TCP, and room for segments would only spread the buffers.
        self.options = msgspec.structs.replace(options, segmentation=False)
        self.options.features()
        self._engine: _Engine | None = None
        self._link: Link | None = None
        self._done = asyncio.Event()

    @property
    def link(self) -> Link:
        """The connection to the back-end: whether it is up, and what was negotiated."""
        if self._link is None:
            raise GuestError(f"{self.name} on {self.path} has not been started")
        return self._link

    def counters(self) -> dict[str, int]:
        """Frames, bytes, kicks and sleeps since the start."""
        return self._running().counters()

    async def close(self) -> None:
        """Stops and leaves the back-end. May be called twice."""
        if self._link is not None:
            await self._link.close()
            self._link = None
        engine, self._engine = self._engine, None
        if engine is not None:
            asyncio.get_running_loop().remove_reader(engine.event_fd)
            engine.close()

    def _running(self) -> _Engine:
        if self._engine is None:
            raise GuestError(f"{self.name} on {self.path} is not running; use it in `async with`")
        return self._engine

    async def _begin(self, engine: _Engine, within: float | None) -> None:
        self._engine = engine
        self._done.clear()
        asyncio.get_running_loop().add_reader(engine.event_fd, self._take_events)
        try:
            self._link = Link(self.path, self.options, self.name, engine)
            await self._link.start(within)
        except BaseException:
            await self.close()
            raise

    def _take_events(self) -> None:
        if self._engine is None:
            return
        for kind, why in self._engine.take_events():
            if kind == "done":
                self._done.set()
            elif self._link is not None:
                self._link.broken(why)


class Sender(_Traffic[TrafficSource]):
    """Sends frames.

    `size`: bytes of each, Ethernet header included, checksum not. `rate`: frames a second, None for as many as go;
    `burst`: how many leave together. `flows`: how many flows the frames belong to in turn; `macs`: between how many
    pairs of addresses, which count up from `mac` and `dst`. `options` and further keyword arguments: `LinkOptions`.

    Raises `GuestError` for what cannot work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int = 64,
        rate: float | None = None,
        burst: int = 1,
        flows: int = 1,
        macs: int = 1,
        mac: str = SENDER_MAC,
        dst: str = RECEIVER_MAC,
        name: str = "sender",
        connect_timeout: float | None = CONNECT_TIMEOUT,
        options: LinkOptions | None = None,
        **link: Any,
    ) -> None:
        super().__init__(path, name, options or LinkOptions(**link))
        self.size = size
        self._connect_timeout = connect_timeout
        self._addresses = (parse_mac(mac), parse_mac(dst, group=True))
        self._traffic: dict[str, Any] = {"size": size, "rate": rate, "burst": burst, "flows": flows, "macs": macs}
        _check_numbers(macs=macs, flows=flows, burst=burst)

    async def __aenter__(self) -> Sender:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def run(self, *, seconds: float | None = None, count: int | None = None) -> Sent:
        """Sends for so long (default: 5 s) or so many frames, until the device has fetched them all. Raises
        `GuestError` if there is no back-end or the frames are impossible."""
        if seconds is None and count is None:
            seconds = 5.0
        await self.close()
        try:
            engine = TrafficSource(
                *self._addresses,
                **self._traffic,
                count=count,
                seconds=seconds,
                session=int.from_bytes(os.urandom(2), "big"),
                mtu=self.options.mtu,
            )
        except (ValueError, OSError) as error:
            raise GuestError(f"{self.name} on {self.path}: {error}") from error
        await self._begin(engine, self._connect_timeout)
        await self._done.wait()
        return self.report()

    def report(self) -> Sent:
        """How it stands."""
        report = self._running().report()
        return Sent(self.size, report["sent"], report["elapsed"] / 1e9, report["full"])


class Receiver(_Traffic[TrafficSink]):
    """Receives frames of any number of senders and judges them.

    `mac`, `macs`: the addresses to announce, so that switches know where they are. `verify`: check every byte, not only
    numbers and times. `options` and further keyword arguments: `LinkOptions`. Raises `GuestError` for what cannot work.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mac: str = RECEIVER_MAC,
        macs: int = 1,
        verify: bool = True,
        count: int | None = None,
        name: str = "receiver",
        connect_timeout: float | None = CONNECT_TIMEOUT,
        options: LinkOptions | None = None,
        **link: Any,
    ) -> None:
        super().__init__(path, name, options or LinkOptions(**link))
        self._connect_timeout = connect_timeout
        _check_numbers(macs=macs)
        self._mac = parse_mac(mac)
        self._macs, self._verify, self._count = macs, verify, count

    async def __aenter__(self) -> Receiver:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connects and begins to receive. Raises `GuestError`."""
        engine = TrafficSink(self._mac, macs=self._macs, verify=self._verify, count=self._count, mtu=self.options.mtu)
        await self._begin(engine, self._connect_timeout)

    async def begun(self) -> None:
        """Returns when the first frame of a sender has come."""
        while True:
            report = self.report()
            if report.received or report.corrupted:
                return
            await asyncio.sleep(_LOOK)

    async def finish(self, quiet: float = QUIET) -> Received:
        """Waits until no frame has come for `quiet` seconds, or `count` have, and says what arrived."""
        before = self.report().bytes
        while not self._done.is_set():
            try:
                async with asyncio.timeout(quiet):
                    await self._done.wait()
            except TimeoutError:
                now = self.report().bytes
                if now == before:
                    break
                before = now
        return self.report()

    async def wait_done(self) -> None:
        """Returns when `count` frames have come."""
        await self._done.wait()

    def report(self) -> Received:
        """How it stands."""
        report = self._running().report()
        report["latency"] = Latency.from_nanoseconds(report["latency"])
        report["seconds"] = report.pop("elapsed") / 1e9
        return Received(**report)


def _check_numbers(**numbers: int) -> None:
    for name, number in numbers.items():
        if not 1 <= number <= 65535:
            raise GuestError(f"{name} {number} is not possible: 1 to 65535")
