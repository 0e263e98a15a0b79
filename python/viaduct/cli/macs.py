"""`viaduct macs`: the addresses a running switch has learned."""

from __future__ import annotations

from .options import Control, Json


def macs(control: Control = None, json: Json = False) -> None:
    """Show the addresses learned.

    Which is behind which port, in which VLAN, and how many seconds ago it was seen.
    """
    import msgspec

    from viaduct.switch.status import MacEntry

    from .asking import running_switch
    from .output import print_json, print_rows

    with running_switch(control) as switch:
        answer = switch.call("macs")
    if json:
        print_json(answer)
        return
    entries = sorted(msgspec.convert(answer, list[MacEntry]), key=lambda entry: (entry.port, entry.vlan, entry.mac))
    rows = [(entry.mac, str(entry.vlan or "-"), entry.port, f"{entry.age:.0f}") for entry in entries]
    print_rows(("MAC", "VLAN", "PORT", "AGE"), rows, numbers=(1, 3), empty="No addresses learned yet.")
