"""Trying again: what a port does about something that is not there, with growing pauses, until it is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from viaduct.switch.config import ConfigError

FIRST_PAUSE, LAST_PAUSE = 0.25, 5.0
"""Seconds between attempts: doubled from the first to the last."""


class Retry:
    """Calls `attempt` until it raises neither ConfigError nor OSError."""

    def __init__(self, attempt: Callable[[], None]) -> None:
        self._attempt = attempt
        self._task: asyncio.Task[None] | None = None
        self.reason = ""
        """Why the last attempt failed; empty before the first."""
        self.next_try: float | None = None
        """When the next one comes, on the monotonic clock; None: there is nothing to try."""

    def start(self) -> None:
        """Begin, unless that has been done."""
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="retry")

    def stop(self) -> None:
        """Give up. May be called at any time."""
        if self._task is not None:
            self._task.cancel()
        self._task, self.next_try, self.reason = None, None, ""

    async def _run(self) -> None:
        pause = FIRST_PAUSE
        while True:
            self.next_try = time.monotonic() + pause
            await asyncio.sleep(pause)
            try:
                self._attempt()
            except (ConfigError, OSError) as error:
                self.reason = str(error)
                pause = min(2 * pause, LAST_PAUSE)
            else:
                self._task, self.next_try, self.reason = None, None, ""
                return
