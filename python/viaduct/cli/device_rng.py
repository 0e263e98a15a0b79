"""`viaduct device rng`: a source of entropy for a guest."""

from __future__ import annotations

from typing import Annotated

import typer

from .device_service import Client, Socket, serve_device


def rng(
    socket: Socket,
    rate: Annotated[
        int | None, typer.Option(metavar="BYTES", min=1, help="Most bytes a second [default: no limit].")
    ] = None,
    client: Client = False,
) -> None:
    """Serve an entropy device: the guest's /dev/hwrng.

    \b
        viaduct device rng --socket /tmp/rng.sock --rate 65536
        qemu-system-x86_64 ... -chardev socket,id=r,path=/tmp/rng.sock -device vhost-user-rng-pci,chardev=r
    """
    from viaduct.devices.entropy import Entropy

    serve_device(Entropy(rate), socket, client)
