"""The user's terminal, joined to a machine's console socket."""

from __future__ import annotations

import asyncio
import contextlib

from viaduct.devices.console_end import StdioEnd
from viaduct.devices.console_terminal import ConsoleTerminal


async def attach(path: str) -> None:
    """Joins standard input and output with the socket, until its end or Ctrl-]. Raises `OSError` if nobody listens."""
    reader, writer = await asyncio.open_unix_connection(path)
    left = asyncio.Event()
    terminal = ConsoleTerminal()

    def typed() -> None:
        writer.write(terminal.take_input(1 << 16))

    async def shown() -> None:
        while data := await reader.read(1 << 16):
            terminal.output(data)
        terminal.close()

    terminal.on_input = typed
    end = StdioEnd(terminal, left.set)
    await end.start()
    tasks = [asyncio.create_task(shown()), asyncio.create_task(left.wait())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await end.close()
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
