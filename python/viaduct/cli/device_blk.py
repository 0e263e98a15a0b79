"""`viaduct device blk`: a disk for a guest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .device_service import Client, Socket, serve_device
from .failure import FAILED, USAGE, Failure

FORMATS = ("raw", "qcow2")


def blk(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="The disk: a file or a block device.")],
    socket: Socket,
    read_only: Annotated[bool, typer.Option("--read-only", "-r", help="The guest may not write.")] = False,
    format: Annotated[
        str | None,
        typer.Option(metavar="raw|qcow2", help="How the disk lies in it [default: raw, or qcow2 if named so]."),
    ] = None,
    queues: Annotated[
        int, typer.Option(metavar="N", min=1, max=256, help="Most queues; QEMU uses one for each processor.")
    ] = 16,
    serial: Annotated[str, typer.Option(metavar="TEXT", help="Serial number, up to 20 bytes.")] = "",
    io_uring: Annotated[bool, typer.Option(help="Use io_uring where the system has it; else threads.")] = True,
    client: Client = False,
) -> None:
    """Serve a block device: a disk in a file.

    \b
        truncate --size 10G disk.img
        viaduct device blk disk.img --socket /tmp/blk.sock
        qemu-system-x86_64 ... -chardev socket,id=b,path=/tmp/blk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=b
    """
    from viaduct.devices.block import BlockDevice, ImageError

    if format not in (None, *FORMATS):
        raise Failure(f"--format {format}: {' or '.join(FORMATS)}", USAGE)
    try:
        device = BlockDevice(
            image,
            format=format,  # type: ignore[arg-type]
            read_only=read_only,
            queues=queues,
            serial=serial,
            io_uring=io_uring,
        )
    except ImageError as error:
        raise Failure(str(error), FAILED) from error
    except ValueError as error:
        raise Failure(str(error), USAGE) from error
    try:
        serve_device(device, socket, client)
    finally:
        device.close()
