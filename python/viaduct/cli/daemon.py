"""The running switch as a process: signals, control socket, live table or log lines, and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from viaduct.switch.config import ConfigError, SwitchConfig
from viaduct.switch.control import ControlServer
from viaduct.switch.control_wire import listening_path
from viaduct.switch.status import Event
from viaduct.vhost_user.errors import VhostUserError

from .failure import FAILED, USAGE, Failure
from .rates import event_line


def run(config: SwitchConfig, read_again: Callable[[], SwitchConfig] | None, control: str | None) -> None:
    """Run a switch until SIGTERM, SIGINT or a client's `shutdown`.

    `read_again` gives the configuration anew when SIGHUP asks for it. `control` is the control socket's path.
    """
    try:
        asyncio.run(_serve(config, read_again, control))
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error
    except (OSError, VhostUserError) as error:
        raise Failure(_reason(error), FAILED) from error


async def _serve(config: SwitchConfig, read_again: Callable[[], SwitchConfig] | None, control: str | None) -> None:
    from viaduct import Switch

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with Switch() as switch:
        show = _shower(switch)
        following = asyncio.create_task(show.follow())
        reloading: set[asyncio.Task[None]] = set()

        async def reload() -> None:
            if read_again is None:
                show.say("not-reloaded", "started without --config, so there is nothing to read again")
                return
            nonlocal config
            try:
                fresh = read_again()
                await switch.apply(_merged(switch.config, config, fresh))
            except (ConfigError, VhostUserError, OSError) as error:
                show.say("not-reloaded", f"the old configuration stays: {_reason(error)}")
            else:
                config = fresh
                show.say("reloaded", "the configuration was read again")

        def hang_up() -> None:
            task = loop.create_task(reload())
            reloading.add(task)
            task.add_done_callback(reloading.discard)

        loop.add_signal_handler(signal.SIGHUP, hang_up)
        try:
            await asyncio.sleep(0)  # let the follower listen before the first port comes
            await switch.apply(config)
            path = Path(control) if control else listening_path()
            async with ControlServer(switch, path, ending.set):
                _tell_service_manager("READY=1")
                show.say("ready", f"{len(config.ports)} ports, control socket {path}, pid {os.getpid()}")
                await ending.wait()
                _tell_service_manager("STOPPING=1")
        finally:
            following.cancel()
            await asyncio.gather(following, *reloading, return_exceptions=True)
            show.close()
    show.say("ended", "ports closed, sockets removed")


def _merged(running: SwitchConfig, before: SwitchConfig, fresh: SwitchConfig) -> SwitchConfig:
    """The fresh configuration, and the ports that came by the control socket since and are in neither file."""
    added = {name: port for name, port in running.ports.items() if name not in before.ports | fresh.ports}
    return msgspec.structs.replace(fresh, ports={**fresh.ports, **added})


class LogLines:
    """What happens, as plain lines."""

    def __init__(self, switch: Any) -> None:
        self.switch = switch

    async def follow(self) -> None:
        """Print events until cancelled."""
        async for event in self.switch.events():
            self.show(event_line(event))

    def show(self, line: str) -> None:
        """Print a line at once, as long as anybody reads."""
        with suppress(BrokenPipeError):
            print(line, flush=True)

    def say(self, kind: str, message: str) -> None:
        """Print what the process itself has to say."""
        self.show(event_line(Event(time=time.time(), kind=kind, message=message)))

    def close(self) -> None:
        """Nothing is left open."""


def _shower(switch: Any) -> LogLines:
    if not sys.stdout.isatty():
        return LogLines(switch)
    from .live import LiveTable

    return LiveTable(switch)


def _tell_service_manager(state: str) -> None:
    """Say to systemd how far we are, where it started us (sd_notify(3))."""
    if address := os.environ.get("NOTIFY_SOCKET"):
        import socket

        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.connect("\0" + address[1:] if address.startswith("@") else address)
            notify.send(state.encode())


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
