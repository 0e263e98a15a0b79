"""`viaduct status`: the process of a running switch, and what it has given up."""

from __future__ import annotations

from .options import Control, Json


def status(control: Control = None, json: Json = False) -> None:
    """Show the running switch itself.

    Its version, process and user, and its sandbox: what it has given up, and what it could not give up.
    """
    import time

    import msgspec

    from viaduct.switch.control import About

    from .asking import running_switch
    from .output import print_json

    with running_switch(control) as switch:
        answer = switch.call("about")
        path = switch.path
    if json:
        print_json(answer)
        return
    about = msgspec.convert(answer, About)
    minutes = (time.time() - about.started) / 60
    since = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.0f} hours"
    print(f"viaduct {about.version}, pid {about.pid}, uid {about.uid}, up for {since}, control socket {path}")
    print(f"{about.ports} port{'' if about.ports == 1 else 's'} (viaduct port list)")
    print(f"sandbox {about.sandbox.mode}")
    for line in about.sandbox.given_up:
        print(f"  gave up {line}")
    for line in about.sandbox.not_given_up:
        print(f"  could not give up {line}")
