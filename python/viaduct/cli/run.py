"""`viaduct run`: a virtual machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .class_names import class_names
from .failure import USAGE, Failure
from .options import Json

if TYPE_CHECKING:
    from viaduct.vmm.config import MachineConfig
    from viaduct.vmm.exit_report import Exits
    from viaduct.vmm.machine import Machine, MachineEnd, MachineEvent


def run(
    kernel: Annotated[
        str | None, typer.Option("--kernel", "-k", metavar="FILE", help="bzImage, vmlinux, multiboot or flat binary.")
    ] = None,
    initrd: Annotated[str | None, typer.Option(metavar="FILE", help="Initial RAM disk.")] = None,
    append: Annotated[str, typer.Option(metavar="TEXT", help="The kernel's command line.")] = "",
    memory: Annotated[str | None, typer.Option("--memory", "-m", metavar="SIZE", help="RAM [default: 512M].")] = None,
    cpus: Annotated[int | None, typer.Option("--cpus", "-c", metavar="N", help="vCPUs, 1 to 64 [default: 1].")] = None,
    disk: Annotated[
        list[str] | None,
        typer.Option("--disk", metavar="FILE[,ro][,format=raw|qcow2]", help="A disk; repeatable."),
    ] = None,
    nic: Annotated[
        list[str] | None,
        typer.Option(
            "--nic",
            metavar="TO[,path=...][,mac=...]",
            help="A network card; TO is switch:NAME, vhost-user:PATH or tap:IF, path is virtio, vhost or emulated.",
        ),
    ] = None,
    share: Annotated[
        list[str] | None, typer.Option("--share", metavar="DIR[,tag=TAG]", help="A directory, by virtiofs; repeatable.")
    ] = None,
    device: Annotated[
        list[str] | None,
        typer.Option(
            "--device",
            metavar="FILE.py:CLASS[,pio=BASE+SIZE|mmio=BASE+SIZE][,irq=N][,NAME=VALUE]",
            help="A device of your own, virtio or registers on a bus; repeatable (docs/devices.md).",
            autocompletion=class_names,
        ),
    ] = None,
    vsock: Annotated[str | None, typer.Option(metavar="PATH", help="Where the guest's sockets are reached.")] = None,
    balloon: Annotated[bool, typer.Option("--balloon", help="Let the guest give memory back.")] = False,
    console: Annotated[
        str | None, typer.Option(metavar="stdio|socket:PATH|file:PATH|none", help="The guest's console.")
    ] = None,
    console_device: Annotated[
        str | None, typer.Option(metavar="serial|virtio", help="The console in the guest: ttyS0 or hvc0.")
    ] = None,
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="For `viaduct vm` [default: vm1].")] = None,
    boot: Annotated[
        str | None, typer.Option(metavar="auto|bzimage|pvh|linux|multiboot|flat", help="How the kernel is started.")
    ] = None,
    transport: Annotated[str | None, typer.Option(metavar="pci|mmio", help="Where virtio devices are found.")] = None,
    transitional: Annotated[
        bool, typer.Option("--transitional", help="Virtio on PCI also for drivers from before virtio 1.0.")
    ] = False,
    port_notify: Annotated[
        bool, typer.Option("--port-notify", help="Virtio on PCI is notified at ports, if the driver can.")
    ] = False,
    interrupts: Annotated[
        str | None, typer.Option(metavar="kernel|split", help="Where the IOAPIC is: in the engine, or in this process.")
    ] = None,
    engine: Annotated[str | None, typer.Option(metavar="auto|kvm", help="What executes the guest.")] = None,
    on_reset: Annotated[str | None, typer.Option(metavar="restart|stop", help="What a guest's reset does.")] = None,
    gdb: Annotated[int | None, typer.Option(metavar="PORT", help="Wait for gdb at 127.0.0.1:PORT, then begin.")] = None,
    config: Annotated[str | None, typer.Option("--config", metavar="FILE.toml", help="All of it, from a file.")] = None,
    trace: Annotated[
        str | None, typer.Option(metavar="exits", help="Show where the guest's time goes, as it runs and at its end.")
    ] = None,
    json: Json = False,
) -> None:
    """Run a virtual machine until its guest switches it off.

    The guest's console is this terminal; Ctrl-] leaves it and ends the machine. From elsewhere: viaduct vm list.

    \b
        viaduct run --kernel vmlinuz --initrd initrd.img --append console=ttyS0
        viaduct run --kernel vmlinuz --disk disk.img --append "console=ttyS0 root=/dev/vda1" --nic switch:web
        viaduct run --kernel vmlinuz --nic tap:tap0,path=vhost --cpus 4 --memory 2G --trace exits
        viaduct run --kernel kernel.bin --device examples/dice.py:Dice,pio=0x700+4

    Exit codes: the guest's own if it wrote one to the debug-exit port; 0 if it was switched off in an orderly way, also
    by `viaduct vm stop` or Ctrl-]; 1 if it failed or could not begin; 2 wrong usage; 128 + N if signal N ended it.
    """
    from viaduct.switch.config_error import ConfigError

    if trace not in (None, "exits"):
        raise Failure(f"--trace {trace}: only exits can be traced", USAGE)
    told: dict[str, Any] = {
        "kernel": kernel,
        "initrd": initrd,
        "append": append or None,
        "memory": memory,
        "cpus": cpus,
        "disks": disk,
        "nics": nic,
        "shares": share,
        "devices": device,
        "vsock": vsock,
        "balloon": balloon or None,
        "console": console,
        "console_device": console_device,
        "name": name,
        "boot": boot,
        "transport": transport,
        "transitional": transitional or None,
        "port_notify": port_notify or None,
        "interrupts": interrupts,
        "engine": engine,
        "on_reset": on_reset,
        "gdb": gdb,
    }
    told = {key: value for key, value in told.items() if value is not None}
    try:
        machine = _machine_config(told, config)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error

    def make(on_event: Callable[[MachineEvent], None], leave: Callable[[], None]) -> Machine:
        from viaduct.vmm.machine import Machine

        return Machine(machine, on_event=on_event, leave=leave)

    raise typer.Exit(run_machine(make, trace=trace is not None, json=json))


def _machine_config(told: dict[str, Any], file: str | None) -> MachineConfig:
    """What the file says, and over it what the command line says. Raises `ConfigError`."""
    from viaduct.switch.config_error import ConfigError
    from viaduct.vmm.config import build_machine
    from viaduct.vmm.config_toml import load_machine_table

    if file is not None:
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
