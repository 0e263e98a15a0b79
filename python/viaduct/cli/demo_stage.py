"""Where a demonstration is shown: lines, and while something runs a live table of the switch's ports."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from viaduct.switch.status import Statistics
from viaduct.switch.switch import Switch

from .output import print_rows, table
from .rates import RATES, RATES_NUMBERS, rates

_INTERVAL = 0.5
"""Seconds between two looks."""


class Stage:
    """Shows a switch at work; shows nothing if `quiet`."""

    def __init__(self, switch: Switch, quiet: bool) -> None:
        self._switch = switch
        self._quiet = quiet

    def say(self, text: str) -> None:
        """One line."""
        if not self._quiet:
            print(text, flush=True)

    @asynccontextmanager
    async def table(self) -> AsyncIterator[None]:
        """While the inside runs, a table of rates: drawn anew on a terminal, and once at the end elsewhere."""
        before = self._switch.stats()
        drawing = asyncio.create_task(self._draw()) if not self._quiet and sys.stdout.isatty() else None
        try:
            yield
        finally:
            if drawing is not None:
                drawing.cancel()
                await asyncio.gather(drawing, return_exceptions=True)
        if not self._quiet and drawing is None:
            print_rows(RATES, self._rows(before), RATES_NUMBERS)

    async def _draw(self) -> None:
        from rich.live import Live

        with Live(auto_refresh=False, transient=True) as live:
            while True:
                before = self._switch.stats()
                await asyncio.sleep(_INTERVAL)
                live.update(table(RATES, self._rows(before), RATES_NUMBERS), refresh=True)

    def _rows(self, before: Statistics) -> list[tuple[str, ...]]:
        ports = {port.name: port for port in self._switch.ports()}
        return rates(before, self._switch.stats(), ports)
