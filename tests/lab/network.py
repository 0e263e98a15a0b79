"""A switch in the lab that machines plug into, and interfaces of the lab's kernel on the same network."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from interop.peer_process import PeerProcess

BRIDGE = "lab0"


def ip(*words: str) -> None:
    """`ip` on the lab's own interfaces. Raises CalledProcessError with what it said."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


class Network:
    """`with Network(directory, ["a", "b"]) as network:` is a running switch with these vhost-user ports.

    `taps`: interfaces that machines may use, joined to the switch by a bridge of the kernel and a port of the
    switch's. The switch's control socket is the default one, so that `--nic switch:NAME` finds it.
    """

    def __init__(self, directory: Path, ports: Sequence[str], taps: Sequence[str] = ()) -> None:
        self._directory = directory
        self._ports = ports
        self._taps = taps
        self._process: PeerProcess | None = None

    def socket(self, port: str) -> Path:
        """The socket of a port."""
        return self._directory / f"{port}.sock"

    def __enter__(self) -> Self:
        command = ["viaduct", "switch"]
        for port in self._ports:
            command += ["--port", f"{port}=vhost-user:{self.socket(port)}"]
        if self._taps:
            ip("link", "add", BRIDGE, "type", "bridge", "stp_state", "0")
            ip("link", "set", BRIDGE, "up")
            for tap in (*self._taps, "uplink"):
                subprocess.run(["ip", "tuntap", "add", tap, "mode", "tap", "vnet_hdr"], check=True)
                subprocess.run(["busybox", "brctl", "addif", BRIDGE, tap], check=True)
                ip("link", "set", tap, "up")
            command += ["--port", "uplink=tap:uplink"]
        self._process = PeerProcess("switch", command, self._directory / "switch.log")
        try:
            self._process.wait_for_output("ready")
        except BaseException:
            self._end()
            raise
        return self

    def _end(self) -> None:
        if self._process is not None:
            self._process.stop()
        if self._taps:
            for interface in (BRIDGE, "uplink", *self._taps):
                subprocess.run(["ip", "link", "delete", interface], capture_output=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end()
