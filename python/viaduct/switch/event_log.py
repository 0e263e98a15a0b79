"""What happened to a switch: a bounded history, and those who follow it.

Theory of operation
-------------------
The last `HISTORY` events are kept, older ones are forgotten. A follower has a queue of as many: one that does not read
loses the oldest, never the switch memory. Each event has a number, one more than that of the event before it, so that
whoever reads sees where something was lost.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence

import msgspec

from .status import Event, Level

HISTORY = 1000
"""Events that are kept."""

LEVELS: dict[str, Level] = {
    "error": "error",
    "port-broken": "error",
    "peer-refused": "warning",
    "request-refused": "warning",
    "link-down": "warning",
    "sandbox-incomplete": "warning",
    "syscall-refused": "error",
    "not-reloaded": "error",
    "upgrade-failed": "error",
}
"""How bad events are, by kind; all others are information."""


class EventLog:
    """The history of one switch."""

    def __init__(self) -> None:
        self._history: deque[Event] = deque(maxlen=HISTORY)
        self._followers: set[asyncio.Queue[Event]] = set()
        self._last = 0
        self.counts: dict[str, int] = {}
        """How many events of each kind there were."""

    def restore(self, events: Sequence[Event], counts: Mapping[str, int]) -> None:
        """Go on with the history of another process; to be called before the first event."""
        self._history.extend(events)
        self._last = max((event.sequence for event in events), default=0)
        self.counts.update(counts)

    def add(self, kind: str, message: str, port: str | None = None) -> Event:
        """Keep an event that happens now, and tell the followers."""
        self._last += 1
        event = Event(
            time=time.time(),
            kind=kind,
            message=message,
            port=port,
            level=LEVELS.get(kind, "info"),
            sequence=self._last,
        )
        self._history.append(event)
        self.counts[kind] = self.counts.get(kind, 0) + 1
        for queue in self._followers:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)
        return event

    def catch_up(self, events: Sequence[Event]) -> None:
        """Keep what happened in another process after `restore`; the events get numbers of ours."""
        for event in events:
            self._last += 1
            self._history.append(msgspec.structs.replace(event, sequence=self._last))
            self.counts[event.kind] = self.counts.get(event.kind, 0) + 1

    def history(self, since: float = 0.0, port: str | None = None) -> tuple[Event, ...]:
        """The events kept, the oldest first. `since`: not those before, in seconds since 1970. `port`: only its own."""
        return tuple(event for event in self._history if event.time >= since and port in (None, event.port))

    async def follow(self, since: float = 0.0) -> AsyncGenerator[Event]:
        """The history, and then what happens, until the caller stops."""
        queue: asyncio.Queue[Event] = asyncio.Queue(HISTORY)
        for event in self.history(since):
            queue.put_nowait(event)
        self._followers.add(queue)
        try:
            while True:
                yield await queue.get()
        finally:
            self._followers.discard(queue)
