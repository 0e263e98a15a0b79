"""The live table of a running switch: what each port carries now, with events passing above it."""

from __future__ import annotations

import asyncio
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from .log_lines import LogLines
from .output import table
from .poller_rates import POLLERS, POLLERS_NUMBERS, poller_rates
from .rates import RATES, RATES_NUMBERS, rates

_INTERVAL = 1.0
"""Seconds between two looks."""


class LiveTable(LogLines):
    """Events as lines, and below them a table that is drawn anew each second."""

    def __init__(self, switch: Any) -> None:
        super().__init__(switch)
        self._console = Console(highlight=False)
        self._live = Live(console=self._console, auto_refresh=False)
        self._live.start()
        self._drawing = asyncio.create_task(self._draw())

    async def _draw(self) -> None:
        before = self.switch.stats()
        while True:
            await asyncio.sleep(_INTERVAL)
            now = self.switch.stats()
            rows = rates(before, now, {port.name: port for port in self.switch.ports()})
            shown = table(RATES, rows, RATES_NUMBERS) if rows else Text("\nNo ports. Add one: viaduct port add ...")
            pollers = table(POLLERS, poller_rates(before, now), POLLERS_NUMBERS)
            self._live.update(Group(shown, pollers, Text("Ctrl-C ends the switch", style="dim")), refresh=True)
            before = now

    def show(self, line: str) -> None:
        """Print a line above the table."""
        self._console.print(line, markup=False)

    def close(self) -> None:
        """Show nothing more, and leave the last table on the screen."""
        super().close()
        self._drawing.cancel()
        self._live.stop()
