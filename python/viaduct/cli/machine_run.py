"""A machine in the foreground: configured, started, its console here, until its end.

For `viaduct run` and `viaduct vm restore`. Nothing here needs typer, because a machine is waited for (`run_words`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .failure import USAGE, Failure

if TYPE_CHECKING:
    from viaduct.vmm.config import MachineConfig
    from viaduct.vmm.exit_report import Exits
    from viaduct.vmm.machine import Machine, MachineEnd, MachineEvent


def run_configured(
    told: dict[str, Any], *, config: str | None = None, trace: str | None = None, json: bool = False
) -> int:
    """Runs the machine that the command line tells of - fields of `MachineConfig`; None and False count as not said -
    over what the file `config` says. Returns its exit code. Raises `Failure`."""
    from viaduct.switch.config_error import ConfigError

    if trace not in (None, "exits"):
        raise Failure(f"--trace {trace}: only exits can be traced", USAGE)
    said = {key: value for key, value in told.items() if value is not None and value is not False}
    try:
        machine = _machine_config(said, config)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error

    def make(on_event: Callable[[MachineEvent], None], leave: Callable[[], None]) -> Machine:
        from viaduct.vmm.machine import Machine

        return Machine(machine, on_event=on_event, leave=leave)

    return run_machine(make, trace=trace is not None, json=json)


def _machine_config(told: dict[str, Any], file: str | None) -> MachineConfig:
    """What the file says, and over it what the command line says. Raises `ConfigError`."""
    from viaduct.switch.config_error import ConfigError
    from viaduct.vmm.config import build_machine

    if file is not None:
        from viaduct.vmm.config_toml import load_machine_table

        table = load_machine_table(file, told.get("name"))
        return build_machine({**table, **told}, Path(file).absolute().parent)
    if "kernel" not in told:
        raise ConfigError("--kernel FILE is needed, or --config FILE.toml that names one")
    return build_machine(told)


Make = Callable[[Callable[["MachineEvent"], None], Callable[[], None]], "Machine"]
"""Makes the machine, given what is to be called with its events, and when the user leaves its console."""


def run_machine(make: Make, *, trace: bool = False, json: bool = False) -> int:
    """Runs a machine in the foreground until its end; returns its exit code. Raises `Failure` if it cannot run."""
    import asyncio
    import sys

    from viaduct.vmm.errors import MachineError

    from .output import print_json

    async def main() -> MachineEnd:
        machine = make(
            lambda event: _say(machine, event, json), lambda: machine.finish("stopped", 0, "left with Ctrl-]")
        )
        _end_on_signals(machine)
        tracing: asyncio.Task[None] | None = None
        try:
            if trace:
                tracing = asyncio.create_task(_trace(machine))
            return await machine.wait()
        finally:
            if tracing is not None:
                tracing.cancel()
                _show_exits(machine.exits())
            await machine.close()

    try:
        end = asyncio.run(main())
    except MachineError as error:
        raise Failure(str(error)) from error
    if json:
        print_json({"ended": end})
    elif end.reason not in ("shutdown", "exit", "stopped"):
        print(f"viaduct: the machine ended: {end.reason}{': ' + end.detail if end.detail else ''}", file=sys.stderr)
    return end.code


def _say(machine: Machine, event: MachineEvent, json: bool) -> None:
    """What happens, beside the console: only what somebody has to know."""
    import sys

    from .output import print_json

    if json:
        print_json({"machine": machine.name, "event": event})
    elif event.kind in ("driver-error", "device-failed", "panic", "device-error", "failed", "triple-fault"):
        # The terminal is in raw mode: a line feed alone would not return to its beginning.
        print(f"\r\nviaduct: {machine.name}: {event.kind}: {event.text}\r", file=sys.stderr)


def _end_on_signals(machine: Machine) -> None:
    import asyncio
    import signal

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, machine.finish, "stopped", 128 + number, signal.Signals(number).name)


async def _trace(machine: Machine) -> None:
    """The exits of each five seconds, the costliest first."""
    import asyncio

    before = machine.exits()
    while True:
        await asyncio.sleep(5)
        now = machine.exits()
        _show_exits(now.since(before), 8)
        before = now


def _show_exits(exits: Exits, limit: int | None = None) -> None:
    import sys

    from rich.console import Console

    # On standard error: the console has the other. A terminal that is raw needs a carriage return as well.
    console = Console(file=sys.stderr)
    with console.capture() as shown:
        console.print(exits.table(limit))
    print("\r\n".join(shown.get().split("\n")), file=sys.stderr)
