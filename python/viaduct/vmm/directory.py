"""Where running machines are found by their names: a directory each, beside the control socket of the switch.

In `machines/NAME` are `control.sock`, which `viaduct vm` asks, and `console.sock`, which is the guest's console. They
belong to who runs the machine. A machine that was killed leaves its directory behind; nobody answers there, so it is
not listed, and the next machine of that name takes it over.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

from viaduct.switch.control_wire import listening_path
from viaduct.vmm.errors import MachineError

CONTROL, CONSOLE = "control.sock", "console.sock"


def machines_directory() -> Path:
    """The directory that holds one directory a machine. Raises `MachineError` if it cannot be had."""
    try:
        directory = listening_path().parent / "machines"
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise MachineError(f"no directory for running machines: {error}; set XDG_RUNTIME_DIR to one of yours") from None
    return directory


def claim(name: str) -> Path:
    """The directory of the machine `name`, which is about to run. Raises `MachineError` if one of that name does."""
    directory = machines_directory() / name
    if answers(directory / CONTROL):
        raise MachineError(
            f"a machine named {name} is running; choose another name, or end it with: viaduct vm stop {name}"
        )
    directory.mkdir(mode=0o700, exist_ok=True)
    return directory


def release(directory: Path) -> None:
    """The machine has ended."""
    with contextlib.suppress(OSError):
        directory.rmdir()


def free_name() -> str:
    """A name for a machine that was given none: `vm1`, `vm2`, ..., the first that is free."""
    directory = machines_directory()
    number = 1
    while (directory / f"vm{number}").exists() and answers(directory / f"vm{number}" / CONTROL):
        number += 1
    return f"vm{number}"


def running() -> list[str]:
    """The names of the machines that run, in order."""
    try:
        return sorted(entry.name for entry in os.scandir(machines_directory()) if answers(Path(entry.path) / CONTROL))
    except OSError:
        return []


def answers(path: Path) -> bool:
    """Whether somebody listens on a socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        return probe.connect_ex(str(path)) == 0
