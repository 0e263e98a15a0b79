"""The new process's side of a hand-over: everything is made, then the rings' positions come, then frames flow.

`Predecessor.find` asks for it, `prepare` makes everything in an empty switch, `relieve` goes on where the other stops.
"""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import msgspec

from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.handover import Fds
from viaduct.vhost_user.socket_path import Listener, try_connect

from .config import ConfigError, SwitchConfig
from .control_wire import HAND_OVER, ControlError, Reply, Request
from .handover_channel import HandoverChannel, HandoverError
from .handover_format import (
    FORMATS,
    Failed,
    PortData,
    PortPosition,
    PositionsData,
    Prepared,
    Running,
    SwitchData,
)
from .ports import make_port
from .switch import Switch

PATIENCE = 60.0
"""Seconds in which the old process has to say the next thing."""


class Predecessor:
    """The process that is to be relieved."""

    def __init__(
        self, channel: HandoverChannel, data: SwitchData, fds: Fds, relieved: Callable[[Predecessor], None]
    ) -> None:
        self.channel = channel
        self.relieved = relieved
        self.data = data
        self.stdio = [fds.need(place) for place in data.stdio]
        """Its standard input, output and errors."""
        self.listener = Listener(data.control_path, adopted=socket.socket(fileno=fds.need(data.control)))
        """Its control socket."""
        self.gap = 0.0
        """Seconds for which nobody forwarded; known once it is relieved."""

    @classmethod
    async def find(cls, path: str, relieved: Callable[[Predecessor], None]) -> Predecessor:
        """Ask the switch whose control socket is at `path` to hand over. `relieved` is called when we forward.

        Raises:
            ControlError: none is there, or it refuses.
            HandoverError: it began to, and failed.
        """
        from viaduct import __version__

        try:
            sock = try_connect(path)
        except (OSError, VhostUserError) as error:
            raise ControlError(f"no switch answers at {path} ({error})", "unreachable") from None
        channel = HandoverChannel(sock)
        try:
            request = Request(method=HAND_OVER, id=1, params={"formats": list(FORMATS), "version": __version__})
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(sock, msgspec.json.encode(request) + b"\n")
            async with asyncio.timeout(PATIENCE):
                reply = await _reply(loop, sock)
            if reply.error is not None:
                raise ControlError(reply.error.message, reply.error.code)
            message, fds = await channel.receive(PATIENCE)
            try:
                if not isinstance(message, SwitchData) or message.format not in FORMATS:
                    raise HandoverError("the old process began with something else than what was asked for")
                return cls(channel, message, fds, relieved)
            finally:
                fds.close()
        except BaseException:
            channel.close()
            raise

    def adopt_service(self) -> None:
        """Go on where the old process worked: its directory, and the service that systemd knows."""
        os.chdir(self.data.directory)
        os.environ.update(self.data.environment)

    async def prepare(self, switch: Switch, wanted: SwitchConfig) -> None:
        """Make everything of the old switch in `switch`, which is empty: nothing of it runs yet. The switch's own
        settings are those of `wanted`.

        Raises:
            ConfigError: a setting cannot be had here.
            HandoverError: it cannot be made again.
        """
        running = self.data.running
        switch.remember(self.data.events, self.data.event_counts)
        await switch.apply(msgspec.structs.replace(wanted, ports={}))
        switch.data_path.hold()
        for _ in range(self.data.ports):
            message, fds = await self.channel.receive(PATIENCE)
            try:
                if not isinstance(message, PortData) or message.name not in running.ports:
                    raise HandoverError("the old process described something else than one of its ports")
                await self._adopt(switch, message, fds)
            finally:
                fds.close()

    async def _adopt(self, switch: Switch, data: PortData, fds: Fds) -> None:
        config = self.data.running.ports[data.name]
        port = make_port(switch, data.name, config)
        try:
            await port.adopt(data, fds)
        except (ConfigError, VhostUserError, OSError, ValueError) as error:
            raise HandoverError(f"port {data.name} cannot be taken over: {error}") from error
        switch.adopt(port, config)

    async def decline(self, reason: str) -> None:
        """Tell the old process to go on, and why."""
        with suppress(HandoverError):
            await self.channel.send(Failed(reason))
        self.channel.close()

    async def relieve(self, switch: Switch) -> None:
        """Take over now. When this returns the switch forwards, and the old process is about to end.

        Raises:
            HandoverError: the old process goes on instead.
        """
        await self.channel.send(Prepared())
        positions, fds = await self.channel.receive(PATIENCE)
        fds.close()
        if not isinstance(positions, PositionsData):
            raise HandoverError("the old process said something else than where it stands")
        members = switch.members
        switch.catch_up(positions.events)
        for name, port in members.items():
            position = positions.ports.get(name, PortPosition())
            port.broken = port.broken or position.broken
            received, sent = (
                [msgspec.structs.astuple(queue) for queue in queues] for queues in (position.received, position.sent)
            )
            switch.data_path.restore_counters(port.number, received, sent)
            try:
                port.resume(position)
            except (ConfigError, VhostUserError, OSError, ValueError) as error:
                raise HandoverError(f"port {name} cannot go on: {error}") from error
        switch.data_path.restore_stations(
            [
                (bytes.fromhex(station.mac.replace(":", "")), station.vlan, members[station.port].number, station.age)
                for station in positions.stations
                if station.port in members
            ]
        )
        switch.data_path.resume()
        self.gap = time.monotonic() - positions.stopped
        # If nobody is there to hear it, the old process is dead, and there is nobody else; or it is about to kill us.
        with suppress(HandoverError):
            await self.channel.send(Running(self.gap))
        self.listener.owned = True
        for port in members.values():
            port.thaw()
        self.relieved(self)

    async def ended(self) -> None:
        """Returns when the old process has ended, and let go of what was not handed over."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(PATIENCE):
                await asyncio.get_running_loop().sock_recv(self.channel.sock, 1)
        self.channel.close()


async def _reply(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Reply:
    """The line that answers a request; what follows it belongs to somebody else."""
    line = b""
    while not line.endswith(b"\n"):
        piece = await loop.sock_recv(sock, 1)
        if not piece:
            raise ControlError("the switch hung up before it answered", "unreachable")
        line += piece
    try:
        return msgspec.json.decode(line, type=Reply)
    except msgspec.DecodeError as error:
        raise ControlError(f"what answered is no switch: {error}", "unreachable") from None
