"""`viaduct vm`: the machines that run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .failure import Failure
from .options import Json

if TYPE_CHECKING:
    from viaduct.switch.control_client import ControlClient

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look at running machines, and change them.")

NO_MACHINE = 3
"""Exit code: no machine of that name runs."""


def _names(incomplete: str) -> list[str]:
    from viaduct.vmm.directory import running

    return [name for name in running() if name.startswith(incomplete)]


Name = Annotated[str, typer.Argument(metavar="NAME", help="The machine.", autocompletion=_names)]


@app.command("list")
def list_machines(json: Json = False) -> None:
    """The machines of this user that run."""
    import datetime

    from viaduct.vmm.directory import running

    from .output import print_json, print_rows

    found = []
    for name in running():
        try:
            with _client(name) as machine:
                found.append(machine.call("status"))
        except Failure:
            continue  # it has ended since
    if json:
        print_json(found)
        return
    rows = []
    for status in found:
        started = datetime.datetime.fromtimestamp(status["started"]).strftime("%Y-%m-%d %H:%M:%S")
        memory = f"{status['memory'] >> 20} MiB"
        numbers = [str(status["cpus"]), memory, started, str(status["pid"])]
        rows.append([status["name"], status["state"], *numbers, status["kernel"]])
    headings = ["NAME", "STATE", "VCPUS", "MEMORY", "STARTED", "PID", "KERNEL"]
    print_rows(headings, rows, (2, 3, 5), empty="no machine runs; start one with: viaduct run --kernel vmlinuz ...")


@app.command("show")
def show(name: Name, json: Json = False) -> None:
    """One machine: its devices, and what happened lately."""
    import datetime

    from .output import print_json

    status = _call(name, "status")
    if json:
        print_json(status)
        return
    memory = f"{status['memory'] >> 20} MiB"
    print(f"{status['name']}: {status['state']}, {status['cpus']} vCPUs, {memory}, pid {status['pid']}")
    print(f"kernel {status['kernel']}, engine {status['engine']}, console {status['console']}")
    if status["gdb"]:
        print(f"gdb {status['gdb']}")
    for device in status["devices"]:
        print(f"  {device}")
    for event in status["events"]:
        moment = datetime.datetime.fromtimestamp(event["time"]).strftime("%H:%M:%S")
        print(f"{moment}  {event['kind']}: {event['text']}")


@app.command("pause")
def pause(name: Name) -> None:
    """Let the vCPUs stand still."""
    _call(name, "pause")


@app.command("resume")
def resume(name: Name) -> None:
    """Let the vCPUs run again."""
    _call(name, "resume")


@app.command("reset")
def reset(name: Name) -> None:
    """Switch a machine off and on again."""
    _call(name, "reset")


@app.command("shutdown")
def shutdown(
    name: Name,
    within: Annotated[float, typer.Option(metavar="SECONDS", help="How long to wait for its end.", min=0)] = 0,
) -> None:
    """Press a machine's power button: its guest shuts down in an orderly way, if it listens.

    \b
        viaduct vm shutdown web --within 60 || viaduct vm stop web
    """
    _call(name, "power-button")
    if within and not _ended(name, within):
        raise Failure(
            f"machine {name} has not ended after {within:g} s; its guest may not listen: viaduct vm stop {name}"
        )


@app.command("stop")
def stop(name: Name) -> None:
    """Switch a machine off at once, as pulling its plug does."""
    _call(name, "stop")
    if not _ended(name, 30):
        raise Failure(f"machine {name} has not ended after 30 s; see: viaduct vm show {name}")


def _ended(name: str, seconds: float) -> bool:
    """Waits so long for a machine's end. Returns whether it came."""
    import time

    from viaduct.vmm.directory import CONTROL, answers, machines_directory

    path = machines_directory() / name / CONTROL
    deadline = time.monotonic() + seconds
    while answers(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


@app.command("exits")
def exits(name: Name, json: Json = False) -> None:
    """Where a machine's time goes: its exits by reason, port or address, and device."""
    from .output import print_json, print_rows

    found = _call(name, "exits")
    if json:
        print_json(found)
        return
    rows = [
        [reason, "" if address is None else f"{address:#x}", device, str(count), f"{seconds * 1e3:.2f}"]
        for reason, address, device, count, seconds in found["rows"]
    ]
    rows.append(["in the guest, or waiting there", "", "", "", f"{found['guest_seconds'] * 1e3:.2f}"])
    print_rows(["REASON", "ADDRESS", "DEVICE", "COUNT", "MS"], rows, (3, 4))


@app.command("console")
def console(name: Name) -> None:
    """The console of a machine, on this terminal. Ctrl-] leaves it; the machine goes on."""
    import asyncio

    from viaduct.vmm.directory import CONSOLE, machines_directory

    from .console_client import attach

    path = machines_directory() / name / CONSOLE
    try:
        asyncio.run(attach(str(path)))
    except OSError as error:
        raise Failure(f"no machine named {name} runs ({error.strerror}); see: viaduct vm list", NO_MACHINE) from None


@app.command("snapshot")
def snapshot(
    name: Name,
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A new or empty directory.")],
    stop: Annotated[bool, typer.Option("--stop", help="Then switch it off: its disks stay as they are.")] = False,
) -> None:
    """Keep a machine as it is: memory, devices, and what is under way in its rings. It goes on running, unless --stop
    is given and the snapshot was written.

    \b
        viaduct vm snapshot web /srv/web.snapshot --stop
        viaduct vm restore /srv/web.snapshot
    """
    import os

    if not stop:
        _call(name, "snapshot", path=os.path.abspath(directory))
        return
    ran = _call(name, "status")["state"] == "running"
    try:
        _call(name, "pause")
        _call(name, "snapshot", path=os.path.abspath(directory))
    except BaseException:  # Also Ctrl-C.
        if ran:
            _call(name, "resume")
        raise
    _call(name, "stop")


@app.command("restore")
def restore(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="What `viaduct vm snapshot` made.")],
    name: Annotated[str | None, typer.Option("--name", metavar="NAME", help="Another name than before.")] = None,
    console: Annotated[
        str, typer.Option(metavar="stdio|socket:PATH|file:PATH|none", help="The guest's console.")
    ] = "stdio",
    any_disks: Annotated[
        bool, typer.Option("--any-disks", help="Even if disks were written to since the snapshot.")
    ] = False,
    json: Json = False,
) -> None:
    """Run a machine from where a snapshot has it, until its guest switches it off.

    Memory is read as it is touched, so that this takes no longer for a large machine; with a card on a vhost-user
    back-end it is copied first, unless the file system can share it.
    """
    from viaduct.vmm.errors import MachineError
    from viaduct.vmm.machine import Machine

    from .machine_run import run_machine

    try:
        code = run_machine(
            lambda on_event, leave: Machine.restored(
                directory, any_disks=any_disks, name=name, console=console, on_event=on_event, leave=leave
            ),
            json=json,
        )
    except MachineError as error:
        raise Failure(str(error)) from error
    raise typer.Exit(code)


def _client(name: str) -> ControlClient:
    from viaduct.switch.control_client import ControlClient
    from viaduct.switch.control_wire import ControlError
    from viaduct.vmm.directory import CONTROL, machines_directory
    from viaduct.vmm.errors import MachineError

    try:
        return ControlClient(machines_directory() / name / CONTROL)
    except ControlError:
        raise Failure(f"no machine named {name} runs; see: viaduct vm list", NO_MACHINE) from None
    except MachineError as error:
        raise Failure(str(error), NO_MACHINE) from error


def _call(name: str, method: str, **params: Any) -> Any:
    from viaduct.switch.control_wire import ControlError

    with _client(name) as machine:
        try:
            return machine.call(method, **params)
        except ControlError as error:
            raise Failure(f"{name}: {error}") from None
