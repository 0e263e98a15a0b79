"""The switch's side of the control socket: what the command line and other programs ask a running switch.

The language is in `control_wire`. Every method ends in the same `Switch` calls that Python programs make, so that
nothing can be done here that cannot be done there. A method is a coroutine in `_METHODS`; a stream is an async
generator in `_STREAMS`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from viaduct.vhost_user.errors import VhostUserError
from viaduct.vhost_user.socket_path import Listener

from . import sandbox
from .config import ConfigError, PortConfig, SwitchConfig, build_config, build_port
from .control_access import ControlAccess, why_refused
from .control_wire import HAND_OVER, LINE_MAX, ControlError, Problem, Reply, Request
from .handover_channel import HandoverError
from .line_server import LineServer
from .port_text import change_port
from .sandbox import Sandbox
from .status import Event, Frame, MacEntry, PortStatus, Statistics

if TYPE_CHECKING:
    from .diagnosis import Diagnosis
    from .handover_giving import Giver
    from .trace import Packet

log = logging.getLogger(__name__)


class Controlled(Protocol):
    """What of a switch can be asked for from outside."""

    @property
    def config(self) -> SwitchConfig: ...

    async def apply(self, config: SwitchConfig, /) -> None: ...

    async def add_port(self, name: str, port: PortConfig, /) -> None: ...

    async def remove_port(self, name: str, /) -> None: ...

    def ports(self) -> Sequence[PortStatus]: ...

    def stats(self) -> Statistics: ...

    def macs(self) -> Sequence[MacEntry]: ...

    def events(self, since: float = 0.0, /) -> AsyncGenerator[Event]: ...

    def history(self, since: float = 0.0, port: str | None = None, /) -> Sequence[Event]: ...

    def capture(self, port: str, /) -> AsyncGenerator[Sequence[Frame]]: ...

    def trace(self, port: str, count: int, /) -> AsyncGenerator[Packet]: ...

    async def diagnose(self, port: str, seconds: float, /) -> Diagnosis: ...


OWNER_ONLY = ControlAccess()
"""Root and the user who runs the switch."""


class About(msgspec.Struct, frozen=True, kw_only=True):
    """The process of a switch. `started`: since when it answers here, in seconds since 1970."""

    version: str
    pid: int
    uid: int
    started: float
    ports: int
    sandbox: Sandbox


class ControlServer:
    """Serves one switch on one UNIX socket: `async with ControlServer(switch, path):`.

    `shutdown` is called when a client asks the switch to end. `giver` hands over to a new process when one asks for
    that. `listener` is the socket of a process that has handed over to this one. `access`: who may ask and change.
    """

    def __init__(
        self,
        switch: Controlled,
        path: str | os.PathLike[str],
        shutdown: Callable[[], None],
        giver: Giver | None = None,
        listener: Listener | None = None,
        access: ControlAccess = OWNER_ONLY,
    ) -> None:
        self.access = access
        self.switch = switch
        self.path = Path(path)
        self.shutdown = shutdown
        self.giver = giver
        self._adopted = listener
        self.started = time.time()
        self._server: LineServer | None = None

    async def start(self) -> None:
        """Listen; only those whom `access` names can connect. A socket file that nobody answers on is replaced.

        Raises:
            SocketPathError: somebody answers there, the directory is missing, no permission, the path is too long.
        """
        mask = os.umask(0o177)
        try:
            listener = self._adopted or Listener(str(self.path), self.access.file)
        finally:
            os.umask(mask)
        self._server = LineServer(listener, self._converse)
        await self._server.start()

    async def close(self) -> None:
        """Stop listening, end every connection, and remove the socket file if it is still ours."""
        if self._server is not None:
            await self._server.close()
            self._server = None

    async def __aenter__(self) -> ControlServer:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        role, who = self.access.role(writer.get_extra_info("socket"))
        while True:
            try:
                line = await reader.readline()
            except ValueError:
                await _send(writer, _refusal(0, "request", f"a request has at most {LINE_MAX} bytes"))
                return
            if not line:
                return
            try:
                request = msgspec.json.decode(line, type=Request)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                await _send(writer, _refusal(0, "request", f"not a request: {error}"))
                return
            if reason := why_refused(role, request.method, who):
                await _send(writer, _refusal(request.id, "denied", reason))
                if role is None:
                    return
                continue
            if request.method == HAND_OVER:
                await self._hand_over(request, writer)
                return
            if stream := _STREAMS.get(request.method):
                await self._stream(stream, request, reader, writer)
                return
            method = _METHODS.get(request.method)
            if method is None:
                known = ", ".join(sorted([*_METHODS, *_STREAMS]))
                refusal = _refusal(request.id, "method", f"unknown method {request.method!r} (known: {known})")
                await _send(writer, refusal)
                continue
            try:
                reply = Reply(id=request.id, result=await method(self, request.params))
            except Exception as error:
                reply = _reason(request, error)
            await _send(writer, reply)

    async def _hand_over(self, request: Request, writer: asyncio.StreamWriter) -> None:
        """The connection becomes a `HandoverChannel`, over a descriptor of its own."""
        if self.giver is None or self._server is None:
            await _send(writer, _refusal(request.id, "method", "this switch is part of another program: restart that"))
            return
        transport = writer.transport
        assert isinstance(transport, asyncio.ReadTransport)
        transport.pause_reading()
        sock = socket.socket(fileno=os.dup(writer.get_extra_info("socket").fileno()))
        sock.send(_line(Reply(id=request.id)))
        with suppress(HandoverError):  # it is in the events, and the other process knows
            await self.giver.give(request.params, sock, self._server.listener.sock.fileno(), str(self.path))

    async def _stream(
        self,
        stream: Callable[[ControlServer, Request], AsyncGenerator[bytes]],
        request: Request,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send what the stream yields until it ends or the client hangs up."""

        async def pump() -> None:
            try:
                async with aclosing(stream(self, request)) as pieces:
                    async for piece in pieces:
                        writer.write(piece)
                        await writer.drain()
            except ConnectionError:
                raise
            except Exception as error:
                await _send(writer, _reason(request, error))

        pumping = asyncio.create_task(pump())
        hanging_up = asyncio.create_task(reader.read(1))
        try:
            await asyncio.wait((pumping, hanging_up), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (pumping, hanging_up):
                task.cancel()
            await asyncio.gather(pumping, hanging_up, return_exceptions=True)
            with suppress(ConnectionError, asyncio.CancelledError):
                await writer.drain()


async def _about(server: ControlServer, params: dict[str, Any]) -> Any:
    from viaduct import __version__

    _expect(params)
    return About(
        version=__version__,
        pid=os.getpid(),
        uid=os.geteuid(),
        started=server.started,
        ports=len(server.switch.config.ports),
        sandbox=sandbox.active(),
    )


async def _config(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params)
    return server.switch.config


async def _apply(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, "config")
    await server.switch.apply(build_config(params["config"]))


async def _port_list(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params)
    return server.switch.ports()


async def _port_add(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, "name", "port")
    await server.switch.add_port(params["name"], build_port(params["port"]))


async def _port_del(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, "name")
    await server.switch.remove_port(params["name"])


async def _port_set(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, "name", "options")
    name, options = params["name"], params["options"]
    if not isinstance(options, list) or not all(isinstance(option, str) for option in options):
        raise ControlError(f"options are texts such as 'rate=1G', not {options!r}", "request")
    config = server.switch.config
    config.without_port(name)  # says which ports there are
    try:
        port = change_port(config.ports[name], options)
    except ConfigError as error:
        raise error.within("ports", name) from None
    await server.switch.apply(msgspec.structs.replace(config, ports={**config.ports, name: port}))


async def _stats(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params)
    return server.switch.stats()


async def _macs(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params)
    return server.switch.macs()


async def _events_history(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, optional=("since", "port"))
    return server.switch.history(_since(params), params.get("port"))


def _since(params: dict[str, Any]) -> float:
    since = params.get("since", 0.0)
    if not isinstance(since, int | float):
        raise ControlError(f"since {since!r} is no time in seconds since 1970", "request")
    return since


async def _doctor(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params, "port", optional=("seconds",))
    seconds = params.get("seconds", 1.0)
    if not isinstance(seconds, int | float) or not 0 < seconds <= 60:
        raise ControlError(f"seconds {seconds!r} is outside 0 (excluded) to 60", "request")
    return await server.switch.diagnose(params["port"], seconds)


async def _shutdown(server: ControlServer, params: dict[str, Any]) -> Any:
    _expect(params)
    asyncio.get_running_loop().call_soon(server.shutdown)


async def _events(server: ControlServer, request: Request) -> AsyncGenerator[bytes]:
    _expect(request.params, optional=("since",))
    since = _since(request.params)
    yield _line(Reply(id=request.id))
    async with aclosing(server.switch.events(since)) as events:
        async for event in events:
            yield _line(Reply(id=request.id, item=event))


async def _trace(server: ControlServer, request: Request) -> AsyncGenerator[bytes]:
    _expect(request.params, "port", optional=("count",))
    count = request.params.get("count", 10)
    if not isinstance(count, int):
        raise ControlError(f"count {count!r} is no number", "request")
    packets = server.switch.trace(request.params["port"], count)
    async with aclosing(packets):
        coming = asyncio.ensure_future(anext(packets))
        try:
            await asyncio.sleep(0)  # the trace runs when the answer is sent
            if coming.done():
                coming.result()  # it was refused
            yield _line(Reply(id=request.id))
            yield _line(Reply(id=request.id, item=await coming))
            async for packet in packets:
                yield _line(Reply(id=request.id, item=packet))
        except StopAsyncIteration:
            pass  # the port is gone
        finally:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)


async def _stats_watch(server: ControlServer, request: Request) -> AsyncGenerator[bytes]:
    _expect(request.params, optional=("interval",))
    interval = request.params.get("interval", 1.0)
    if not isinstance(interval, int | float) or not 0.01 <= interval <= 3600:
        raise ControlError(f"interval {interval!r} is outside 0.01 to 3600 seconds", "request")
    yield _line(Reply(id=request.id))
    while True:
        yield _line(Reply(id=request.id, item=server.switch.stats()))
        await asyncio.sleep(interval)


async def _capture(server: ControlServer, request: Request) -> AsyncGenerator[bytes]:
    from .pcapng import PcapngEncoder

    _expect(request.params, "port", optional=("count",))
    name, count = request.params["port"], request.params.get("count")
    if count is not None and (not isinstance(count, int) or count < 1):
        raise ControlError(f"count {count!r} is no positive number", "request")
    if name not in server.switch.config.ports:
        server.switch.config.without_port(name)  # says which ports there are
    encoder = PcapngEncoder()
    batches = server.switch.capture(name)
    coming = asyncio.ensure_future(anext(batches))
    try:
        await asyncio.sleep(0)  # the capture runs when the answer is sent
        yield _line(Reply(id=request.id)) + encoder.header()
        left = count
        while left is None or left > 0:
            frames = (await coming)[:left]
            yield b"".join(encoder.frame(frame) for frame in frames)
            if left is not None:
                left -= len(frames)
            coming = asyncio.ensure_future(anext(batches))
    except StopAsyncIteration:
        pass  # the port is gone
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await batches.aclose()


_METHODS: dict[str, Callable[[ControlServer, dict[str, Any]], Awaitable[Any]]] = {
    "about": _about,
    "config": _config,
    "apply": _apply,
    "port.list": _port_list,
    "port.add": _port_add,
    "port.del": _port_del,
    "port.set": _port_set,
    "stats": _stats,
    "macs": _macs,
    "events.history": _events_history,
    "doctor": _doctor,
    "shutdown": _shutdown,
}

_STREAMS: dict[str, Callable[[ControlServer, Request], AsyncGenerator[bytes]]] = {
    "events": _events,
    "stats.watch": _stats_watch,
    "capture": _capture,
    "trace": _trace,
}


def _expect(params: dict[str, Any], *needed: str, optional: tuple[str, ...] = ()) -> None:
    """Refuse parameters that a method does not know, and the lack of those it needs."""
    unknown = [name for name in params if name not in (*needed, *optional)]
    missing = [name for name in needed if name not in params]
    if unknown or missing:
        found = f"unknown: {', '.join(unknown)}" if unknown else f"missing: {', '.join(missing)}"
        raise ControlError(f"wrong parameters ({found}; known: {', '.join((*needed, *optional)) or 'none'})", "request")


def _reason(request: Request, error: Exception) -> Reply:
    match error:
        case ConfigError():
            return _refusal(request.id, "config", str(error))
        case ControlError():
            return _refusal(request.id, error.code, str(error))
        case OSError() | VhostUserError():
            return _refusal(request.id, "failed", str(error))
        case _:
            log.exception("control request %s failed", request.method)
            return _refusal(request.id, "failed", f"{type(error).__name__}: {error}")


def _refusal(identifier: int, code: str, message: str) -> Reply:
    return Reply(id=identifier, error=Problem(code=code, message=message))


def _line(reply: Reply) -> bytes:
    return msgspec.json.encode(reply) + b"\n"


async def _send(writer: asyncio.StreamWriter, reply: Reply) -> None:
    writer.write(_line(reply))
    await writer.drain()
