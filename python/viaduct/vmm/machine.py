"""A virtual machine, from the outside.

    machine = viaduct.Machine(kernel="vmlinuz", initrd="initrd.img", append="console=ttyS0", nics=["switch:web"])
    machine.start()
    await machine.console.expect("login:")
    await machine.stop()

# How it works

A `Machine` outlives what is inside it. Each time its guest is switched on there is a new `Board`: RAM, an engine's
virtual machine, devices. A reset is switching off and on again. The console, the control socket and the machine's name
stay.

All methods are called on the asyncio loop on which the machine was started. The guest runs on threads of its own, one
for each vCPU, which report events (it was switched off, it failed, it panicked) back to the loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec

from viaduct.devices.console_end import ConsoleEnd, console_end
from viaduct.devices.console_terminal import ConsoleTerminal
from viaduct.vhost_user.errors import VhostUserError
from viaduct.vmm import directory
from viaduct.vmm import snapshot as snapshots
from viaduct.vmm.board import Board
from viaduct.vmm.config import MachineConfig, build_machine
from viaduct.vmm.control import MachineControl
from viaduct.vmm.errors import MachineError
from viaduct.vmm.exit_report import Exits
from viaduct.vmm.snapshot import Snapshot

log = logging.getLogger("viaduct.vmm")

_AT_ONCE = 2.0
"""Seconds from switching on in which a triple fault is the end."""

State = Literal["created", "starting", "running", "paused", "stopped"]


class MachineEnd(msgspec.Struct, frozen=True):
    """Why a machine has ended."""

    reason: str
    """`shutdown`, `stopped`, `exit` (the debug-exit port), `reset`, `failed` or `triple-fault`."""
    code: int
    """The exit code for a program that runs one machine: 0 for an orderly end."""
    detail: str = ""
    """More, for people."""


class MachineEvent(msgspec.Struct, frozen=True):
    """Something that happened to a machine."""

    time: float
    """Seconds since 1970."""
    kind: str
    """`started`, `paused`, `resumed`, `reset`, `panic`, `driver-error`, `device-failed`, `ended`, ..."""
    text: str


class MachineStatus(msgspec.Struct, frozen=True):
    """A machine as it is now."""

    name: str
    state: State
    pid: int
    engine: str
    cpus: int
    memory: int
    """Bytes."""
    started: float
    """Seconds since 1970."""
    kernel: str
    devices: tuple[str, ...]
    console: str
    gdb: str
    """Where gdb can attach, and whether it has and holds the guest; empty: nowhere."""
    events: tuple[MachineEvent, ...]
    """The last ones, the oldest first."""


class Machine:
    """One virtual machine; see the module's text. `config`, or the fields of one as keyword arguments.

    `on_event` is called with each `MachineEvent`.

    Raises `viaduct.switch.config.ConfigError` for a configuration that cannot be.
    """

    def __init__(
        self,
        config: MachineConfig | None = None,
        *,
        on_event: Callable[[MachineEvent], None] | None = None,
        leave: Callable[[], None] | None = None,
        restore: tuple[Path, Snapshot] | None = None,
        **fields: Any,
    ) -> None:
        if restore is not None:
            config = restore[1].config
        if config is None:
            config = build_machine({"console": "none", **fields})
        self.config = config
        self.name = config.name
        self.state: State = "created"
        self.console = ConsoleTerminal(name=f"{config.name or 'machine'} console")
        """The guest's serial port, and its virtio console."""
        self.gdb_port: int | None = None
        """Where gdb can attach, on the loopback interface; None: nowhere."""
        self.events: list[MachineEvent] = []
        """What happened, the last 200."""
        self._on_event = on_event
        self._leave = leave
        self._board: Board | None = None
        self._restore = restore
        self._started = 0.0
        self._directory: Path | None = None
        self._ends: list[ConsoleEnd] = []
        self._control: MachineControl | None = None
        self._finished: asyncio.Future[MachineEnd] | None = None
        self._task: asyncio.Task[None] | None = None
        self._resetting: asyncio.Task[None] | None = None
        self._panicked = False
        """The guest has said so since it was switched on."""
        self._turn = asyncio.Lock()

    # Life.

    def start(self, *, paused: bool = False) -> asyncio.Task[None]:
        """Switches the machine on. The task ends when its guest runs, or raises `MachineError`; it may be awaited, or
        left alone: `wait` raises the same. It is cancelled if the machine is finished before there is a guest."""
        if self._task is None:
            self._finished = asyncio.get_running_loop().create_future()
            self._task = asyncio.create_task(self._start(paused), name=f"start of machine {self.name}")
        return self._task

    async def wait(self) -> MachineEnd:
        """Waits until the guest has been switched off, whoever did it. Raises `MachineError` if it did not start."""
        start = self.start()
        await asyncio.wait([start])
        assert self._finished is not None
        if not self._finished.done() or self._finished.cancelled():
            await start
        return await asyncio.shield(self._finished)

    async def pause(self) -> None:
        """Stops the vCPUs between two instructions; devices go on. Raises `MachineError`."""
        async with self._turn:
            board = self._running_board()
            if self.state == "running":
                await board.pause()
                self._set("paused", "paused", "the vCPUs stand still")

    async def resume(self) -> None:
        """Lets the vCPUs run. Raises `MachineError`."""
        async with self._turn:
            board = self._running_board()
            if self.state == "paused":
                await board.resume()
                self._set("running", "resumed", "the vCPUs run")

    async def reset(self) -> None:
        """Switches the machine off and on again; what its disks have stays. Raises `MachineError`."""
        async with self._turn:
            board, self._board = self._running_board(), None
            try:
                await board.close()
                await self._switch_on(paused=False)
            except Exception as error:
                self.finish("failed", 1, f"could not be switched on again: {error}")
                raise error if isinstance(error, MachineError) else MachineError(str(error)) from error
            except asyncio.CancelledError:
                await board.close()  # What was left of it.
                raise
            self._set("running", "reset", "the machine was switched off and on again")

    async def press_power_button(self) -> None:
        """Asks the guest to shut down, as a short press of a computer's button does: it may take its time, ask
        somebody, or not listen; `wait` tells. Raises `MachineError`."""
        async with self._turn:
            self._running_board().press_power_button()
            self._record("power-button", "the guest is asked to shut down")

    async def stop(self) -> None:
        """Switches the machine off at once, as pulling its plug does, and lets go of everything. Twice does no harm."""
        self.finish("stopped", 0)
        await self.close()

    def finish(self, reason: str, code: int, detail: str = "") -> None:
        """Says that the guest has ended: `wait` returns. The first reason counts."""
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(MachineEnd(reason, code, detail))
            self.state = "stopped"
            if self._board is not None:
                self._board.vm.request_pause()
            elif self._task is not None:
                self._task.cancel()  # Nothing if it is done: a reset is under way, and will see it.
            self._record("ended", f"{reason}: {detail}" if detail else reason)

    async def close(self) -> None:
        """Lets go of everything. May be called twice."""
        for task in (self._task, self._resetting):
            if task is not None and not task.done():
                task.cancel()
            if task is not None:
                await asyncio.gather(task, return_exceptions=True)
        async with self._turn:
            if self._board is not None:
                await self._board.close()
                self._board = None
            self.state = "stopped"
        self.console.close()
        if self._control is not None:
            await self._control.close()
            self._control = None
        while self._ends:
            await self._ends.pop().close()
        if self._directory is not None:
            directory.release(self._directory)
            self._directory = None

    async def __aenter__(self) -> Machine:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def snapshot(self, path: str | Path) -> None:
        """Keeps the machine as it is in a directory, which is made or empty; it goes on running. The vCPUs stand still
        meanwhile, for as long as writing its memory takes. Raises `MachineError`."""
        async with self._turn:
            board = self._running_board()
            target = snapshots.new_directory(Path(path))
            if self.state == "running":
                await board.pause()
            try:
                await board.save(target, self.name)
            finally:
                if self.state == "running":
                    await board.resume()
            self._record("snapshot", str(target))

    @classmethod
    def restored(
        cls,
        path: str | Path,
        *,
        any_disks: bool = False,
        name: str | None = None,
        console: str = "none",
        on_event: Callable[[MachineEvent], None] | None = None,
        leave: Callable[[], None] | None = None,
    ) -> Machine:
        """A machine that goes on, when it is started, where a snapshot has it. `any_disks`: its disks may have been
        written to since. `name`, `console`: as in `MachineConfig`. Raises `MachineError`."""
        directory = Path(path)
        found = snapshots.read(directory, any_disks=any_disks)
        name = found.name if name is None else name
        config = msgspec.structs.replace(found.config, name=name, console=console, gdb=None)
        found = msgspec.structs.replace(found, config=config)
        return cls(restore=(directory, found), on_event=on_event, leave=leave)

    # Looking at it.

    def status(self) -> MachineStatus:
        """The machine as it is now."""
        board = self._board
        return MachineStatus(
            name=self.name,
            state=self.state,
            pid=os.getpid(),
            engine=board.engine if board is not None else self.config.engine,
            cpus=self.config.cpus,
            memory=self.config.memory,
            started=self._started,
            kernel=self.config.kernel,
            devices=tuple(board.devices) if board is not None else (),
            console=str(self._directory / directory.CONSOLE) if self._directory is not None else "",
            gdb=self._gdb_status(board),
            events=tuple(self.events[-20:]),
        )

    def _gdb_status(self, board: Board | None) -> str:
        if board is None or (gdb := board.vm.gdb) is None:
            return ""
        meaning = {
            "awaited": "the guest stands still until it attaches",
            "absent": "not attached",
            "stopped": "attached, the guest stands still for it",
            "running": "attached, the guest runs",
        }
        return f"at 127.0.0.1:{self.gdb_port}: {meaning[gdb]}"

    def exits(self) -> Exits:
        """Where the guest's time went since it was switched on."""
        return Exits.of(self._board.vm) if self._board is not None else Exits()

    # How it works.

    async def _start(self, paused: bool) -> None:
        try:
            self.name = self.name or directory.free_name()
            self._directory = directory.claim(self.name)
            ends = [self.config.console, f"socket:{self._directory / directory.CONSOLE}"]
            self._control = MachineControl(self, self._directory / directory.CONTROL)
            await self._control.start()
            async with self._turn:
                await self._switch_on(paused)
            for kind in ends:
                end = console_end(kind, self.console, self._leave)
                await end.start()
                self._ends.append(end)
        except (MachineError, VhostUserError, OSError, ValueError) as error:
            assert self._finished is not None
            self._finished.cancel()
            text = str(error)
            raise error if isinstance(error, MachineError) else MachineError(text) from error
        self._set("paused" if paused else "running", "started", f"{self.config.cpus} vCPUs, {self.config.kernel}")

    async def _switch_on(self, paused: bool) -> None:
        self.state = "starting"
        self._panicked = False
        restore, self._restore = self._restore, None
        board = await Board.build(self.config, self.name, self.console, self._from_board, restore)
        assert self._finished is not None
        if self._finished.done():
            await board.close()
            raise MachineError(f"machine {self.name} was ended before its guest began")
        self._board = board
        self._started = time.time()
        await self._board.start(paused=paused or self.config.gdb is not None)
        if self.config.gdb is not None:
            # What is paused for gdb is not paused for us.
            self.gdb_port = self._board.serve_gdb(self.config.gdb)
            if paused:
                await self._board.pause()
            self._record("gdb", f"attach with: gdb -ex 'target remote 127.0.0.1:{self.gdb_port}'")

    def _running_board(self) -> Board:
        if self._board is None or self.state not in ("running", "paused"):
            raise MachineError(f"machine {self.name} is {self.state}; it has to run for that")
        return self._board

    def _from_board(self, kind: str, text: str, code: int = 0) -> None:
        """What the board reports, on the loop: a thing to know, or the end."""
        if kind == "triple-fault":
            # A processor that finds no way to tell of a fault resets its machine; some kernels reboot by that. One that
            # does it at once, again and again, does not mean to.
            if time.time() - self._started < _AT_ONCE:
                self.finish(kind, 1, text)
                return
            self._record(kind, text)
            kind = "reset"
        if kind == "reset":
            if self.config.on_reset == "stop":
                self.finish("reset", 1 if self._panicked else 0, text)
            elif self._resetting is None or self._resetting.done():
                self._resetting = asyncio.create_task(self._reset_by_guest())
        elif kind in ("shutdown", "exit", "failed"):
            self.finish(kind, code, text)
        else:
            self._panicked |= kind == "panic"
            self._record(kind, text)

    async def _reset_by_guest(self) -> None:
        with contextlib.suppress(MachineError):  # it has ended with that
            await self.reset()

    def _set(self, state: State, kind: str, text: str) -> None:
        self.state = state
        self._record(kind, text)

    def _record(self, kind: str, text: str) -> None:
        event = MachineEvent(time.time(), kind, text)
        self.events.append(event)
        del self.events[:-200]
        # Whoever is told has no need to read it again in the log.
        grave = kind in ("driver-error", "device-failed", "device-error", "panic") and self._on_event is None
        level = logging.WARNING if grave else logging.INFO
        log.log(level, "machine %s: %s: %s", self.name, kind, text)
        if self._on_event is not None:
            self._on_event(event)
