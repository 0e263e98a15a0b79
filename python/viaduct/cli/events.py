"""`viaduct events`: what happened in a running switch, and what happens."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Control, Json


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what happens, until Ctrl-C.")] = False,
    since: Annotated[
        str | None, typer.Option(metavar="TIME", help="Nothing older: 90s, 10m, 2h, 1d ago, or 2026-01-31T23:59.")
    ] = None,
    port: Annotated[str | None, typer.Option("--port", metavar="PORT", help="Only what happened to this port.")] = None,
    control: Control = None,
    json: Json = False,
) -> None:
    """Show what happened in the switch: its last thousand events.

    Ports that come and go, front-ends that connect, are refused or leave, links up and down, peers that broke a rule.

    \b
        viaduct events --since 10m            the last ten minutes
        viaduct events --follow --port vm1    one port, as it happens
        viaduct events --json | jq 'select(.level != "info")'
    """
    import msgspec

    from viaduct.switch.status import Event

    from .asking import running_switch
    from .moment import moment
    from .output import print_json
    from .rates import event_line

    first = moment(since) if since else 0.0
    with running_switch(control) as switch:
        items = switch.stream("events", since=first) if follow else switch.call("events.history", since=first)
        for item in items:
            event = msgspec.convert(item, Event)
            if port not in (None, event.port):
                continue
            if json:
                print_json(event)
            else:
                print(event_line(event), flush=True)
