"""The running switch as a process: signals, control socket, live table or log lines, and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from viaduct.switch.config import ConfigError, SwitchConfig
from viaduct.switch.control import ControlServer
from viaduct.switch.control_wire import listening_path
from viaduct.switch.metrics_address import MetricsAddress
from viaduct.vhost_user.errors import VhostUserError

from .failure import FAILED, USAGE, Failure
from .log_lines import LogFormat, LogLines


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What concerns the process around a switch.

    `control`: the control socket's path. `log_format`: lines instead of a live table, even on a terminal. `metrics`:
    where Prometheus may scrape.
    """

    control: str | None = None
    log_format: LogFormat | None = None
    metrics: MetricsAddress | None = None


def run(config: SwitchConfig, read_again: Callable[[], SwitchConfig] | None, options: ProcessOptions) -> None:
    """Run a switch until SIGTERM, SIGINT or a client's `shutdown`.

    `read_again` gives the configuration anew when SIGHUP asks for it.
    """
    try:
        asyncio.run(_serve(config, read_again, options))
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error
    except (OSError, VhostUserError) as error:
        raise Failure(_reason(error), FAILED) from error


async def _serve(config: SwitchConfig, read_again: Callable[[], SwitchConfig] | None, options: ProcessOptions) -> None:
    from viaduct import Switch

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    async with Switch() as switch:
        show = _shower(switch, options.log_format)
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
            path = Path(options.control) if options.control else listening_path()
            async with ControlServer(switch, path, ending.set), _metrics(switch, options.metrics):
                _tell_service_manager("READY=1")
                show.say("ready", f"{len(config.ports)} ports, control socket {path}, pid {os.getpid()}")
                await ending.wait()
                _tell_service_manager("STOPPING=1")
        finally:
            following.cancel()
            await asyncio.gather(following, *reloading, return_exceptions=True)
            show.close()
    show.say("ended", "ports closed, sockets removed")


@asynccontextmanager
async def _metrics(switch: Any, address: MetricsAddress | None) -> AsyncGenerator[None]:
    """Serve the counters to Prometheus, if they are to be served."""
    if address is None:
        yield
        return
    from viaduct.switch.metrics_server import MetricsServer

    async with MetricsServer(switch, address):
        yield


def _merged(running: SwitchConfig, before: SwitchConfig, fresh: SwitchConfig) -> SwitchConfig:
    """The fresh configuration, and the ports that came by the control socket since and are in neither file."""
    added = {name: port for name, port in running.ports.items() if name not in before.ports | fresh.ports}
    return msgspec.structs.replace(fresh, ports={**fresh.ports, **added})


def _shower(switch: Any, log_format: LogFormat | None) -> LogLines:
    if log_format or not sys.stdout.isatty():
        return LogLines(switch, log_format or "text")
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
