"""`viaduct device console`: a guest's terminals and byte streams."""

from __future__ import annotations

from typing import Annotated

import typer

from .device_service import Client, Socket, serve_device
from .failure import USAGE, Failure


def console(
    socket: Socket,
    end: Annotated[
        str,
        typer.Option("--console", metavar="KIND", help="Where it goes: stdio, socket:PATH, file:PATH, pty or none."),
    ] = "stdio",
    port: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=KIND", help="A further port, which the guest finds under its name; repeatable."),
    ] = None,
    client: Client = False,
) -> None:
    """Serve a console: the guest's /dev/hvc0, and named ports beside it. Ctrl-] ends it where it has your terminal.

    \b
        viaduct device console --socket /tmp/con.sock --console pty --port agent=socket:/tmp/agent.sock
    """
    import os
    import signal

    from viaduct.devices.console import Console, ConsolePort
    from viaduct.devices.console_end import console_end
    from viaduct.devices.console_terminal import ConsoleTerminal

    ports, ends, kinds = [], [], [("", end)]
    for word in port or ():
        name, equals, kind = word.partition("=")
        if not (name and equals):
            raise Failure(f"--port {word}: NAME=KIND is expected, for example agent=socket:/tmp/agent.sock", USAGE)
        kinds.append((name, kind))
    if [kind for _, kind in kinds].count("stdio") > 1:
        raise Failure("two ports want standard input and output: connect one to something else", USAGE)
    try:
        for name, kind in kinds:
            terminal = ConsoleTerminal(name=name or "console")
            ends.append(console_end(kind, terminal, leave=lambda: os.kill(os.getpid(), signal.SIGTERM)))
            ports.append(ConsolePort(terminal, name, console=not name))
        device = Console(*ports)
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    serve_device(device, socket, client, ends, quiet=any(kind == "stdio" for _, kind in kinds))
