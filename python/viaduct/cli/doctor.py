"""`viaduct doctor`: why a port passes no packets."""

from __future__ import annotations

from typing import Annotated

import typer

from .options import Control, Json


def doctor(
    port: Annotated[str, typer.Argument(metavar="PORT", help="The port on which packets are missing.")],
    seconds: Annotated[float, typer.Option(help="Time between two looks.", min=0.01, max=60)] = 1.0,
    control: Control = None,
    json: Json = False,
) -> None:
    """Explain why a port passes no packets.

    Follows the way of a packet: who is connected, what was agreed on, queues, buffers, notifications, addresses, VLANs,
    limits, pollers. Each finding comes with what to do.

    \b
        viaduct doctor vm1
        viaduct doctor vm1 --json | jq -r .findings[].cause

    Exit codes: 0 nothing was found, 1 something was.
    """
    import msgspec

    from viaduct.switch.diagnosis import Diagnosis

    from .asking import running_switch
    from .failure import FAILED
    from .output import print_json

    with running_switch(control) as switch:
        answer = switch.call("doctor", port=port, seconds=seconds)
    diagnosis = msgspec.convert(answer, Diagnosis)
    if json:
        print_json(answer)
    else:
        for line in diagnosis.seen:
            print(line)
        for number, finding in enumerate(diagnosis.findings, 1):
            print(f"\n{number}. {finding.message}")
            print(f"   What to do: {finding.remedy}")
        if diagnosis.healthy:
            print(f"{port} is healthy: nothing keeps packets from passing")
    if not diagnosis.healthy:
        raise typer.Exit(FAILED)
