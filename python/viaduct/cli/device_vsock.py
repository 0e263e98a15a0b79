"""`viaduct device vsock`: sockets between a guest and programs of this host."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .device_service import Client, Socket, serve_device
from .failure import FAILED, USAGE, Failure


def vsock(
    socket: Socket,
    path: Annotated[
        Path, typer.Option("--path", metavar="PATH", help="Where programs of the host find the guest, see above.")
    ],
    cid: Annotated[int, typer.Option("--cid", metavar="CID", help="The guest's address: 3 or more.")] = 3,
    client: Client = False,
) -> None:
    """Serve sockets (AF_VSOCK) between a guest and this host.

    A program here connects to PATH, sends the line CONNECT PORT and reaches the guest's port. A program in the guest
    that connects to port N of the host (CID 2) reaches whoever listens on PATH_N here.

    \b
        viaduct device vsock --socket /tmp/vsock.sock --path /tmp/vm1.vsock --cid 3
        qemu-system-x86_64 ... -chardev socket,id=v,path=/tmp/vsock.sock -device vhost-user-vsock-pci,chardev=v
        socat - UNIX-CONNECT:/tmp/vm1.vsock
    """
    from viaduct.devices.vsock import Vsock
    from viaduct.vhost_user import SocketPathError

    try:
        device = Vsock(str(path), guest_cid=cid)
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    except SocketPathError as error:
        raise Failure(str(error), FAILED) from error
    try:
        serve_device(device, socket, client)
    finally:
        device.close()
