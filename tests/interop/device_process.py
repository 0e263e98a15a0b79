"""`viaduct device KIND` as a process, and QEMU's side of it."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

from interop.peer_process import PeerProcess, require


def device_process(kind: str, socket: Path, *options: str | Path) -> PeerProcess:
    """Starts a device on `socket` and waits until it listens."""
    program = require(str(Path(sys.executable).parent / "viaduct"), "make, then run the tests in its .venv")
    command = [program, "device", kind, "--socket", socket, *options]
    process = PeerProcess(kind, command, socket.with_suffix(".log"))
    process.wait_for(socket.exists, "its socket")
    return process


@dataclass(frozen=True)
class VhostUser:
    """One of QEMU's vhost-user devices, connected to `socket`: its model's name and its properties."""

    model: str
    socket: Path
    properties: dict[str, str] = field(default_factory=dict)

    def arguments(self, index: int) -> list[str]:
        """QEMU's arguments for it as the guest's device number `index`."""
        words = [self.model, f"chardev=u{index}", *(f"{name}={value}" for name, value in self.properties.items())]
        return ["-chardev", f"socket,id=u{index},path={self.socket}", "-device", ",".join(words)]
