"""`viaduct device balloon`: takes memory from a guest, and gives it back to this host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .device_service import Client, Socket, serve_device
from .failure import USAGE, Failure

if TYPE_CHECKING:
    from types import TracebackType

    from viaduct.devices.balloon import Balloon


def balloon(
    socket: Socket,
    size: Annotated[
        str, typer.Option("--size", metavar="SIZE", help="How much to take from the guest at first, as in 256M.")
    ] = "0",
    statistics: Annotated[
        float | None,
        typer.Option("--statistics", metavar="SECONDS", min=0.1, help="Ask the guest how it is, so often, and tell."),
    ] = None,
    reporting: Annotated[
        bool, typer.Option(help="Let the guest report pages as they become free, and give them back.")
    ] = True,
    client: Client = False,
) -> None:
    """Serve a memory balloon. Each line of standard input is a new size.

    \b
        viaduct device balloon --socket /tmp/balloon.sock --size 256M
    """
    from viaduct.devices.balloon import Balloon
    from viaduct.vmm.config import parse_size

    try:
        device = Balloon(parse_size(size), reporting=reporting)
    except ValueError as error:
        raise Failure(f"--size {size}: {error}", USAGE) from error
    serve_device(device, socket, client, [BalloonLines(device, statistics)])


class BalloonLines:
    """Sizes from standard input, a line each, and the guest's statistics on the log."""

    def __init__(self, device: Balloon, interval: float | None) -> None:
        import asyncio

        self._device, self._interval = device, interval
        self._said = b""
        self._asking: asyncio.Task[None] | None = None

    @property
    def where(self) -> str:
        """Where sizes are typed."""
        return "standard input, a size in each line"

    async def __aenter__(self) -> object:
        import asyncio
        import contextlib

        # What cannot be waited for (a file, /dev/null) is no place to type in.
        with contextlib.suppress(PermissionError, ValueError, OSError):
            asyncio.get_running_loop().add_reader(0, self._read)
        if self._interval is not None:
            self._asking = asyncio.create_task(self._ask(self._interval))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        import asyncio
        import contextlib

        with contextlib.suppress(PermissionError, ValueError, OSError):
            asyncio.get_running_loop().remove_reader(0)
        if self._asking is not None:
            self._asking.cancel()
            await asyncio.gather(self._asking, return_exceptions=True)

    def _read(self) -> None:
        import asyncio
        import os

        try:
            data = os.read(0, 4096)
        except OSError:
            data = b""
        if not data:
            asyncio.get_running_loop().remove_reader(0)
        *lines, self._said = (self._said + data)[-4096:].split(b"\n")
        for line in lines:
            self._line(line.decode(errors="replace").strip())

    def _line(self, line: str) -> None:
        import logging

        from viaduct.vmm.config import parse_size

        log = logging.getLogger("viaduct.device")
        try:
            self._device.set_target(parse_size(line))
        except ValueError as error:
            log.error("Balloon: %s: %s", line, error)
        else:
            log.info("Balloon: has %d bytes, is to have %d", self._device.size, self._device.target)

    async def _ask(self, interval: float) -> None:
        import asyncio
        import logging

        while True:
            await asyncio.sleep(interval)
            try:
                told = await self._device.ask_statistics(interval)
                words = ", ".join(f"{name.name.lower()} {value}" for name, value in told.items())
            except TimeoutError:
                words = "the guest says no more"
            logging.getLogger("viaduct.device").info(
                "Balloon: has %d bytes, gave back %d; %s", self._device.size, self._device.given_back, words
            )
