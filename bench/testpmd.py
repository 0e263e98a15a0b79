"""DPDK's testpmd with net_vhost ports in io mode: it forwards between two ports and learns nothing."""

import re
from collections.abc import Sequence
from typing import ClassVar

from bench.backend import BackEnd, Work
from bench.process import Program

# A word testpmd does not know: its complaint marks the end of the answer before.
_MARK = "viaduct-mark"


class Testpmd(BackEnd):
    name = "testpmd"
    title = "testpmd io"
    hugepages_mb = 256

    devices: ClassVar[tuple[str, ...]] = ()
    """Further virtual devices, which are its last ports."""

    _program: Program | None = None

    def start(self, options: Sequence[str] = ()) -> None:
        # fmt: off
        command = [
            *self.launcher, "stdbuf", "-oL", "dpdk-testpmd", "--lcores", f"0@{self.cpu},1@{self.cpu}",
            "--no-pci", "--no-telemetry", "--in-memory", "-m", str(self.hugepages_mb),
            "--log-level=lib.vhost.config:error",
        ]
        # fmt: on
        for index, socket in enumerate(self.sockets):
            command += ["--vdev", f"net_vhost{index},iface={socket},queues=1"]
        for device in self.devices:
            command += ["--vdev", device]
        command += [
            "--",
            "-i",
            "--nb-cores=1",
            "--total-num-mbufs=16384",
            "--forward-mode=io",
            "--rxd=1024",
            "--txd=1024",
        ]
        command += ["--record-core-cycles", "--auto-start", *options]
        self._program = Program(self.name, command)
        self.launched = self._program.started

    def program(self) -> Program:
        assert self._program is not None
        return self._program

    def work(self) -> Work:
        program = self.program()
        program.say("show fwd stats all")
        program.say(_MARK)
        cycles = packets = 0
        total = False
        while True:
            line = program.line(10)
            total |= "Accumulated forward statistics" in line
            if total and (found := re.search(r"RX-packets: (\d+)", line)):
                packets = int(found[1])
            if found := re.search(r"total cycles=(\d+)", line):
                cycles = int(found[1])
            if "Command not found" in line:
                return Work(cycles, packets)

    def stop(self) -> None:
        if self._program is not None:
            self._program.stop("quit")
