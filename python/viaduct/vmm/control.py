"""The control socket of a running machine: what `viaduct vm` asks, in the language of the switch's
(`viaduct.switch.control_wire`): a JSON object a line, answered in order.

| method | params | result |
|---|---|---|
| `status` | | `MachineStatus` |
| `pause`, `resume`, `reset` | | null, when it is done |
| `snapshot` | `path` | null, when it is written |
| `power-button` | | null, at once; whether the guest does anything is its affair |
| `stop` | | null; the socket goes when it is done |
| `exits` | | `rows`: reason, address, device, count, seconds; `guest_seconds` |
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from viaduct.switch.control_wire import Problem, Reply, Request
from viaduct.switch.line_server import LineServer
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.socket_path import Listener
from viaduct.vmm.errors import MachineError

if TYPE_CHECKING:
    from viaduct.vmm.machine import Machine

Method = Callable[["Machine", dict[str, Any]], Awaitable[Any]]


class MachineControl:
    """Serves one machine on the socket `path`."""

    def __init__(self, machine: Machine, path: Path) -> None:
        self._machine = machine
        self._path = path
        self._server: LineServer | None = None

    async def start(self) -> None:
        """Listens. Raises `MachineError`."""
        try:
            self._server = LineServer(Listener(str(self._path)), self._converse)
        except VhostUserError as error:
            raise MachineError(str(error)) from error
        await self._server.start()

    async def close(self) -> None:
        """Ends every connection and removes the socket. Who asked for the end has got an answer before."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await _line(reader):
            writer.write(msgspec.json.encode(await self._answer(line)) + b"\n")
            await writer.drain()

    async def _answer(self, line: bytes) -> Reply:
        number = 0
        try:
            request = msgspec.json.decode(line, type=Request)
            number = request.id
            if (method := _METHODS.get(request.method)) is None:
                known = ", ".join(_METHODS)
                return _refusal(number, "method", f"unknown method {request.method!r} (known: {known})")
            return Reply(id=number, result=await method(self._machine, request.params))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            return _refusal(number, "request", f"not a request: {error}")
        except (MachineError, OSError) as error:
            return _refusal(number, "failed", str(error))


async def _line(reader: asyncio.StreamReader) -> bytes:
    """The next line; empty when the client has gone or says too much."""
    try:
        return await reader.readline()
    except ValueError:
        return b""


def _refusal(number: int, code: str, message: str) -> Reply:
    return Reply(id=number, error=Problem(code=code, message=message))


async def _status(machine: Machine, params: dict[str, Any]) -> Any:
    return machine.status()


async def _stop(machine: Machine, params: dict[str, Any]) -> None:
    # Whoever runs the machine waits for its end and closes it: this connection too.
    machine.finish("stopped", 0, "by its control socket")


async def _snapshot(machine: Machine, params: dict[str, Any]) -> None:
    if not isinstance(path := params.get("path"), str):
        raise MachineError("a snapshot needs a path")
    await machine.snapshot(path)


async def _exits(machine: Machine, params: dict[str, Any]) -> Any:
    exits = machine.exits()
    rows = [(row.reason, row.address, row.device, row.count, row.seconds) for row in exits.rows()]
    return {"rows": rows, "guest_seconds": exits.guest_nanoseconds / 1e9}


_METHODS: dict[str, Method] = {
    "status": _status,
    "pause": lambda machine, _: machine.pause(),
    "resume": lambda machine, _: machine.resume(),
    "reset": lambda machine, _: machine.reset(),
    "power-button": lambda machine, _: machine.press_power_button(),
    "stop": _stop,
    "snapshot": _snapshot,
    "exits": _exits,
}
