"""What every `viaduct device KIND` does with its device: serve it until told to end."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import FAILED, Failure

if TYPE_CHECKING:
    from viaduct.vhost_user import Device

Socket = Annotated[Path, typer.Option("--socket", "-s", metavar="PATH", help="Where the front-end connects.")]
Client = Annotated[
    bool, typer.Option("--client", help="Connect to the front-end, which listens, and again when it has gone.")
]


def serve_device(device: Device, socket: Path, client: bool = False) -> None:
    """Serve `device` on `socket` until SIGTERM or SIGINT, telling what happens on standard output, a line each.

    Raises `Failure` if that is not possible.
    """
    import asyncio
    import logging
    import sys

    from viaduct.vhost_user import VhostUserError, serve

    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stdout)
    where = "connecting to" if client else "listening on"
    logging.getLogger("viaduct.device").info("%s: %s %s", type(device).__name__, where, socket)
    try:
        asyncio.run(serve(device, str(socket), client))
    except (OSError, VhostUserError) as error:
        raise Failure(str(error), FAILED) from error
