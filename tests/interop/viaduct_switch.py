"""Our switch as its users start it: the `viaduct switch` command in a process of its own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from interop.back_end import PortSpec
from interop.peer_process import PeerError, PeerProcess, require

FIRST_VLAN = 100  # links are told apart as VLANs, from this identifier on


class ViaductSwitch:
    """`viaduct switch` with the given ports; `others` are further --port arguments, such as "t=tap:tap0".

    `launcher`: a command that runs the switch, such as one that enters a network namespace first.
    """

    def __init__(
        self,
        directory: Path,
        ports: Sequence[PortSpec] = (),
        others: Sequence[str] = (),
        name: str = "viaduct",
        launcher: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.ports = ports
        self.others = others
        self.name = name
        self.launcher = launcher
        self.control = directory / f"{name}.control"
        self.process: PeerProcess | None = None
        self._upgrades = 0
        self.program = require(str(Path(sys.executable).parent / "viaduct"), "make, then run the tests in its .venv")

    def start(self) -> None:
        """Start the switch; its sockets exist when it returns."""
        command = [*self.launcher, self.program, "switch", "--control", str(self.control)]
        for port in self.ports:
            command += ["--port", self._argument(port)]
        for argument in self.others:
            command += ["--port", argument]
        self.process = PeerProcess(self.name, command, self.directory / f"{self.name}.log")
        sockets = [self.control, *(port.socket for port in self.ports if not port.client)]
        try:
            self.process.wait_for(lambda: all(path.exists() for path in sockets), "its sockets")
        except BaseException:
            self.process.kill()
            raise

    def wait_ready(self) -> None:
        """Return when the switch, started again, has said that it is ready; files of a killed one look like sockets."""
        process = self.running_process()
        process.wait_for_output(f", pid {process.pid}\n")

    def _argument(self, port: PortSpec) -> str:
        options = [f"vhost-user:{port.socket}"]
        if port.client:
            options.append("client")
        if port.queue_pairs > 1:
            options.append(f"queues={port.queue_pairs}")
        if port.mtu is not None:
            options.append(f"mtu={port.mtu}")
        if len({other.link for other in self.ports}) > 1:
            options.append(f"vlan={FIRST_VLAN + port.link}")
        return f"{port.name}={','.join(options)}"

    def running_process(self) -> PeerProcess:
        """The process; raises PeerError when the switch was not started."""
        if self.process is None:
            raise PeerError("the switch was not started")
        return self.process

    def ask(self, *words: str) -> str:
        """Run one of the commands that speak to a running switch, such as `viaduct stats --json`."""
        command = [self.program, *words, "--control", str(self.control)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            raise PeerError(f"{' '.join(command)} left with status {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def statistics(self) -> Any:
        """What `viaduct stats --json` says."""
        return json.loads(self.ask("stats", "--json"))

    def resources(self) -> dict[str, int]:
        """How many file descriptors, threads and mappings of guests' memory the switch has."""
        process = Path("/proc", str(self.running_process().pid))
        return {
            "file descriptors": len(list((process / "fd").iterdir())),
            "threads": len(list((process / "task").iterdir())),
            "mappings": (process / "maps").read_text().count("memfd:"),
        }

    def upgrade(self) -> float:
        """Let a new process take over. Returns the seconds for which nobody forwarded.

        Raises PeerError unless the old process leaves with status 0.
        """
        old, self._upgrades = self.running_process(), self._upgrades + 1
        name = f"{self.name}-{self._upgrades}"
        command = [*self.launcher, self.program, "upgrade", "--foreground", "--control", str(self.control)]
        new = PeerProcess(name, command, self.directory / f"{name}.log")
        try:
            new.wait_for_output(" ready: ")
            old.wait_for(lambda: not old.running(), "its end")
        except BaseException:
            new.kill()
            raise
        if status := old.process.returncode:
            raise PeerError(f"the switch left with status {status} after it had handed over:\n{old.tail()}")
        old.stop()
        self.process = new
        (gap,) = re.findall(r" upgraded: .* nothing was forwarded for ([\d.]+) ms", new.output())
        return float(gap) / 1000

    def stop(self) -> None:
        """End the switch with SIGTERM.

        Raises PeerError unless it leaves with status 0 and has removed the sockets it listened on.
        """
        process = self.running_process()
        alive = process.running()
        status = process.stop()
        if not alive:
            raise PeerError(f"the switch had ended with status {status} before its SIGTERM:\n{process.tail()}")
        if status != 0:
            raise PeerError(f"the switch left with status {status} after SIGTERM:\n{process.tail()}")
        left = [
            path for path in (self.control, *(port.socket for port in self.ports if not port.client)) if path.exists()
        ]
        if left:
            raise PeerError(f"the switch left sockets behind: {', '.join(map(str, left))}\n{process.tail()}")
        if "Traceback" in process.output() or "panicked" in process.output():
            raise PeerError(f"the switch logged an error of its own:\n{process.tail()}")

    def kill(self) -> None:
        """End the switch with SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()
