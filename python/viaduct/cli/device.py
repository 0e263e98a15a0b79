"""`viaduct device`: a virtio device on a vhost-user socket, for a virtual machine of any kind.

Each kind is a function in a module of its own, `device_KIND.py`, which takes `Socket` and `Client` besides its own
options, makes the device and ends with `serve_device`. A name with a colon is a class of the user's.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .class_names import class_names
from .device_balloon import balloon
from .device_blk import blk
from .device_console import console
from .device_rng import rng
from .device_service import Client, Socket, serve_device
from .device_vsock import vsock
from .failure import FAILED, USAGE, Failure

CLASS = "MODULE.py:CLASS"


class Kinds(TyperGroup):
    """The kinds of devices, and any class by its name."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        if ":" in args[0] and args[0] != CLASS:
            return CLASS, self.get_command(ctx, CLASS), args
        return super().resolve_command(ctx, args)


app = typer.Typer(
    cls=Kinds,
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Serve a virtio device on a vhost-user socket, to QEMU or any other front-end.",
)


@app.command(CLASS)
def user_class(
    name: Annotated[
        str, typer.Argument(metavar=CLASS, help="The file and the class in it.", autocompletion=class_names)
    ],
    socket: Socket,
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="A keyword argument for the class; repeatable."),
    ] = None,
    client: Client = False,
) -> None:
    """Serve a device of your own: any subclass of viaduct.vhost_user.Device.

    \b
        viaduct device examples/rng.py:Rng --socket /tmp/rng.sock

    A device of registers - a class with read(offset, size) and write(offset, data) - has no queues that could be
    served on a socket. It is for a machine of ours: viaduct run --device examples/dice.py:Dice,pio=0x700+4
    """
    from viaduct.devices.user_class import DeviceClassError, load_device
    from viaduct.vhost_user.device import Device

    options = {}
    for word in option or ():
        key, equals, value = word.partition("=")
        if not (equals and key.isidentifier()):
            raise Failure(f"--option {word}: NAME=VALUE, where NAME is an argument of the class", USAGE)
        options[key] = value
    try:
        device = load_device(name, options)
    except DeviceClassError as error:
        raise Failure(f"{name}: {error}", FAILED) from error
    if not isinstance(device, Device):
        raise Failure(
            f"{name} is a device of registers, and has no queues to serve; it is for machines of ours: "
            f"viaduct run --device {name},pio=BASE+SIZE",
            FAILED,
        )
    serve_device(device, socket, client)


app.command("balloon")(balloon)
app.command("console")(console)
app.command("blk")(blk)
app.command("rng")(rng)
app.command("vsock")(vsock)
