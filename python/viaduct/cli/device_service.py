"""What every `viaduct device KIND` does with its device: serve it until told to end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Protocol

import typer

from .failure import FAILED, Failure

if TYPE_CHECKING:
    from viaduct.vhost_user import Device

Socket = Annotated[Path, typer.Option("--socket", "-s", metavar="PATH", help="Where the front-end connects.")]
Client = Annotated[
    bool, typer.Option("--client", help="Connect to the front-end, which listens, and again when it has gone.")
]


class Companion(Protocol):
    """Something of this host that a device works with; it starts and ends with the device."""

    @property
    def where(self) -> str:
        """Where a person finds it."""

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


def serve_device(
    device: Device, socket: Path, client: bool = False, companions: Sequence[Companion] = (), quiet: bool = False
) -> None:
    """Serve `device` on `socket` until SIGTERM or SIGINT, telling what happens on standard output, a line each;
    `quiet`: on standard error, because the output is somebody else's.

    Raises `Failure` if that is not possible.
    """
    import asyncio
    import contextlib
    import logging
    import sys

    from viaduct.vhost_user import VhostUserError, serve

    logging.basicConfig(
        level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr if quiet else sys.stdout
    )
    log = logging.getLogger("viaduct.device")

    async def run() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for companion in companions:
                await stack.enter_async_context(companion)
                log.info("%s: at %s", type(device).__name__, companion.where)
            where = "connecting to" if client else "listening on"
            log.info("%s: %s %s", type(device).__name__, where, socket)
            await serve(device, str(socket), client)

    try:
        asyncio.run(run())
    except (OSError, VhostUserError) as error:
        raise Failure(str(error), FAILED) from error
