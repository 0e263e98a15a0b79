"""`viaduct trace`: the next packets of a port as they stand in its rings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .options import Control, Json

if TYPE_CHECKING:
    from viaduct.switch.trace import Packet


def trace(
    port: Annotated[str, typer.Argument(metavar="PORT", help="The port to look into.")],
    count: Annotated[int, typer.Option("--count", "-c", metavar="N", help="End after N packets.", min=1)] = 10,
    control: Control = None,
    json: Json = False,
) -> None:
    """Show the next packets of a port as they stand in its rings.

    The ring, the place in it, each descriptor's address, length and flags, the virtio-net header, the frame in a line,
    and where it was sent. Received is what the guest gave, sent is what was written into its buffers.

    \b
        viaduct trace vm1 --count 3
        viaduct trace vm1 --json | jq .descriptors
    """
    import msgspec

    from viaduct.switch.trace import Packet

    from .asking import running_switch
    from .output import print_json

    with running_switch(control) as switch:
        for item in switch.stream("trace", port=port, count=count):
            if json:
                print_json(item)
            else:
                print("\n".join(_lines(msgspec.convert(item, Packet))), flush=True)


def _lines(packet: Packet) -> list[str]:
    from .rates import clock

    lines = [
        f"{clock(packet.time_ns / 1e9)} {packet.port} {packet.direction}, queue {packet.queue}, "
        f"position {packet.position}, head {packet.head}, {packet.length} bytes",
        f"    {packet.frame}",
        f"    virtio-net header: {packet.header}",
    ]
    for each in packet.descriptors:
        place = "in its table, " if each.in_table else "descriptor "
        flags = ", ".join(each.flags) or "none"
        lines.append(f"    {place}{each.index}: address {each.address:#x}, {each.length} bytes, flags {flags}")
    lines.append(f"    {packet.outcome}")
    return lines
