"""Open vSwitch with DPDK as a back-end: a database, a daemon and one bridge of its own, all in a temporary directory.

It disturbs no Open vSwitch of the machine and needs no hugepages. The bridge learns addresses (the action NORMAL).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from interop.back_end import PortSpec
from interop.peer_process import PeerError, PeerProcess, require

PACKAGES = "openvswitch-switch-dpdk"
DAEMON = "/usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"
BRIDGE = "br0"
# Its bridge makes interfaces of fixed names, which would meet those of another Open vSwitch on the machine.
PRIVATE_NETWORK = ("unshare", "--net") if os.geteuid() == 0 else ("unshare", "--user", "--map-root-user", "--net")
DPDK = "--no-pci --no-telemetry --legacy-mem --no-huge --no-shconf -m 512"


class OpenVswitch:
    """ovsdb-server, ovs-vswitchd and one bridge with a vhost-user port for each of `ports`.

    Open vSwitch puts the sockets on which it listens itself (type dpdkvhostuser) into its run directory: the socket
    of such a port must be there, directory/run. Ports with `client` (dpdkvhostuserclient) may be anywhere.
    """

    def __init__(self, directory: Path, ports: Sequence[PortSpec]) -> None:
        self.directory = directory
        self.ports = ports
        self.run_directory = directory / "run"
        self.run_directory.mkdir(exist_ok=True)
        self.database = self.run_directory / "db.sock"
        self.environment = {
            "OVS_RUNDIR": str(self.run_directory),
            "OVS_LOGDIR": str(directory),
            "OVS_DBDIR": str(directory),
            "OVS_SYSCONFDIR": str(directory),
            "RUNTIME_DIRECTORY": str(self.run_directory),
        }
        self.processes: list[PeerProcess] = []

    def start(self) -> None:
        """Start both daemons and add the ports; raises PeerError when Open vSwitch is missing or refuses."""
        daemon = require(DAEMON, PACKAGES)
        server = require("ovsdb-server", PACKAGES)
        self._run(
            require("ovsdb-tool", PACKAGES),
            "create",
            str(self.directory / "conf.db"),
            "/usr/share/openvswitch/vswitch.ovsschema",
        )
        try:
            control = f"--unixctl={self.run_directory}/ovsdb.ctl"
            remote = f"--remote=punix:{self.database}"
            database = self._spawn("ovsdb-server", server, self.directory / "conf.db", remote, control)
            database.wait_for(self.database.exists, "its socket")
            self.configure("--no-wait", "init")
            self.configure(
                "--no-wait", "set", "Open_vSwitch", ".", "other_config:dpdk-init=true",
                f"other_config:dpdk-extra={DPDK}", "other_config:pmd-cpu-mask=0x1",
                "other_config:per-port-memory=true",  # else a pool of 262,144 packet buffers
            )  # fmt: skip
            self._spawn(
                "ovs-vswitchd",
                *PRIVATE_NETWORK,
                daemon,
                f"unix:{self.database}",
                f"--unixctl={self.run_directory}/vswitchd.ctl",
                "-vconsole:info",
            )
            self.configure("add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev")
            for port in self.ports:
                self._add(port)
        except BaseException:
            self.stop()
            raise

    def _add(self, port: PortSpec) -> None:
        if port.client:
            kind = ["type=dpdkvhostuserclient", f"options:vhost-server-path={port.socket}"]
            name = port.name
        elif port.socket.parent == self.run_directory:
            kind = ["type=dpdkvhostuser"]
            name = port.socket.name
        else:
            raise ValueError(f"{port.socket} is not in {self.run_directory}, where dpdkvhostuser ports listen")
        self.configure("add-port", BRIDGE, name, "--", "set", "Interface", name, *kind)
        error = self.configure("get", "Interface", name, "error").strip()
        if error != "[]":
            raise PeerError(f"Open vSwitch refuses the port {name}: {error}\n{self.processes[-1].tail()}")

    def configure(self, *words: str) -> str:
        """Run ovs-vsctl and return what it prints; raises PeerError when it fails."""
        return self._run(require("ovs-vsctl", PACKAGES), f"--db=unix:{self.database}", "--timeout=30", *words)

    def stop(self) -> None:
        """End both daemons."""
        for process in reversed(self.processes):
            process.stop()
        self.processes.clear()

    def _spawn(self, name: str, *command: str | Path) -> PeerProcess:
        process = PeerProcess(name, command, self.directory / f"{name}.log", self.environment)
        self.processes.append(process)
        return process

    def _run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True)
        if done.returncode:
            logs = "\n".join(process.tail() for process in self.processes)
            raise PeerError(f"{' '.join(command)} left with status {done.returncode}: {done.stderr}\n{logs}")
        return done.stdout

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
