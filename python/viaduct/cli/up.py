"""`viaduct up`: a switch and several machines together."""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import USAGE, Failure

if TYPE_CHECKING:
    from viaduct.vmm.config_toml import NetConfig

_VIADUCT = (sys.executable, "-c", "from viaduct.cli import main; main()")
_PATIENCE = 30.0
"""Seconds for the switch to appear, and for a process to end."""
_LINE_MAX = 1 << 16
"""Bytes of a line that is shown in one piece."""


def up(
    file: Annotated[Path, typer.Argument(metavar="FILE.toml", help="A switch and machines.")],
) -> None:
    """Start a switch and several machines, and end them together.

    Each is a process of its own, so that none can take the others with it. Ctrl-C ends all; so does the end of the last
    machine. Consoles: viaduct vm console NAME. The exit code is 130 after Ctrl-C or SIGTERM, otherwise the highest of
    the machines', where 128 + N is that of one which signal N has killed.

    \b
        [machines.web]
        kernel = "vmlinuz"
        initrd = "initrd.img"
        append = "console=ttyS0"
        nics = ["switch:web"]

        [machines.db]
        kernel = "vmlinuz"
        initrd = "initrd.img"
        append = "console=ttyS0"
        nics = ["switch:db"]

    A table [switch] may say what `viaduct switch --config` takes; ports that machines name are made when they come.
    """
    from viaduct.switch.config_error import ConfigError
    from viaduct.vmm.config_toml import load_net

    try:
        net = load_net(file)
    except ConfigError as error:
        raise Failure(str(error), USAGE) from error
    raise typer.Exit(asyncio.run(_up(file.absolute(), net)))


async def _up(file: Path, net: NetConfig) -> int:
    import tempfile

    from viaduct.switch.config_toml import format_config

    loop, ended = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, ended.set)
    with tempfile.NamedTemporaryFile("w", prefix="viaduct-", suffix=".toml") as switch_file:
        switch_file.write(format_config(net.switch))
        switch_file.flush()
        switch = await _Child.start("switch", "switch", "--config", switch_file.name)
        machines: list[_Child] = []
        try:
            if not await _answers(switch, ended):
                return switch.exit_code or 1
            for config in net.machines:
                words = ("--config", str(file), "--name", config.name, "--console", config.console)
                machines.append(await _Child.start(config.name, "run", *words))
            waits = [asyncio.create_task(_all_ended(machines)), asyncio.create_task(_told(ended))]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        finally:
            for machine in machines:
                await machine.end()
            await switch.end()
    return max((machine.exit_code for machine in machines), default=1) if not ended.is_set() else 130


async def _all_ended(machines: list[_Child]) -> None:
    for machine in machines:
        await machine.process.wait()


async def _told(ended: asyncio.Event) -> None:
    await ended.wait()


async def _answers(switch: _Child, ended: asyncio.Event) -> bool:
    """Whether the switch has come up."""
    from viaduct.switch.control_client import ControlClient
    from viaduct.switch.control_wire import ControlError

    deadline = asyncio.get_running_loop().time() + _PATIENCE
    while switch.process.returncode is None and not ended.is_set() and asyncio.get_running_loop().time() < deadline:
        try:
            with ControlClient() as client:
                if client.call("about")["pid"] == switch.process.pid:
                    return True
        except ControlError:
            pass
        await asyncio.sleep(0.05)  # Where another one answers, ours says so and ends.
    return False


class _Child:
    """A process of ours, whose lines are shown with its name before them."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self._ending = False
        self._showing = asyncio.create_task(self._show())

    @classmethod
    async def start(cls, name: str, *words: str) -> _Child:
        from viaduct.devices.child_process import die_with_parent

        process = await asyncio.create_subprocess_exec(
            *_VIADUCT,
            *words,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us alone: what ends first is ours to say.
            preexec_fn=die_with_parent,
        )
        return cls(name, process)

    @property
    def exit_code(self) -> int:
        """As a shell has it: 128 + N if signal N has killed it; 0 while it runs."""
        code = self.process.returncode or 0
        return code if code >= 0 else 128 - code

    async def _show(self) -> None:
        assert self.process.stdout is not None
        rest = b""
        while data := await self.process.stdout.read(_LINE_MAX):
            *lines, rest = (rest + data).split(b"\n")
            if len(rest) > _LINE_MAX:
                lines.append(rest)
                rest = b""
            for line in lines:
                self._say(line)
        if rest:
            self._say(rest)
        await self.process.wait()
        if (number := -(self.process.returncode or 0)) > 0 and not self._ending:
            self._say(f"killed by {signal.Signals(number).name}".encode())

    def _say(self, line: bytes) -> None:
        print(f"{self.name}: {line.decode(errors='replace').rstrip()}", flush=True)

    async def end(self) -> None:
        """Ends it, if it has not ended by itself."""
        if self.process.returncode is None:
            self._ending = True
            self.process.terminate()
            try:
                async with asyncio.timeout(_PATIENCE):
                    await self.process.wait()
            except TimeoutError:
                self.process.kill()
        await self.process.wait()
        await self._showing
