"""`viaduct stats`: what the ports of a running switch carry."""

from __future__ import annotations

import sys
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
        viaduct stats --watch            frames and bits per second
        viaduct stats --json | jq .      every counter of every queue and poller
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
            ports = switch.call("port.list")
            _watch(switch.stream("stats.watch", interval=interval), ports)


def _print_totals(answer: Any) -> None:
    import msgspec

    from viaduct.switch.status import Statistics

    from .output import print_rows
    from .rates import TOTALS, TOTALS_NUMBERS, totals

    rows = totals(msgspec.convert(answer, Statistics))
    print_rows(TOTALS, rows, TOTALS_NUMBERS, empty="No ports. Add one: viaduct port add vm1=vhost-user:/tmp/vm1.sock")


def _watch(items: Any, ports_answer: Any) -> None:
    from contextlib import nullcontext

    import msgspec

    from viaduct.switch.status import PortStatus, Statistics

    from .output import print_rows, table
    from .rates import RATES, RATES_NUMBERS, rates

    ports = {port.name: port for port in msgspec.convert(ports_answer, list[PortStatus])}
    live: Any = None
    if sys.stdout.isatty():
        from rich.live import Live

        live = Live(auto_refresh=False)
    before: Statistics | None = None
    with live or nullcontext():
        for item in items:
            now = msgspec.convert(item, Statistics)
            if before is not None:
                rows = rates(before, now, ports)
                if live:
                    live.update(table(RATES, rows, RATES_NUMBERS), refresh=True)
                else:
                    print_rows(RATES, rows, RATES_NUMBERS)
            before = now
