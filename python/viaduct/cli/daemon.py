"""The running switch as a process: signals, control socket, live table or log lines, and a clean end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from viaduct.switch.config import ConfigError, SwitchConfig
from viaduct.switch.control import OWNER_ONLY, ControlServer
from viaduct.switch.control_access import ControlAccess, resolve_groups
from viaduct.switch.control_wire import listening_path
from viaduct.switch.handover_format import Sources
from viaduct.switch.handover_giving import Giver
from viaduct.switch.metrics_address import MetricsAddress
from viaduct.switch.sandbox import Sandbox, SandboxError, SandboxMode, enter
from viaduct.vhost_user.errors import VhostUserError

from .failure import FAILED, NO_SWITCH, USAGE, Failure
from .log_lines import LogFormat, LogLines
from .systemd import adopt_sockets, keep_told, tell

if TYPE_CHECKING:
    from viaduct.switch.handover_taking import Predecessor


class ProcessOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What concerns the process around a switch.

    `control`: the control socket's path. `log_format`: lines instead of a live table, even on a terminal. `metrics`:
    where Prometheus may scrape. `sandbox`: what to give up, `sandbox_paths`: directories to keep writable nevertheless.
    `access`: who may use the control socket.
    `sources`: the arguments, for a process that takes over from this one.
    """

    control: str | None = None
    log_format: LogFormat | None = None
    metrics: MetricsAddress | None = None
    sandbox: SandboxMode = "auto"
    sandbox_paths: tuple[str, ...] = ()
    access: ControlAccess = OWNER_ONLY
    sources: Sources = Sources()


def run(config: SwitchConfig, read_again: Callable[[], SwitchConfig] | None, options: ProcessOptions) -> None:
    """Run a switch until SIGTERM, SIGINT or a client's `shutdown`.

    `read_again` gives the configuration anew when SIGHUP asks for it.
    """
    try:
        asyncio.run(_serve(config, read_again, options))
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error
    except (OSError, VhostUserError, SandboxError) as error:
        raise Failure(_reason(error), FAILED) from error


async def _serve(
    config: SwitchConfig,
    read_again: Callable[[], SwitchConfig] | None,
    options: ProcessOptions,
    predecessor: Predecessor | None = None,
) -> None:
    """Serve `config`, or what `predecessor` serves and then `config`."""
    from viaduct import Switch

    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    activated = adopt_sockets()
    control = predecessor.data.control_path if predecessor else options.control or activated
    path = Path(control) if control else listening_path()
    if not control and options.access.groups:
        path.parent.chmod(0o711)  # the socket itself says who may
    wanted = _merged(predecessor.data.running, predecessor.data.configured, config) if predecessor else config
    sandbox, refused_fd = _enter_sandbox(wanted, options, path)
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
            if predecessor is None:
                _report_sandbox(switch, sandbox, refused_fd)
                await switch.apply(config)
            else:
                await _relieve(predecessor, switch, config)
                _report_sandbox(switch, sandbox, refused_fd)

            def gone(pid: int, gap: float) -> None:
                """All that this process would clean up belongs to another one now."""
                try:
                    show.say("handed-over", f"to pid {pid}; nothing was forwarded for {1000 * gap:.1f} ms")
                    tell(f"MAINPID={pid}")
                    show.close()
                    sys.stdout.flush()
                finally:
                    os._exit(0)

            listener = predecessor.listener if predecessor is not None else None
            giver = Giver(switch, options.sources, lambda: config, gone)
            server = ControlServer(switch, path, ending.set, giver, listener, options.access)
            async with server, _metrics(switch, options.metrics):
                tell("READY=1")
                telling = asyncio.create_task(keep_told(switch))
                show.say("ready", f"{len(config.ports)} ports, control socket {path}, pid {os.getpid()}")
                await ending.wait()
                telling.cancel()
                tell("STOPPING=1")
        finally:
            following.cancel()
            await asyncio.gather(following, *reloading, return_exceptions=True)
            show.close()
    show.say("ended", "ports closed, sockets removed")


async def _relieve(predecessor: Predecessor, switch: Any, config: SwitchConfig) -> None:
    """Take over, then do what differs in `config`."""
    try:
        await predecessor.prepare(switch, config)
        await predecessor.relieve(switch)
    except BaseException as error:
        await predecessor.decline(str(error))
        raise
    version, pid, gap = predecessor.data.version, predecessor.data.pid, 1000 * predecessor.gap
    switch.report("upgraded", f"from version {version}, pid {pid}; nothing was forwarded for {gap:.1f} ms")
    await predecessor.ended()
    try:
        await switch.apply(_merged(switch.config, predecessor.data.configured, config))
    except (ConfigError, VhostUserError, OSError) as error:
        switch.report("not-reloaded", f"the configuration of before goes on: {_reason(error)}")


def take_over(control: str, relieved: Callable[[Predecessor], None], log_format: LogFormat | None) -> None:
    """Take over from the switch whose control socket is at `control`, and run as `run` does.

    `relieved` is called when this process forwards. Raises Failure if the other one goes on.
    """
    from viaduct.switch.control_wire import ControlError
    from viaduct.switch.handover_channel import HandoverError

    try:
        asyncio.run(_take_over(control, relieved, log_format))
    except ControlError as error:
        raise Failure(str(error), NO_SWITCH if error.code == "unreachable" else FAILED) from error
    except ConfigError as error:
        raise Failure(f"the old process goes on: {error}", USAGE) from error
    except (HandoverError, OSError, VhostUserError, SandboxError) as error:
        raise Failure(f"the old process goes on: {_reason(error)}", FAILED) from error


async def _take_over(control: str, relieved: Callable[[Predecessor], None], log_format: LogFormat | None) -> None:
    from viaduct.switch.handover_taking import Predecessor
    from viaduct.switch.metrics_address import parse_metrics_address

    from .switch import configuration

    predecessor = await Predecessor.find(control, relieved)
    predecessor.adopt_service()
    sources = predecessor.data.sources

    def read() -> SwitchConfig:
        file = Path(sources.config) if sources.config else None
        return configuration(sources.ports, file, sources.pollers, sources.polling)

    try:
        config = read()
    except BaseException as error:
        await predecessor.decline(str(error))
        raise
    options = ProcessOptions(
        log_format=log_format or sources.log_format or "text",
        metrics=parse_metrics_address(sources.metrics) if sources.metrics else None,
        sandbox=sources.sandbox,
        sandbox_paths=sources.sandbox_paths,
        access=resolve_groups(sources.control_group, sources.control_readers),
        sources=sources,
    )
    await _serve(config, read if sources.config else None, options, predecessor)


def _enter_sandbox(config: SwitchConfig, options: ProcessOptions, control: Path) -> tuple[Sandbox, int]:
    """Give up what will not be needed. Returns what that was, and the eventfd that tells of refused system calls."""
    refused_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    metrics = options.metrics or MetricsAddress()
    sandbox = enter(
        options.sandbox,
        config,
        refused_fd,
        files=[os.path.abspath(control), *([metrics.path] if metrics.path else [])],
        directories=options.sandbox_paths,
        listen=[metrics.port] if metrics.port else [],
        groups=bool(options.access.groups),
    )
    return sandbox, refused_fd


def _report_sandbox(switch: Any, sandbox: Sandbox, refused_fd: int) -> None:
    """Say what was given up and what could not be; from now on also which system calls are refused."""
    from viaduct._core import refused_system_calls

    switch.report("sandbox", sandbox.describe())
    for failure in sandbox.not_given_up:
        switch.report("sandbox-incomplete", failure)
    told: set[str] = set()

    def refused() -> None:
        os.eventfd_read(refused_fd)
        for name, _ in refused_system_calls():
            if name not in told:
                told.add(name)
                switch.report(
                    "syscall-refused",
                    f"the sandbox refused system call {name}, which failed with ENOSYS; if you need what it was for, "
                    "start with --sandbox off, and please report it",
                )

    asyncio.get_running_loop().add_reader(refused_fd, refused)


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


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return str(error)
