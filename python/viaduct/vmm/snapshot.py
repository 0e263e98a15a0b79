"""A machine kept in a directory: `machine.json`, what it is and how its parts stand, and `memory`.

To be taken while the vCPUs stand still and the queues are stopped, so that nothing is under way but in the rings, which
lie in memory. Disks are not copied: the directory remembers how their files looked, because a guest that goes on with
other content than it had would destroy it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

import msgspec

from viaduct.vmm.config import MachineConfig
from viaduct.vmm.errors import MachineError

VERSION = 2
DESCRIPTION, MEMORY = "machine.json", "memory"
UNFINISHED_DESCRIPTION, UNFINISHED_MEMORY = "machine.json.new", "memory.new"


class _Version(msgspec.Struct, frozen=True):
    """What every description begins with, whatever else a version has."""

    version: int


class SlotState(msgspec.Struct, frozen=True):
    """A virtio device: what its driver wrote, where its queues stand, and what the device itself knows."""

    name: str
    transport: bytes
    bases: dict[int, int]
    device: dict[str, Any]


class DiskState(msgspec.Struct, frozen=True):
    """How a disk's file looked."""

    file: str
    size: int
    modified: int
    """Nanoseconds since 1970."""


class Snapshot(msgspec.Struct, frozen=True):
    """All of a machine but its memory."""

    version: int
    name: str
    config: MachineConfig
    engine: str
    """`Vm.save`."""
    platform: dict[str, bytes]
    """By the names of `Pc.stateful`."""
    pci: bytes | None
    slots: tuple[SlotState, ...]
    cards: dict[str, bytes]
    """Emulated network cards by their names."""
    registers: dict[str, Any]
    """The user's own devices of registers by theirs."""
    disks: tuple[DiskState, ...]


def disk_states(config: MachineConfig) -> tuple[DiskState, ...]:
    """How the disks look now, but for those that nobody can write to. Raises OSError."""
    states = []
    for disk in config.disks:
        if not disk.read_only:
            status = os.stat(disk.file)
            states.append(DiskState(disk.file, status.st_size, status.st_mtime_ns))
    return tuple(states)


def write(directory: Path, snapshot: Snapshot) -> None:
    """Makes a snapshot of a directory that has `UNFINISHED_MEMORY`. What a power cut leaves is no snapshot before the
    last step, and a whole one after it: each step is on the disk before the next begins. Raises OSError."""
    with open(directory / UNFINISHED_DESCRIPTION, "xb") as file:
        file.write(msgspec.json.encode(snapshot))
        file.flush()
        os.fsync(file.fileno())
    _sync_directory(directory.absolute().parent)
    _sync_directory(directory)
    (directory / UNFINISHED_MEMORY).rename(directory / MEMORY)
    _sync_directory(directory)
    (directory / UNFINISHED_DESCRIPTION).rename(directory / DESCRIPTION)
    _sync_directory(directory)


def _sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def forget_unfinished(directory: Path) -> None:
    """Removes what an unfinished snapshot has left, which is in the way of the next one, and nothing else."""
    with contextlib.suppress(OSError):
        names = {entry.name for entry in os.scandir(directory)}
        # The memory has its name already while the description has not.
        parts = {UNFINISHED_DESCRIPTION, UNFINISHED_MEMORY} | ({MEMORY} if UNFINISHED_DESCRIPTION in names else set())
        if names <= parts:
            for name in sorted(names - {UNFINISHED_DESCRIPTION}) + sorted(names & {UNFINISHED_DESCRIPTION}):
                (directory / name).unlink()


def new_directory(path: Path) -> Path:
    """A directory for a snapshot, made unless it is there and empty; what an interrupted one has left is removed.
    Raises `MachineError`."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        forget_unfinished(path)
        if any(path.iterdir()):
            raise MachineError(f"{path}: there is something in it; a snapshot needs a directory of its own")
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from error
    return path


def read(directory: Path, *, any_disks: bool = False) -> Snapshot:
    """Reads a description. `any_disks`: the disks may have changed.

    Raises:
        MachineError: there is none, it is damaged or of another version, or a disk has changed since.
    """
    path = directory / DESCRIPTION
    try:
        text = path.read_bytes()
        version = msgspec.json.decode(text, type=_Version).version
        if version != VERSION:
            raise MachineError(f"{path} is of version {version}, and this is for {VERSION}")
        snapshot = msgspec.json.decode(text, type=Snapshot)
    except FileNotFoundError:
        raise MachineError(f"{directory} is no snapshot: it has no {DESCRIPTION}; see: viaduct vm snapshot") from None
    except OSError as error:
        raise MachineError(f"{path}: {error.strerror}") from error
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise MachineError(f"{path} is no description of a machine: {error}") from error
    if not any_disks:
        _check_disks(snapshot)
    return snapshot


def _check_disks(snapshot: Snapshot) -> None:
    for was in snapshot.disks:
        try:
            status = os.stat(was.file)
        except OSError as error:
            raise MachineError(f"{was.file}, a disk of the machine: {error.strerror}") from error
        if (status.st_size, status.st_mtime_ns) != (was.size, was.modified):
            raise MachineError(
                f"{was.file} was written to since the snapshot: the guest would destroy what it does not know of; put "
                "the file back, or restore with --any-disks if you know that it fits"
            )
