"""Open vSwitch with DPDK and its NORMAL action: a learning bridge in user space."""

import os
import re
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec

from bench.backend import BackEnd, Work
from bench.process import Program, ProgramError

_SWITCHD = ("/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk", "/usr/sbin/ovs-vswitchd")
# Its bridges make interfaces, which would meet those of another Open vSwitch on the machine.
_PRIVATE_NETWORK = ("unshare", "--net")
_SCHEMA = "/usr/share/openvswitch/vswitch.ovsschema"


class _Reply(msgspec.Struct):
    result: str | None = None
    error: str | None = None


class Ovs(BackEnd):
    name = "ovs"
    title = "OVS-DPDK NORMAL"
    # It allocates 262,144 packet buffers where it can; with less memory it starts, but then refuses connections.
    hugepages_mb = 1400

    settings: ClassVar[tuple[str, ...]] = ()
    """Further KEY=VALUE settings of the whole switch, made before it starts."""

    _database: Program | None = None
    _switch: Program | None = None

    def __init__(self, directory: Path, cpu: int) -> None:
        super().__init__(directory, cpu)
        # Ports of type dpdkvhostuser listen on a socket that is called like them in the run-time directory.
        self._environment = {key: str(directory) for key in ("OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR")}

    def _run(self, *command: str) -> None:
        subprocess.run(command, check=True, env=os.environ | self._environment, stdout=subprocess.DEVNULL, timeout=30)

    def _configure(self, *command: str) -> None:
        self._run("ovs-vsctl", "--no-wait", f"--db=unix:{self.directory}/db.sock", *command)

    def start(self, options: Sequence[str] = ()) -> None:
        """The database is prepared first, as after an installation; `launched` is the start of the switch itself.

        `options` are KEY=VALUE settings of the bridge, `other-config:mac-table-size=65536` for one.
        """
        database = self.directory / "conf.db"
        self._run("ovsdb-tool", "create", str(database), _SCHEMA)
        # fmt: off
        self._database = Program(
            "ovsdb-server",
            ["ovsdb-server", str(database), f"--remote=punix:{self.directory}/db.sock",
             f"--unixctl={self.directory}/ovsdb.ctl"],
            cpu=self.cpu, environment=self._environment,
        )
        # fmt: on
        deadline = time.monotonic() + 10
        while not (self.directory / "db.sock").exists():
            self._database.check()
            if time.monotonic() > deadline:
                raise ProgramError("ovsdb-server made no socket within 10 s")
            time.sleep(0.01)
        mask = hex(1 << self.cpu)
        # fmt: off
        self._configure(
            "init", "--", "set", "Open_vSwitch", ".",
            "other_config:dpdk-init=true", "other_config:dpdk-socket-mem=512",
            f"other_config:pmd-cpu-mask={mask}", f"other_config:dpdk-lcore-mask={mask}",
            'other_config:dpdk-extra="--no-pci --no-telemetry --in-memory"', *self.settings,
        )
        self._configure("add-br", "bench", "--", "set", "bridge", "bench", "datapath_type=netdev", *options)
        # fmt: on
        for port in self.sockets:
            kind = ["type=dpdkvhostuser"]
            if self.connects:
                kind = ["type=dpdkvhostuserclient", f"options:vhost-server-path={port}"]
            self._configure("add-port", "bench", port.name, "--", "set", "Interface", port.name, *kind)
        self._launch()

    def _launch(self) -> None:
        switchd = next((path for path in _SWITCHD if Path(path).exists()), None)
        if switchd is None:
            raise ProgramError("Open vSwitch with DPDK is missing: apt-get install openvswitch-switch-dpdk")
        control = (f"--unixctl={self.directory}/switch.ctl", "-vconsole:warn")
        self._switch = Program(
            self.name,
            [*(self.launcher or _PRIVATE_NETWORK), switchd, f"unix:{self.directory}/db.sock", *control],
            cpu=self.cpu,
            environment=self._environment,
        )
        self.launched = self._switch.started

    def restart(self) -> None:
        self._launch()

    def program(self) -> Program:
        assert self._switch is not None
        return self._switch

    def _ask(self, method: str) -> str:
        """One command over the control socket (JSON-RPC), without the cost of starting ovs-appctl."""
        with self.program().connected(self.directory / "switch.ctl") as control:
            control.sendall(msgspec.json.encode({"id": 0, "method": method, "params": []}))
            answer = b""
            while chunk := control.recv(65536):
                answer += chunk
                try:
                    reply = msgspec.json.decode(answer, type=_Reply)
                except msgspec.DecodeError:
                    continue  # the rest of it follows
                if reply.result is None:
                    raise ProgramError(f"ovs-vswitchd answers {method} with {reply.error}")
                return reply.result
        raise ProgramError(f"ovs-vswitchd closed its control socket instead of answering {method}")

    def work(self) -> Work:
        cycles = packets = 0
        for part in self._ask("dpif-netdev/pmd-stats-show").split("pmd thread")[1:]:
            if found := re.search(r"packets received: (\d+)", part):
                packets += int(found[1])
            if found := re.search(r"^\s*processing cycles: (\d+)", part, re.MULTILINE):
                cycles += int(found[1])
        return Work(cycles, packets)

    def stop(self) -> None:
        for program in (self._switch, self._database):
            if program is not None:
                program.stop()
