"""`viaduct stats`: what the ports of a running switch carry."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .options import Control, Json


def stats(
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Show rates, again and again, until Ctrl-C.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.1, max=3600)] = 1.0,
    control: Control = None,
    json: Json = False,
) -> None:
    """Show what each port carries and drops.

    Received is what came in from the port's guest, sent is what went out to it.

    \b
        viaduct stats                    totals since each port was added
        viaduct stats --watch            frames and bits per second, and what pollers do with their time
        viaduct stats --json | jq .      every counter of every queue and poller

    With --watch, a poller's LOAD is the part of its time in which it moved frames, SPIN the part in which it looked
    and found none; the rest it slept. CYCLES is what a frame costs it. WAKE-UPS are sleeps that a frame ended.
    BATCHES BY SIZE: how many in a hundred had 1 frame, 2-3, ... 64.
    """
    from .asking import running_switch
    from .output import print_json

    with running_switch(control) as switch:
        if not watch:
            answer = switch.call("stats")
            if json:
                print_json(answer)
            else:
                _print_totals(answer)
        elif json:
            for item in switch.stream("stats.watch", interval=interval):
                print_json(item)
        else:
            with running_switch(control) as second:
                _watch(switch.stream("stats.watch", interval=interval), lambda: second.call("port.list"))


def _print_totals(answer: Any) -> None:
    import msgspec

    from viaduct.switch.status import Statistics

    from .output import print_rows
    from .rates import TOTALS, TOTALS_NUMBERS, totals

    rows = totals(msgspec.convert(answer, Statistics))
    print_rows(TOTALS, rows, TOTALS_NUMBERS, empty="No ports. Add one: viaduct port add vm1=vhost-user:/tmp/vm1.sock")


def _watch(items: Any, list_ports: Callable[[], Any]) -> None:
    from contextlib import nullcontext

    import msgspec

    from viaduct.switch.status import PortStatus, Statistics

    from .output import print_rows, table
    from .poller_rates import POLLERS, POLLERS_NUMBERS, poller_rates
    from .rates import RATES, RATES_NUMBERS, rates

    live: Any = None
    if sys.stdout.isatty():
        from rich.console import Group
        from rich.live import Live

        live = Live(auto_refresh=False)
    before: Statistics | None = None
    with live or nullcontext():
        for item in items:
            now = msgspec.convert(item, Statistics)
            if before is not None:
                ports = {port.name: port for port in msgspec.convert(list_ports(), list[PortStatus])}
                rows = rates(before, now, ports)
                pollers = poller_rates(before, now)
                if live:
                    shown = Group(table(RATES, rows, RATES_NUMBERS), table(POLLERS, pollers, POLLERS_NUMBERS))
                    live.update(shown, refresh=True)
                else:
                    print_rows(RATES, rows, RATES_NUMBERS)
                    print_rows(POLLERS, pollers, POLLERS_NUMBERS)
            before = now
