"""Disks for QEMU guests: our back-end as a process, QEMU's vhost-user-blk-pci, and work whose result can be checked."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from interop.peer_process import PeerProcess
from interop.qemu import Guest

BLOCK = 4096
VIADUCT = Path(sys.executable).parent / "viaduct"


@dataclass(frozen=True)
class VirtioDisk:
    """QEMU's vhost-user-blk-pci, connected to `socket`; it connects again when the back-end has gone.

    options: further properties, such as "num-queues=2".
    """

    socket: Path
    packed: bool = False
    options: Sequence[str] = ()

    def arguments(self, index: int) -> list[str]:
        """QEMU's arguments for this device as the guest's device number `index`."""
        options = ",".join([f"packed={'on' if self.packed else 'off'}", *self.options])
        return [
            "-chardev", f"socket,id=b{index},path={self.socket},reconnect=1",
            "-device", f"vhost-user-blk-pci,chardev=b{index},{options}",
        ]  # fmt: skip


@dataclass
class DiskServer:
    """`viaduct device blk` as a process that may be killed and started again."""

    image: Path
    directory: Path
    options: Sequence[str] = ()
    process: PeerProcess | None = field(default=None, init=False)

    @property
    def socket(self) -> Path:
        """Where QEMU connects."""
        return self.directory / "blk.sock"

    def start(self) -> None:
        """Starts it, and waits until it listens."""
        before = self.process.output().count("listening on") if self.process else 0
        command: list[str | Path] = [VIADUCT, "device", "blk", self.image, "--socket", self.socket, *self.options]
        self.process = PeerProcess("blk", command, self.directory / "blk.log")
        self.process.wait_for_output("listening on", before + 1)
        self.process.wait_for(self.socket.exists, "its socket")

    def kill(self) -> None:
        """Ends it at once, with whatever it is doing."""
        assert self.process is not None
        self.process.kill()

    def restart(self) -> None:
        """Kills it and starts it again."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Ends it properly."""
        if self.process is not None:
            self.process.stop()

    def __enter__(self) -> DiskServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class Work:
    """Writes of `disk_work` (disk_work.c) to blocks of `BLOCK` bytes."""

    seed: int
    first: int
    blocks: int
    count: int
    device: str = "/dev/vda"

    @property
    def _place(self) -> str:
        return f"{self.device} {self.first} {self.blocks} {self.seed}"

    def write(self, every: int = 0, report: str = "/dev/null") -> str:
        """The command that writes, and says after each so many that they are durable."""
        return f"disk_work write {self._place} {self.count} {every} {report}"

    def verify(self, synced: int | None = None) -> str:
        """The command that checks that at least the first `synced` writes, by default all, are there."""
        return f"disk_work verify {self._place} {self.count if synced is None else synced} {self.count}"


def synced(guest: Guest) -> int:
    """The number of writes that the guest has reported as durable on its console since it booted."""
    found = re.findall(r"synced (\d+)", guest.console())
    return int(found[-1]) if found else 0
