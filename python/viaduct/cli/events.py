"""`viaduct events`: what happens in a running switch, as it happens."""

from __future__ import annotations

from .options import Control, Json


def events(control: Control = None, json: Json = False) -> None:
    """Follow what happens in the switch.

    Ports that come and go, links up and down, peers that broke a rule. Ctrl-C ends it.
    """
    import msgspec

    from viaduct.switch.status import Event

    from .asking import running_switch
    from .output import print_json
    from .rates import event_line

    with running_switch(control) as switch:
        for item in switch.stream("events"):
            if json:
                print_json(item)
            else:
                print(event_line(msgspec.convert(item, Event)), flush=True)
