"""`viaduct port`: the ports of a running switch."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Control, Json

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="List, add, change and remove ports.")


@app.command("list")
def list_(control: Control = None, json: Json = False) -> None:
    """Show every port.

    Its kind, whether frames can pass, who is connected, and what was agreed on.
    """
    import msgspec

    from viaduct.switch.status import PortStatus

    from .asking import running_switch
    from .output import print_json, print_rows

    with running_switch(control) as switch:
        answer = switch.call("port.list")
    if json:
        print_json(answer)
        return
    ports = msgspec.convert(answer, list[PortStatus])
    rows = [
        (
            port.name,
            port.link,
            f"pid {port.peer.pid}" if port.peer else "-",
            str(port.queues),
            port.ring or "-",
            str(port.mtu or "-"),
            port.config,
            port.detail or (f"behind an IOMMU, {port.iommu.refused} misses refused" if port.iommu else ""),
        )
        for port in ports
    ]
    headings = ("PORT", "LINK", "PEER", "QUEUES", "RING", "MTU", "CONFIGURATION", "DETAIL")
    print_rows(headings, rows, numbers=(3, 5), empty="No ports. Add one: viaduct port add vm1=vhost-user:/tmp/vm1.sock")


@app.command("add")
def add(
    ports: Annotated[list[str], typer.Argument(metavar="NAME=KIND:ARG[,opt[=val]]...")],
    control: Control = None,
) -> None:
    """Add ports while the others carry traffic.

    \b
        viaduct port add vm3=vhost-user:/tmp/vm3.sock,queues=2
        viaduct port add up=tap:tap0 mirror=pcap:,out=/tmp/all.pcap
    """
    import msgspec

    from viaduct.switch.port_text import parse_named_port

    from .asking import running_switch
    from .failure import config_errors

    with config_errors():
        parsed = [parse_named_port(text) for text in ports]
    with running_switch(control) as switch:
        for name, port in parsed:
            switch.call("port.add", name=name, port=msgspec.to_builtins(port))


@app.command("del")
def delete(names: Annotated[list[str], typer.Argument(metavar="NAME...")], control: Control = None) -> None:
    """Remove ports.

    Their sockets go; the other ports do not notice.
    """
    from .asking import running_switch

    with running_switch(control) as switch:
        for name in names:
            switch.call("port.del", name=name)


@app.command("set")
def set_(
    name: Annotated[str, typer.Argument(metavar="NAME")],
    options: Annotated[list[str], typer.Argument(metavar="OPT[=VAL]...")],
    control: Control = None,
) -> None:
    """Change a port while it carries traffic.

    Its guest does not notice a change of VLANs and rules; with other options the port is made anew. OPT= without a
    value gives the option its default back.

    \b
        viaduct port set vm1 rate=1G mac=52:54:00:00:00:01 spoofcheck
        viaduct port set vm1 rate= storm=100
    """
    from .asking import running_switch

    with running_switch(control) as switch:
        switch.call("port.set", name=name, options=options)
