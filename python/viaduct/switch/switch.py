"""The switch: ports come and go, frames pass between them.

Theory of operation
-------------------
A `Switch` has a configuration, which says what ports there shall be, and a data path (`viaduct._core.Switch`), whose
poller threads carry the frames. Everything that changes anything ends in `apply`, which compares the configuration it
is given with the one that runs and does what differs: other ports do not notice. Each kind of port has its module in
`viaduct.switch.ports`. All methods are to be called on the asyncio loop in which the switch was opened.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

import msgspec

from . import sandbox
from .config import ConfigError, PortConfig, SwitchConfig, VhostUserPort
from .config_change import AddPort, ChangePort, RemovePort, SetOption, changes
from .event_fd import event_fd_of
from .event_log import EventLog
from .port_text import parse_port
from .ports import Port, make_port
from .status import (
    Event,
    Frame,
    MacEntry,
    PollerStatistics,
    PortStatistics,
    PortStatus,
    QueueStatistics,
    Statistics,
)

if TYPE_CHECKING:
    from viaduct._core import Queue
    from viaduct._core import Switch as DataPath
    from viaduct.guest import Guest

    from .diagnosis import Diagnosis
    from .trace import Packet

AGE_EPOCHS = 14
"""An address is forgotten when it was not seen for so many epochs of the data path."""

SNAP = 262144
"""Bytes of a frame that a capture keeps: all of any frame."""


class Switch:
    """A virtual switch: ``async with Switch() as switch: await switch.add_port("vm1", "vhost-user:/run/vm1.sock")``.

    `config`: what to begin with; more can come by `add_port` and `apply`.
    """

    def __init__(self, config: SwitchConfig | None = None) -> None:
        self._wanted = config or SwitchConfig()
        self._config = SwitchConfig()
        self._data_path: DataPath | None = None
        self._ports: dict[str, Port] = {}
        self._log = EventLog()
        self._event_fd = -1
        self._ageing: asyncio.TimerHandle | None = None
        self._changing = asyncio.Lock()

    async def __aenter__(self) -> Switch:
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._event_fd, self._take_events)
        try:
            await self.apply(self._wanted)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End all ports and pollers, and remove the sockets. May be called twice."""
        async with self._changing:
            for port in self._ports.values():
                await port.close()
            self._ports.clear()
            if self._ageing is not None:
                self._ageing.cancel()
            self._data_path = None
            if self._event_fd >= 0:
                asyncio.get_running_loop().remove_reader(self._event_fd)
                os.close(self._event_fd)
                self._event_fd = -1

    @property
    def config(self) -> SwitchConfig:
        """What runs now."""
        return self._config

    @property
    def data_path(self) -> DataPath:
        """The Rust half. Raises RuntimeError unless the switch is open."""
        if self._data_path is None:
            raise RuntimeError("the switch is not open; use it in: async with Switch() as switch")
        return self._data_path

    @property
    def members(self) -> Mapping[str, Port]:
        """The ports by name."""
        return self._ports

    def remember(self, events: Sequence[Event], counts: Mapping[str, int]) -> None:
        """Begin with the history of another process."""
        self._log.restore(events, counts)

    def catch_up(self, events: Sequence[Event]) -> None:
        """Add what has happened in that process since."""
        self._log.catch_up(events)

    def unchanging(self) -> asyncio.Lock:
        """While this is held, `apply` waits."""
        return self._changing

    def adopt(self, port: Port, config: PortConfig) -> None:
        """Count a port among ours that another process has made (`viaduct.switch.handover_taking`)."""
        self._ports[port.name] = port
        self._keep(port.name, config)

    async def apply(self, config: SwitchConfig) -> None:
        """Make the switch what `config` says, touching only what differs.

        Raises:
            ConfigError: something of it cannot be had; what was done before that stays done, and `config` tells.
        """
        async with self._changing:
            todo = changes(self._config, config)
            self._set_options([change for change in todo if isinstance(change, SetOption)], config)
            for change in todo:
                match change:
                    case RemovePort(name=name):
                        await self._remove(name)
                    case ChangePort(name=name, new=new, in_place=True):
                        self._ports[name].change(new)
                        self._keep(name, new)
                        self.report("port-changed", f"now {self._ports[name].status(True).config}", name)
                    case ChangePort(name=name, new=new):
                        await self._remove(name)
                        await self._add(name, new)
                    case AddPort(name=name, port=port):
                        await self._add(name, port)

    async def add_port(self, name: str, port: PortConfig | str) -> None:
        """Add a port, given as its configuration or in short: ``"vhost-user:/run/vm1.sock,queues=2"``.

        Raises:
            ConfigError: it cannot be had, or the name is taken.
        """
        made = parse_port(port) if isinstance(port, str) else port
        await self.apply(self._config.with_port(name, made))

    async def remove_port(self, name: str) -> None:
        """Remove a port. Raises ConfigError if there is none of that name."""
        await self.apply(self._config.without_port(name))

    @asynccontextmanager
    async def guest(self, name: str, **options: Any) -> AsyncGenerator[Guest]:
        """A guest in this process, on a port of its own: ``async with switch.guest("eve", ip="10.0.0.1/24") as eve``.

        `options` are those of `viaduct.guest.Guest`. Port and guest go when the block is left.

        Raises:
            ConfigError: the name is taken.
            GuestError: the options make no sense.
        """
        from tempfile import TemporaryDirectory

        from viaduct.guest import Guest

        with TemporaryDirectory(prefix="viaduct-") as directory:
            path = os.path.join(directory, "guest.sock")
            guest = Guest(path, name=name, **options)
            await self.add_port(name, VhostUserPort(path=path, queues=guest.options.queues))
            try:
                async with guest:
                    yield guest
            finally:
                with suppress(ConfigError):  # somebody may have removed the port
                    await self.remove_port(name)

    def ports(self) -> tuple[PortStatus, ...]:
        """Every port as it is now."""
        up = {number: is_up for number, is_up, _, _ in self.data_path.port_stats()}
        return tuple(port.status(up.get(port.number, False)) for port in self._ports.values())

    def stats(self) -> Statistics:
        """All counters."""
        counted = {number: (up, received, sent) for number, up, received, sent in self.data_path.port_stats()}
        ports = []
        for name, port in self._ports.items():
            up, received, sent = counted.get(port.number, (False, [], []))
            status = port.status(up)
            queues = tuple(_queues("received", received) + _queues("sent", sent))
            macs, unlearned, moved, waits = self.data_path.rule_stats(port.number)
            ports.append(
                PortStatistics(
                    name=name,
                    kind=status.kind,
                    link=status.link,
                    queues=queues,
                    macs=macs,
                    unlearned=unlearned,
                    moved=moved,
                    rate_waits=waits,
                )
            )
        return Statistics(time=time.monotonic(), ports=tuple(ports), pollers=self._pollers())

    def _pollers(self) -> tuple[PollerStatistics, ...]:
        cpus: Sequence[int | None] = self._config.pollers or (None,)
        return tuple(
            PollerStatistics(
                poller=index,
                cpu=cpus[index],
                frames=frames,
                rounds=rounds,
                sleeps=sleeps,
                wakeups=wakeups,
                active_queues=active,
                busy_seconds=busy,
                idle_seconds=idle,
                busy_cycles=cycles,
                batches=tuple(batches),
                queues=assigned,
            )
            for index, (busy, idle, cycles, rounds, frames, batches, sleeps, wakeups, active, assigned) in enumerate(
                self.data_path.poller_stats()
            )
        )

    def macs(self) -> tuple[MacEntry, ...]:
        """The addresses that were learned."""
        names = {port.number: name for name, port in self._ports.items()}
        epoch = self._config.mac_ageing / AGE_EPOCHS
        return tuple(
            MacEntry(mac=mac, vlan=vlan, port=names[number], age=age * epoch)
            for mac, vlan, number, age in sorted(self.data_path.stations())
            if number in names
        )

    async def events(self, since: float = 0.0) -> AsyncGenerator[Event]:
        """What happened (up to the last thousand events), and then what happens, until the caller stops.

        `since`: nothing from before that moment, in seconds since 1970.
        """
        async with aclosing(self._log.follow(since)) as events:
            async for event in events:
                yield event

    def history(self, since: float = 0.0, port: str | None = None) -> tuple[Event, ...]:
        """What happened, up to the last thousand events, the oldest first; of one port only if named."""
        return self._log.history(since, port)

    def event_counts(self) -> dict[str, int]:
        """How many events of each kind there have been."""
        return dict(self._log.counts)

    async def capture(self, port: str) -> AsyncGenerator[Sequence[Frame]]:
        """Copies of the frames that pass a port from now on, in batches, until the caller stops or the port goes.

        Raises:
            ConfigError: there is no such port.
        """
        from viaduct._core import Capture

        self._config.without_port(port)  # raises with the nearest name if there is none
        captured = self._ports[port]
        number = captured.number
        loop = asyncio.get_running_loop()
        arrived = asyncio.Event()
        captured.on_close.append(arrived.set)
        with event_fd_of(loop, arrived.set) as event_fd:
            capture = Capture(SNAP, event_fd)
            self.data_path.add_capture(number, capture)
            try:
                while captured.number >= 0:
                    await arrived.wait()
                    arrived.clear()
                    yield [
                        Frame(time_ns, port, "received" if from_port else "sent", length, data)
                        for time_ns, from_port, length, data in capture.take()
                    ]
            finally:
                with suppress(ValueError, RuntimeError):  # the port or the switch may be gone
                    self.data_path.remove_capture(number, capture)
                captured.on_close.remove(arrived.set)

    def queue_states(self, port: str) -> list[tuple[int, bool, bool, bool, bool, int, int, bool, int]]:
        """The virtqueues of a port, as `viaduct.switch.diagnosis.QueueState` has them."""
        from viaduct._core import queue_states

        return queue_states(self.data_path, self._ports[port].number)

    def taken_address(self, port: str) -> tuple[str, int, str] | None:
        """The last address that a port lost to another that exists: address, VLAN, the other's name."""
        from viaduct._core import taken_address

        names = {each.number: name for name, each in self._ports.items()}
        taken = taken_address(self.data_path, self._ports[port].number)
        return None if taken is None or taken[2] not in names else (taken[0], taken[1], names[taken[2]])

    async def diagnose(self, port: str, seconds: float = 1.0) -> Diagnosis:
        """Why a port passes no packets, from two looks at it.

        Raises:
            ConfigError: there is no such port.
        """
        from .diagnosis import diagnose

        return await diagnose(self, port, seconds)

    async def trace(self, port: str, count: int = 10) -> AsyncGenerator[Packet]:
        """The next packets of a port as they stand in its rings, until `count` were shown or the port goes.

        Raises:
            ConfigError: there is no such port, or it has no rings.
        """
        from .trace import trace

        async with aclosing(trace(self, port, count)) as packets:
            async for packet in packets:
                yield packet

    def report(self, kind: str, message: str, port: str | None = None) -> None:
        """Add an event to the history and tell the followers."""
        self._log.add(kind, message, port)

    def _set_options(self, options: list[SetOption], config: SwitchConfig) -> None:
        for option in options:
            if option.name in ("pollers", "polling") and self._ports:
                raise ConfigError(
                    f"cannot be changed from {option.old!r} to {option.new!r} while there are ports; "
                    "restart the switch with the new value",
                    (option.name,),
                )
        self._config = msgspec.structs.replace(config, ports=self._config.ports)
        if self._data_path is None or any(option.name in ("pollers", "polling") for option in options):
            from viaduct._core import Switch as DataPath

            pollers: list[int | None] = list(config.pollers) or [None]
            try:
                self._data_path = DataPath(pollers, config.polling, self._event_fd)
            except OSError as error:
                raise ConfigError(f"{error} (pollers on CPU {list(config.pollers)})", ("pollers",)) from None
            self._age()
        for option in options:
            self.report("option-changed", f"{option.name} is now {option.new!r}")

    async def _add(self, name: str, config: PortConfig) -> None:
        port = make_port(self, name, config)
        self._ports[name] = port
        try:
            await port.open()
        except ConfigError as error:
            del self._ports[name]
            raise error.because(sandbox.explain(config)).within("ports", name) from None
        except BaseException:
            del self._ports[name]
            raise
        self._keep(name, config)
        self.report("port-added", port.status(False).config, name)

    async def _remove(self, name: str) -> None:
        port = self._ports.pop(name)
        await port.close()
        self._config = self._config.without_port(name)
        self.report("port-removed", port.status(False).config, name)

    def _keep(self, name: str, config: PortConfig) -> None:
        self._config = msgspec.structs.replace(self._config, ports={**self._config.ports, name: config})

    def _take_events(self) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._event_fd)
        by_number = {port.number: port for port in self._ports.values()}
        for number, index, message in self.data_path.take_events():
            if port := by_number.get(number):
                port.queue_failed(index, message)
        for mac, vlan, before, now, times in self.data_path.take_flaps():
            ends = [by_number[number].name for number in (before, now) if number in by_number]
            self.report(
                "mac-flapping",
                f"{mac}{f' in VLAN {vlan}' if vlan else ''} goes back and forth between {' and '.join(ends)} "
                f"({times} times): two stations have one address, or there is a loop; "
                f"if it belongs to one of these ports, say so: mac={mac}",
                ends[-1] if ends else None,
            )

    def _age(self) -> None:
        """Begin an ageing epoch, and arrange for the next."""
        if self._ageing is not None:
            self._ageing.cancel()
            self.data_path.age()
        interval = self._config.mac_ageing / AGE_EPOCHS
        self._ageing = asyncio.get_running_loop().call_later(interval, self._age)


def _queues(direction: str, queues: list[Queue]) -> list[QueueStatistics]:
    return [
        QueueStatistics(
            queue=index,
            direction="received" if direction == "received" else "sent",
            frames=frames,
            bytes=octets,
            drops=drops,
            notifications=notifications,
            completed_offloads=completed,
        )
        for index, (frames, octets, drops, notifications, completed) in enumerate(queues)
    ]
