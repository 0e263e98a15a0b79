"""Statistics as rows: totals of one snapshot, or rates between two. Also events as log lines."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from .output import count, drops

if TYPE_CHECKING:
    from collections.abc import Mapping

    from viaduct.switch.status import Direction, Event, PortStatistics, PortStatus, Statistics

TOTALS = ("PORT", "LINK", "RECEIVED", "BYTES", "SENT", "BYTES", "DROPPED")
TOTALS_NUMBERS = (2, 3, 4, 5)
RATES = ("PORT", "LINK", "PEER", "RING", "RECEIVED/S", "BIT/S", "SENT/S", "BIT/S", "DROPPED")
RATES_NUMBERS = (4, 5, 6, 7)


def totals(statistics: Statistics) -> list[tuple[str, ...]]:
    """A row for each port: what it has carried since it was added."""
    return [
        (
            port.name,
            port.link,
            str(port.frames("received")),
            str(port.bytes("received")),
            str(port.frames("sent")),
            str(port.bytes("sent")),
            drops(port.drops()),
        )
        for port in statistics.ports
    ]


def rates(before: Statistics, after: Statistics, ports: Mapping[str, PortStatus]) -> list[tuple[str, ...]]:
    """A row for each port: frames and bits a second between two snapshots. `ports` adds who is connected."""
    seconds = max(after.time - before.time, 1e-9)
    earlier = {port.name: port for port in before.ports}
    rows = []
    for port in after.ports:
        old = earlier.get(port.name)
        status = ports.get(port.name)
        cells = [port.name, port.link]
        cells.append(f"pid {status.peer.pid}" if status and status.peer else "-")
        cells.append(f"{status.ring} x{status.queues}" if status and status.ring else "-")
        for direction in ("received", "sent"):
            frames, carried = _difference(old, port, direction)
            cells += [count(frames / seconds), count(carried * 8 / seconds)]
        cells.append(drops(port.drops()))
        rows.append(tuple(cells))
    return rows


def event_line(event: Event) -> str:
    """An event as a log line: local time, port, what happened."""
    return f"{clock(event.time)} {event.port or 'switch'} {event.kind}: {event.message}"


def clock(moment: float) -> str:
    """The local time of a moment, in seconds since 1970, to the millisecond."""
    return f"{time.strftime('%H:%M:%S', time.localtime(moment))}.{int(moment * 1000) % 1000:03}"


def _difference(old: PortStatistics | None, new: PortStatistics, direction: Direction) -> tuple[int, int]:
    frames, carried = new.frames(direction), new.bytes(direction)
    if old is not None and old.frames(direction) <= frames:  # else the port was removed and added meanwhile
        frames -= old.frames(direction)
        carried -= old.bytes(direction)
    return frames, carried
