"""A switch without packets, for what stands above it: it holds a configuration and says what a test tells it to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from viaduct.switch.config import PortConfig, SwitchConfig
from viaduct.switch.diagnosis import Diagnosis
from viaduct.switch.port_text import format_port
from viaduct.switch.status import (
    Event,
    Frame,
    MacEntry,
    Peer,
    PortStatistics,
    PortStatus,
    QueueStatistics,
    Statistics,
)
from viaduct.switch.trace import Packet


class ScriptedSwitch:
    """Has the interface that the control socket serves. `frames` and `happenings` are what capture and events give."""

    def __init__(self, config: SwitchConfig | None = None) -> None:
        self.config = config or SwitchConfig()
        self.frames: asyncio.Queue[Sequence[Frame] | None] = asyncio.Queue()
        self.happenings: asyncio.Queue[Event | None] = asyncio.Queue()
        self.happened: list[Event] = []
        self.packets: asyncio.Queue[Packet | None] = asyncio.Queue()
        self.captures_open = 0
        self.time = 0.0

    async def apply(self, config: SwitchConfig) -> None:
        self.config = config

    async def add_port(self, name: str, port: PortConfig) -> None:
        self.config = self.config.with_port(name, port)

    async def remove_port(self, name: str) -> None:
        self.config = self.config.without_port(name)

    def ports(self) -> list[PortStatus]:
        return [
            PortStatus(
                name=name,
                kind=port.kind,
                config=format_port(port),
                link="up",
                queues=1,
                ring="packed",
                peer=Peer(pid=4711, uid=0),
            )
            for name, port in self.config.ports.items()
        ]

    def stats(self) -> Statistics:
        self.time += 1
        frames = int(self.time * 1000)
        return Statistics(
            time=self.time,
            ports=tuple(
                PortStatistics(
                    name=name,
                    kind=port.kind,
                    link="up",
                    queues=(
                        QueueStatistics(queue=0, direction="received", frames=frames, bytes=frames * 64),
                        QueueStatistics(queue=0, direction="sent", drops={"no_buffers": 12, "too_big": 1}),
                    ),
                )
                for name, port in self.config.ports.items()
            ),
        )

    def macs(self) -> list[MacEntry]:
        return [MacEntry(mac="52:54:00:00:00:01", vlan=0, port=name, age=1.5) for name in self.config.ports]

    def history(self, since: float = 0.0, port: str | None = None) -> list[Event]:
        return [event for event in self.happened if event.time >= since and port in (None, event.port)]

    async def events(self, since: float = 0.0) -> AsyncGenerator[Event]:
        while (event := await self.happenings.get()) is not None:
            yield event

    async def diagnose(self, port: str, seconds: float) -> Diagnosis:
        return Diagnosis(port=port, findings=(), seen=(f"for {seconds} s",))

    async def trace(self, port: str, count: int) -> AsyncGenerator[Packet]:
        while (packet := await self.packets.get()) is not None:
            yield packet

    async def capture(self, port: str) -> AsyncGenerator[Sequence[Frame]]:
        self.captures_open += 1
        try:
            while (batch := await self.frames.get()) is not None:
                yield batch
        finally:
            self.captures_open -= 1
