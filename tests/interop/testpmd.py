"""DPDK's testpmd on either side of a vhost-user socket: as back-end (net_vhost) and as front-end (virtio-user).

Neither needs hugepages: with --no-huge DPDK takes its memory from one memfd, which virtio-user can share. That memory
is in 4 KiB pages, which is slower, and no matter here.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Sequence
from pathlib import Path

from interop.back_end import PortSpec
from interop.peer_process import PeerError, PeerProcess, require, wait_until

PROMPT = "testpmd>"
ALL_CORES = "(0-1)"


def eal_arguments(memory: int = 128, core: str = ALL_CORES) -> list[str]:
    """The arguments of DPDK's environment layer: no hugepages, no devices but ours, `memory` MiB, threads on `core`."""
    lcores = f"0@{ALL_CORES},1@{core}"
    return ["--lcores", lcores, "--main-lcore", "0", "--no-pci", "--no-telemetry", "--no-huge", "--no-shconf",
            "-m", str(memory)]  # fmt: skip


class Testpmd:
    """An interactive testpmd. `start` starts it and forwarding, `ask` gives it a command, `stop` ends the process."""

    __test__ = False  # not a test, whatever pytest makes of the name

    def __init__(
        self,
        name: str,
        directory: Path,
        devices: Sequence[str],
        forward: str = "io",
        eal: Sequence[str] = (),
        options: Sequence[str] = (),
        memory: int = 128,
        core: str = ALL_CORES,
    ) -> None:
        self.name = name
        self.directory = directory
        self.devices = devices
        self.forward = forward
        self.eal = list(eal)
        self.options = list(options)
        self.memory = memory
        self.core = core
        self.process: PeerProcess | None = None

    def start(self) -> None:
        """Start testpmd and forwarding; raises PeerError when it is not installed or refuses."""
        program = require("dpdk-testpmd", "dpdk")
        # Line by line, else the prompt overtakes the answer before it.
        command = [
            "stdbuf",
            "-oL",
            program,
            *eal_arguments(self.memory, self.core),
            f"--file-prefix={self.name}",
            *self.eal,
        ]
        for device in self.devices:
            command += ["--vdev", device]
        command += [
            "--",
            "-i",
            "--nb-cores=1",
            "--total-num-mbufs=16384",
            f"--forward-mode={self.forward}",
            *self.options,
        ]
        log, answers = (self.directory / f"{self.name}.{kind}.log" for kind in ("errors", "answers"))
        log.unlink(missing_ok=True)
        answers.unlink(missing_ok=True)
        # DPDK keeps its run-time files in $RUNTIME_DIRECTORY, else in a directory of the machine that outlives it.
        self.process = PeerProcess(self.name, command, log, {"RUNTIME_DIRECTORY": str(self.directory)}, answers)
        try:
            self.process.wait_for_output(PROMPT)
            self.ask("start")
        except BaseException:
            self.kill()
            raise

    def running_process(self) -> PeerProcess:
        """The process; raises PeerError when it was not started."""
        if self.process is None:
            raise PeerError(f"{self.name} was not started")
        return self.process

    def ask(self, command: str) -> str:
        """Give one command and return what testpmd writes until it prompts again."""
        process = self.running_process()
        before = len(process.answered())

        def prompted() -> bool:
            return PROMPT in process.answered()[before:]

        process.say(command)
        try:
            process.wait_for(prompted, f"the answer to {command!r}", 10)
        except PeerError:
            # It writes the prompt letter by letter, and what another thread has to say of an event may tear it in two.
            process.say("")
            process.wait_for(prompted, f"the answer to {command!r}")
            time.sleep(1)  # both prompts are there, should it only have been slow
        return process.answered()[before:].split(PROMPT)[0]

    def statistics(self, port: int) -> dict[str, int]:
        """The counters of a port by testpmd's own names, such as "RX-packets" and "TX-errors"."""
        answer = self.ask(f"show port stats {port}")
        return {name: int(value) for name, value in re.findall(r"([RT]X-\w+): +(\d+)", answer)}

    def wait_link(self, port: int = 0, up: bool = True) -> None:
        """Wait until a port's link is up, a front-end or back-end is at the other end, or until it is down."""
        state = "up" if up else "down"
        wait_until(
            lambda: f"Link status: {state}" in self.ask(f"show port info {port}"),
            f"{self.name}: link of port {port} is {state}",
        )

    def stop(self) -> None:
        """End it as its own `quit` does."""
        process = self.running_process()
        if process.running():
            try:
                process.say("quit")
                process.wait_for(lambda: not process.running(), "its end", 20)
            except PeerError:
                pass
        process.stop()

    def kill(self) -> None:
        """End it with SIGKILL, if it runs."""
        if self.process is not None:
            self.process.kill()


_names = (f"vhost{number}" for number in itertools.count())


class TestpmdBackEnd(Testpmd):
    """testpmd with net_vhost ports, joined in links of two by io forwarding."""

    def __init__(self, directory: Path, ports: Sequence[PortSpec], forward: str = "io") -> None:
        ordered = sorted(ports, key=lambda port: port.link)
        self.sockets = [port.socket for port in ordered if not port.client]
        pairs = max(port.queue_pairs for port in ordered)  # testpmd sets up as many queues on each of its ports
        devices = [
            f"net_vhost{index},iface={port.socket},queues={pairs},client={int(port.client)},tso=1"
            for index, port in enumerate(ordered)
        ]
        options = [f"--rxq={pairs}", f"--txq={pairs}", "--max-pkt-len=9100", "--mbuf-size=10240"]
        super().__init__(next(_names), directory, devices, forward, options=options, memory=512)

    def start(self) -> None:
        """Start it; its sockets exist when it returns."""
        for path in self.sockets:
            path.unlink(missing_ok=True)  # testpmd does not replace what a killed one left
        super().start()
        process = self.running_process()
        process.wait_for(lambda: all(path.exists() for path in self.sockets), "its sockets")
