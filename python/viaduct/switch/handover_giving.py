"""The old process's side of a hand-over: describe everything while frames go on, stop forwarding, end.

Until the positions are sent the new process cannot have touched a ring, and giving up means to go on. After that it may
have: it is killed first, and the rings are taken up where they are found, as after a crash.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.socket_access import peer_process
from viaduct.vhost_user.wire import ready

from .config import SwitchConfig
from .handover_channel import HandoverChannel, HandoverError
from .handover_format import (
    FORMATS,
    Counted,
    Failed,
    HandoverMessage,
    PortPosition,
    PositionsData,
    Prepared,
    Running,
    Sources,
    Station,
    SwitchData,
)

if TYPE_CHECKING:
    from .ports import Port
    from .switch import Switch

PREPARE = 60.0
"""Seconds in which the new process has to map all memory; frames go on meanwhile."""
START = 10.0
"""Seconds in which it has to start all rings. Frames wait meanwhile, and it takes milliseconds."""

LEAVE = 1.0
"""Seconds that it has to end by itself when it has given up."""

ENVIRONMENT = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "INVOCATION_ID", "JOURNAL_STREAM")
"""Variables by which systemd knows a service (sd_notify(3), systemd.exec(5))."""


class Successor:
    """The process that wants to take over, at the other end of `channel`."""

    def __init__(self, channel: HandoverChannel) -> None:
        """Raises HandoverError for a process that we could not end if it failed half-way."""
        self.pid, uid, _ = peer_process(channel.sock)
        if uid != os.geteuid():
            raise HandoverError(
                f"the new process runs as user {uid} and this one as {os.geteuid()}; "
                f"start it as the same user: sudo -u '#{os.geteuid()}' viaduct upgrade"
            )
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise HandoverError(f"the new process cannot be watched ({error.strerror})") from None
        self.channel = channel

    async def end(self) -> None:
        """Kill it, unless it goes by itself, and wait for its end: then it touches no ring any more."""
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE):
                await ready(self._pidfd)
                return
        try:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        except OSError as error:
            if error.errno != errno.ESRCH:
                raise
        await ready(self._pidfd)

    def close(self) -> None:
        """Watch it no longer."""
        os.close(self._pidfd)


class Giver:
    """What a running `viaduct switch` knows beside its switch, and how it ends when another process has taken over.

    `sources` and `configured`: where the configuration came from, and what it was when it was read. `gone` is called
    when the new process forwards, with its pid and the seconds for which nobody did; it does not return.
    """

    def __init__(
        self,
        switch: Switch,
        sources: Sources,
        configured: Callable[[], SwitchConfig],
        gone: Callable[[int, float], None],
    ) -> None:
        self.switch = switch
        self.sources = sources
        self.configured = configured
        self.gone = gone
        self._told = 0
        """Number of the last event that the new process knows."""

    async def give(self, params: dict[str, Any], sock: socket.socket, control: int, control_path: str) -> None:
        """Hand everything over to the process at the other end of `sock`, which is ours from now on.

        Raises:
            HandoverError: it did not come to that; this switch goes on.
        """
        channel = HandoverChannel(sock)
        try:
            number = _format(params)
            with closing(Successor(channel)) as successor:
                await self._give(successor, number, control, control_path)
        except (HandoverError, VhostUserError, OSError) as error:
            self.switch.report("upgrade-failed", f"this process goes on: {error}")
            with suppress(HandoverError):
                await channel.send(Failed(str(error)))
            raise HandoverError(str(error)) from error
        finally:
            channel.close()

    async def _give(self, successor: Successor, number: int, control: int, control_path: str) -> None:
        channel = successor.channel
        async with self.switch.unchanging():
            ports = self.switch.members
            frozen: list[Port] = []
            try:
                for port in ports.values():
                    frozen.append(port)
                    await port.freeze()
                await self._describe(channel, number, control, control_path)
                _expect(await channel.receive(PREPARE), Prepared)
                await self._let_go(successor)
            except BaseException:
                for port in frozen:
                    port.thaw()
                raise

    async def _describe(self, channel: HandoverChannel, number: int, control: int, control_path: str) -> None:
        from viaduct import __version__

        fds = Fds()
        switch = self.switch
        events = list(switch.history())
        self._told = events[-1].sequence if events else 0
        data = SwitchData(
            format=number,
            version=__version__,
            pid=os.getpid(),
            running=switch.config,
            configured=self.configured(),
            sources=self.sources,
            directory=os.getcwd(),
            control_path=control_path,
            control=fds.add(control),
            stdio=[fds.add(fd) for fd in range(3)],
            ports=len(switch.members),
            environment={name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
            events=events,
            event_counts=switch.event_counts(),
        )
        await channel.send(data, fds)
        for port in switch.members.values():
            fds = Fds()
            await channel.send(port.save(fds), fds)

    async def _let_go(self, successor: Successor) -> None:
        """The moment itself."""
        stopped = time.monotonic()
        held = self.switch.data_path.hold()
        try:
            positions = positions_of(self.switch, held, stopped, self._told)
            await successor.channel.send(positions)
        except BaseException:
            # Nothing was understood that was not said to its end.
            self.switch.data_path.resume()
            raise
        try:
            running, fds = await successor.channel.receive(START)
            fds.close()
            if not isinstance(running, Running):
                raise HandoverError("the new process said something else than that it runs")
        except BaseException:
            await successor.end()
            self._take_up(positions)
            raise
        self.gone(successor.pid, running.gap)

    def _take_up(self, positions: PositionsData) -> None:
        """The new process has died, and it may have used the rings."""
        for name, port in self.switch.members.items():
            port.take_up(positions.ports[name])
        self.switch.data_path.resume()


def positions_of(switch: Switch, held: list[tuple[int, int, int]], stopped: float, told: int) -> PositionsData:
    """Where everything stands in a switch that is held, and the events after number `told`."""
    members = switch.members
    rings: dict[int, dict[int, int]] = {}
    for number, index, base in held:
        rings.setdefault(number, {})[index] = base
    counted = {number: (received, sent) for number, _, received, sent in switch.data_path.port_stats()}
    ports = {}
    for name, port in members.items():
        received, sent = counted.get(port.number, ([], []))
        ports[name] = PortPosition(
            rings=rings.get(port.number, {}),
            received=[Counted(*queue) for queue in received],
            sent=[Counted(*queue) for queue in sent],
            replayed=switch.data_path.replayed(port.number),
            broken=port.broken,
        )
    names = {port.number: name for name, port in members.items()}
    stations = [
        Station(mac, vlan, names[number], age)
        for mac, vlan, number, age in switch.data_path.stations()
        if number in names
    ]
    events = [event for event in switch.history() if event.sequence > told]
    return PositionsData(stopped=stopped, ports=ports, stations=stations, events=events)


def _format(params: dict[str, Any]) -> int:
    """The highest format that both know. Raises HandoverError."""
    offered = params.get("formats")
    known = [number for number in FORMATS if isinstance(offered, list) and number in offered]
    if not known:
        raise HandoverError(
            f"the new process ({params.get('version', 'unknown version')}) reads hand-overs of formats {offered}, "
            f"this one writes {list(FORMATS)}; restart the switch instead"
        )
    return max(known)


def _expect(received: tuple[HandoverMessage, Fds], kind: type[Prepared]) -> None:
    message, fds = received
    fds.close()
    if not isinstance(message, kind):
        raise HandoverError(f"the new process said {type(message).__name__} instead of {kind.__name__}")
