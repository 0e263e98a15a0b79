"""Our own switch, as a user starts it: `viaduct switch`, with a learning table and without hugepages."""

import os
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from bench.backend import BackEnd, Work
from bench.process import Program, ProgramError


class _Poller(msgspec.Struct):
    frames: int
    busy_seconds: float


class _Statistics(msgspec.Struct):
    pollers: list[_Poller]


class _Reply(msgspec.Struct):
    result: _Statistics | None = None


def command(variable: str = "VIADUCT_COMMAND") -> list[str] | None:
    """The `viaduct` of this environment (or of an environment variable), or None where it is not installed."""
    if chosen := os.environ.get(variable):
        return shlex.split(chosen)
    beside = Path(sys.executable).parent / "viaduct"
    found = str(beside) if beside.exists() else shutil.which("viaduct")
    return [found] if found else None


class Viaduct(BackEnd):
    name = "viaduct"
    title = "Viaduct"
    hugepages_mb = 0

    polling = "busy"
    """How the poller waits. Throughput is measured with a poller that never sleeps, as the peers' never do."""

    port_options = ",macs=0,storm=0"
    """A peer has no such limits, and one measurement has 20,000 addresses on one port."""

    variable = "VIADUCT_COMMAND"
    """Environment variable that names the program to run, if not the one installed here."""

    _program: Program | None = None
    _control: socket.socket | None = None

    def start(self, options: Sequence[str] = ()) -> None:
        """`options` are further words of the command line."""
        base = command(self.variable)
        if base is None:
            raise ProgramError("there is no `viaduct` beside this Python or in PATH: make dev")
        words = [*self.launcher, *base, "switch", "--control", str(self.directory / "control")]
        for index, path in enumerate(self.sockets):
            role = ",client" if self.connects else ""
            words += ["--port", f"p{index}=vhost-user:{path}{role}{self.port_options}"]
        words += ["--pollers", str(self.cpu), "--polling", self.polling, *options]
        self._program = Program(self.name, words, cpu=self.cpu)
        self.launched = self._program.started

    def restart(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        self.start()

    def program(self) -> Program:
        assert self._program is not None
        return self._program

    def work(self) -> Work:
        if self._control is None:
            self._control = self.program().connected(self.directory / "control")
        self._control.sendall(b'{"id":1,"method":"stats"}\n')
        answer = b""
        while not answer.endswith(b"\n"):
            if not (chunk := self._control.recv(65536)):
                raise ProgramError("viaduct closed its control socket instead of answering `stats`")
            answer += chunk
        statistics = msgspec.json.decode(answer, type=_Reply).result
        if statistics is None:
            raise ProgramError(f"viaduct does not answer `stats`: {answer.decode(errors='replace').strip()}")
        pollers = statistics.pollers
        busy = sum(poller.busy_seconds for poller in pollers)
        return Work(round(busy * self.tsc_hz), sum(poller.frames for poller in pollers))

    def stop(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None
        if self._program is not None:
            self._program.stop()


class AdaptiveViaduct(Viaduct):
    """With the default polling: spins while packets flow and sleeps when they do not."""

    name = "viaduct-adaptive"
    title = "Viaduct, adaptive"
    polling = "adaptive"


class PopulousViaduct(AdaptiveViaduct):
    """With 16 connected ports, of which two carry the traffic."""

    name = "viaduct-16-ports"
    title = "Viaduct, adaptive, 16 ports"
    ports = 16


class CrowdedViaduct(AdaptiveViaduct):
    """With 64 connected ports, of which two carry the traffic."""

    name = "viaduct-64-ports"
    title = "Viaduct, adaptive, 64 ports"
    ports = 64


class BusyPopulousViaduct(Viaduct):
    """With 16 ports that are polled all the time."""

    name = "viaduct-16-busy"
    title = "Viaduct, busy, 16 ports"
    ports = 16


class BusyCrowdedViaduct(Viaduct):
    """With 64 ports that are polled all the time."""

    name = "viaduct-64-busy"
    title = "Viaduct, busy, 64 ports"
    ports = 64


class SmallPagesViaduct(Viaduct):
    """With guests whose memory lies in ordinary pages of 4 KB: no hugepage anywhere."""

    name = "viaduct-small-pages"
    title = "Viaduct, guests in 4 KB pages"
    guest_hugepages = False


class OtherViaduct(Viaduct):
    """Another build of our switch, side by side with this one: what has a change gained?

    VIADUCT_OTHER='/other/clone/.venv/bin/viaduct' python -m bench --backends viaduct,viaduct-other --quick
    """

    name = "viaduct-other"
    title = "Viaduct, other build"
    variable = "VIADUCT_OTHER"
    port_options = os.environ.get("VIADUCT_OTHER_PORT_OPTIONS", "")
    """An older build does not know the options of this one."""
