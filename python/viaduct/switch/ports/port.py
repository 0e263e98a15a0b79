"""What all kinds of port have in common."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from viaduct.switch.config import PortConfig
from viaduct.switch.handover_format import PortData, PortPosition
from viaduct.switch.port_text import format_port
from viaduct.switch.status import Iommu, Link, Peer, PortStatus

if TYPE_CHECKING:
    from viaduct._core import Switch as DataPath
    from viaduct.vhost_user.handover import Fds

ETHERNET_HEADER = 14


class PortOwner(Protocol):
    """What a port needs of its switch."""

    @property
    def data_path(self) -> DataPath: ...

    def report(self, kind: str, message: str, port: str | None = None) -> None:
        """Add an event to the switch's history (see `viaduct.switch.status.Event`)."""


class Port:
    """A port of a running switch. `open` makes it work, `close` ends it; in between, `status` describes it."""

    pairs = 1
    """Queue pairs."""
    mtu: int | None = None
    """Longest packet that is sent to the port unsegmented, Ethernet header not counted; None: no limit."""

    def __init__(self, owner: PortOwner, name: str, config: PortConfig) -> None:
        self.owner = owner
        self.name = name
        self.config = config
        self.number = -1
        """Its number in the data path, once open."""
        self.broken: str | None = None
        """Why it was detached."""
        self._limits: tuple[int | None, list[tuple[int, int]], int] = (None, [], 0)
        self.on_close: list[Callable[[], None]] = []
        """Called when the port has gone."""

    @property
    def data_path(self) -> DataPath:
        """The Rust half."""
        return self.owner.data_path

    async def open(self) -> None:
        """Add the port to the data path and start it.

        Raises:
            ConfigError: what the configuration names cannot be had.
        """
        self.number = self._add_to_data_path()
        try:
            await self._start()
        except BaseException:
            await self.close()
            raise

    def _add_to_data_path(self) -> int:
        self._limits = self._current_limits()
        number = self.data_path.add_port(self.name, self.pairs, *self._limits)
        try:
            self.data_path.set_rules(number, **self.config.for_data_path())
        except BaseException:
            self.data_path.remove_port(number)
            raise
        return number

    async def close(self) -> None:
        """End the port; nothing of it remains."""
        await self._stop()
        if self.number >= 0:
            self.data_path.remove_port(self.number)
            self.number = -1
        for act in self.on_close:
            act()

    async def freeze(self) -> None:
        """Stand still until `thaw`, so that `save` describes the port: its peer waits, frames pass."""

    def thaw(self) -> None:
        """End what `freeze` began."""

    def save(self, fds: Fds) -> PortData:
        """What another process needs to go on with the port; descriptors go into `fds`.

        Raises:
            VhostUserError: this is no time for that.
        """
        return PortData(name=self.name, broken=self.broken)

    async def adopt(self, data: PortData, fds: Fds) -> None:
        """Instead of `open`: go on with a port of another process, frozen, and with no ring started.

        Raises:
            ConfigError: what the configuration names cannot be had.
            OSError, ValueError, VhostUserError: what the other process gave cannot be used.
        """
        self.number = self._add_to_data_path()
        self.broken = data.broken
        await self._adopt(data, fds)

    def resume(self, position: PortPosition) -> None:
        """Start the rings of an adopted port where they stand. Raises what the data path raises."""

    def take_up(self, position: PortPosition) -> None:
        """Start the rings again after another process, which had taken over at `position`, has died: they may stand
        somewhere else by now."""

    def change(self, config: PortConfig) -> None:
        """Take over VLANs, limits and rules that differ, without the peer noticing."""
        old, self.config = self.config, config
        if (limits := self._current_limits()) != self._limits:
            self.data_path.change_port(self.number, *limits)
            self._limits = limits
        if (rules := config.for_data_path()) != old.for_data_path():
            self.data_path.set_rules(self.number, **rules)

    def _current_limits(self) -> tuple[int | None, list[tuple[int, int]], int]:
        return self.config.vlan, list(self.config.trunk_ranges), self.max_frame

    @property
    def max_frame(self) -> int:
        """The longest frame for the data path, 0 for no limit."""
        return self.mtu + ETHERNET_HEADER if self.mtu else 0

    def status(self, up: bool) -> PortStatus:
        """The port as it is now. `up`: the data path can deliver frames to it."""
        link: Link = "broken" if self.broken else "up" if up else "down"
        detail, retry_in = self.broken or (None if up else self._why_down()), None
        if (next_try := self._next_try()) is not None:
            retry_in = max(next_try - time.monotonic(), 0.0)
            detail = f"{detail}; next try in {retry_in:.1f} s"
        return PortStatus(
            name=self.name,
            kind=self.config.kind,
            config=format_port(self.config),
            link=link,
            queues=self.pairs if up else 0,
            peer=self._peer(),
            ring=self._ring(),
            features=self._features(),
            mtu=self.mtu,
            iommu=self._iommu(),
            detail=detail,
            retry_in=retry_in,
        )

    def queue_failed(self, index: int, message: str) -> None:
        """The data path stopped virtqueue `index`."""
        self.broken = f"queue {index}: {message}"
        self.owner.report("port-broken", self.broken, self.name)

    async def _start(self) -> None:
        """Open what the port stands for."""

    async def _adopt(self, data: PortData, fds: Fds) -> None:
        """What a port of another process has open; one that has nothing open begins anew."""
        await self._start()

    async def _stop(self) -> None:
        """The inverse; also after a start that failed half-way."""

    def _peer(self) -> Peer | None:
        return None

    def _ring(self) -> str | None:
        return None

    def _features(self) -> tuple[str, ...]:
        return ()

    def _iommu(self) -> Iommu | None:
        return None

    def _next_try(self) -> float | None:
        """When the port tries by itself to get what it lacks, on the monotonic clock."""
        return None

    def _why_down(self) -> str:
        return "not started"
